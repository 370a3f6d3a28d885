"""How students start and learn: weights of another task, frozen layers, averages, clipped gradients, autocast."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kddata.errors import ConfigError, TeacherError
from kddata.store import LabelStore
from kddata.teacher import build_network
from kddata.testing import make_store
from kddata.training import DataArgs, OptimizerArgs, Progress, StudentArgs, TrainingJob, train
from kddata.training.students import average_of, make_optimizer

CLASSES = 5


def net(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    )


ARCH = f"python:{__name__}:net"
HEAD = ("5.weight", "5.bias")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("students"), num_images=24, num_classes=CLASSES)


@pytest.fixture
def job(store: LabelStore, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=ARCH, num_classes=CLASSES),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.1, epochs=2, momentum=0.0, schedule="constant"),
    )


def changed(job: TrainingJob, student: dict | None = None, **optimizer: object) -> TrainingJob:
    return dataclasses.replace(
        job,
        student=dataclasses.replace(job.student, **(student or {})),
        optimizer=dataclasses.replace(job.optimizer, **optimizer),
    )


def weights(job: TrainingJob) -> dict[str, torch.Tensor]:
    return load_file(Path(job.run) / "model.safetensors")


def start(job: TrainingJob) -> dict[str, torch.Tensor]:
    return build_network(ARCH, num_classes=CLASSES, seed=job.data.seed).state_dict()


def test_weights_of_another_number_of_classes_serve_all_layers_but_the_last(tmp_path: Path) -> None:
    other, path = build_network(ARCH, num_classes=9, seed=3), str(tmp_path / "nine.safetensors")
    save_file(other.state_dict(), path)
    student = build_network(ARCH, num_classes=CLASSES, weights=path, new_head=True, seed=1).state_dict()
    fresh = build_network(ARCH, num_classes=CLASSES, seed=1).state_dict()
    for name, value in student.items():
        wanted = fresh[name] if name in HEAD else other.state_dict()[name]
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    with pytest.raises(TeacherError, match=r"of another shape: 5\.weight"):
        build_network(ARCH, num_classes=CLASSES, weights=path)
    with pytest.raises(TeacherError, match="another number of classes"):
        build_network(ARCH, num_classes=9, weights=path, new_head=True)
    with pytest.raises(ConfigError, match="starts from weights"):
        StudentArgs(arch=ARCH, num_classes=CLASSES, new_head=True)


def test_frozen_batchnorm_keeps_statistics_and_weights(job: TrainingJob) -> None:
    frozen = changed(job, {"freeze_batchnorm": True})
    train(frozen)
    before, after = start(job), weights(frozen)
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    free = dataclasses.replace(job, run=job.run + "-free")
    train(free)
    assert not torch.equal(weights(free)["1.running_mean"], before["1.running_mean"])


def test_an_average_follows_its_formula_buffers_included() -> None:
    student = net(CLASSES)
    average, wanted = average_of(student, 0.75), None
    for _ in range(4):
        with torch.no_grad():
            for value in (*student.parameters(), *student.buffers()):
                value.add_(torch.ones_like(value))
        average.update_parameters(student)
        now = {name: value.double() for name, value in student.state_dict().items() if value.is_floating_point()}
        wanted = now if wanted is None else {name: 0.75 * wanted[name] + 0.25 * now[name] for name in now}
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-7)


def test_the_average_is_what_a_run_leaves_and_it_survives_a_stop(job: TrainingJob) -> None:
    averaged = changed(job, ema=0.9)
    train(averaged)
    plain = dataclasses.replace(job, run=job.run + "-plain")
    train(plain)
    assert not torch.equal(weights(averaged)["5.weight"], weights(plain)["5.weight"])

    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Stopped

    again = dataclasses.replace(averaged, run=job.run + "-again", checkpoint_steps=1)
    with pytest.raises(Stopped):
        train(again, report=stop)
    train(again)
    for name, value in weights(averaged).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=0, atol=0)


def test_a_clipped_step_is_no_longer_than_its_norm(job: TrainingJob) -> None:
    clipped = changed(job, clip_norm=1e-3, epochs=1)
    steps = len(train(clipped).loss_S)
    before, after = start(job), weights(clipped)
    moved = sum(float((after[n] - before[n]).square().sum()) for n in after if "running" not in n and "num_b" not in n)
    assert 0 < moved**0.5 <= steps * 0.1 * 1e-3 * (1 + 1e-3)  # lr 0.1, no momentum


def test_the_backbone_has_a_learning_rate_of_its_own(job: TrainingJob) -> None:
    still = changed(job, backbone_lr_scale=0.0)
    train(still)
    before, after = start(job), weights(still)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["5.weight"], before["5.weight"])
    network = net(CLASSES)
    optimizer = make_optimizer(changed(job, backbone_lr_scale=0.1).optimizer, network, network)
    assert [(group["scale"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 4), (1.0, 2)]


def test_layers_learn_the_slower_the_earlier_they_are(job: TrainingJob) -> None:
    network = net(CLASSES)
    parts = nn.ModuleList([network, nn.Linear(2, 2)])
    args = changed(job, layer_lr_decay=0.5, backbone_lr_scale=0.1).optimizer
    layers = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
    scale_of = {
        parameter: group["scale"]
        for group in make_optimizer(args, parts, network).param_groups
        for parameter in group["params"]
    }
    for depth, layer in enumerate(reversed(layers)):
        wanted = 0.5**depth * (0.1 if depth else 1.0)
        assert all(scale_of[x] == wanted for x in layer.parameters(recurse=False))
    assert {scale_of[x] for x in parts[1].parameters()} == {1.0}
    assert scale_of.keys() == set(parts.parameters())
    train(changed(job, layer_lr_decay=0.5))


def test_autocast_changes_the_forward_pass_and_no_weight_type(job: TrainingJob) -> None:
    low = changed(job, {"precision": "bfloat16"})
    result = train(low)
    exact = train(dataclasses.replace(job, run=job.run + "-exact"))
    assert result.loss_S[0] != exact.loss_S[0]
    assert {value.dtype for value in weights(low).values() if value.is_floating_point()} == {torch.float32}


def test_values_that_make_no_sense_are_refused(job: TrainingJob) -> None:
    for values in (
        {"clip_norm": 0.0},
        {"ema": 1.0},
        {"backbone_lr_scale": -1.0},
        {"layer_lr_decay": 0.0},
        {"layer_lr_decay": 1.5},
    ):
        with pytest.raises(ConfigError, match=next(iter(values))):
            changed(job, **values)
    with pytest.raises(ConfigError, match="precision"):
        changed(job, {"precision": "float16"})
    plain = f"python:{__name__}:without_batchnorm"
    with pytest.raises(ConfigError, match="with BatchNorm"):
        train(changed(job, {"freeze_batchnorm": True, "arch": plain}))


def without_batchnorm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
