"""Training with methods that learn something beside the student: trained, saved, resumed, taken in at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kddata import nets
from kddata.errors import ConfigError
from kddata.images import open_source
from kddata.labelling import LabellingJob, label_store
from kddata.replay import evaluation_loader
from kddata.store import LabelStore
from kddata.teacher import TeacherArgs
from kddata.testing import fake_teacher_args, make_store
from kddata.training import (
    DataArgs,
    EvaluationArgs,
    FirstStageArgs,
    OptimizerArgs,
    Progress,
    StudentArgs,
    TrainingJob,
    normaliser,
    predict,
    train,
)
from kddata.training.head import folded, require_foldable
from kddata.training.run import Run
from kddata.views import ViewPlan

METHODS = {
    "aekt": {"name": "aekt", "temperature": 2},
    "ctkd": {"name": "ctkd", "ramp_steps": 6},
    "sum": {"name": "sum", "terms": [{"name": "hard"}, {"name": "aekt", "hard_weight": 1}, {"name": "ctkd"}]},
}


def student(num_classes: int) -> nn.Module:
    return nets.small_resnet(num_classes, width=4, stem_stride=2)


def scaled(num_classes: int) -> nn.Module:
    """Something comes after its last linear layer."""
    return nn.Sequential(student(num_classes), nn.Tanh())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("parts"), num_images=30, num_classes=5, k=5, size_px=16)


@pytest.fixture(params=METHODS)
def job(request: pytest.FixtureRequest, store: LabelStore, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:student", num_classes=5),
        method=METHODS[request.param],
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=4),
        checkpoint_steps=1,
    )


def other(job: TrainingJob, **changes: Any) -> TrainingJob:
    return dataclasses.replace(job, run=job.run + "-other", **changes)


def test_a_run_stopped_at_each_checkpoint_ends_in_the_same_bits(job: TrainingJob) -> None:
    whole = train(job)
    assert whole.loss_S[-1] < whole.loss_S[0]
    again = other(job)

    def stop(progress: Progress) -> None:
        if progress.step in (2, 5):
            raise KeyboardInterrupt

    for _ in range(3):
        try:
            resumed = train(again, report=stop)
        except KeyboardInterrupt:
            checkpoint = Run(again.run).checkpoints.load()
            assert checkpoint is not None
            assert checkpoint["parts"]
    assert resumed.loss_S == whole.loss_S
    weights = [load_file(f"{j.run}/model.safetensors") for j in (job, again)]
    assert weights[0].keys() == student(5).state_dict().keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_teacher_in_the_loop_gives_the_losses_of_the_cache(job: TrainingJob) -> None:
    cached = train(job)
    live = train(other(job, teacher=fake_teacher_args(num_classes=5, size_px=16)))
    assert live.cached_loss_S == pytest.approx(live.loss_S, rel=2**-10)  # two roundings: at T = 1, and its softmax
    assert live.cached_loss_S[0] == cached.loss_S[0]


def test_the_result_answers_with_the_head(store: LabelStore, tmp_path: Path) -> None:
    """What was judged during training, with the head behind the student, is what the plain student says at the end."""
    network, weight, bias = student(5).eval(), torch.randn(5, 5), torch.randn(5)
    x = torch.randn(4, 3, 16, 16)

    def head(logits: Tensor) -> Tensor:
        return logits @ weight.T + bias

    plain = folded(network, head, 5, where="here")
    assert plain.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(plain(x), head(network(x)))
    images = str(Path(store.url).parent / "images")
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:student", num_classes=5),
        method=METHODS["aekt"],
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.2, epochs=4),
        evaluate=EvaluationArgs(images=images),
    )
    result = train(job)
    assert result.card["metrics"]["top1"] >= 0
    network.load_state_dict(load_file(f"{job.run}/model.safetensors"))
    card = store.spec.teacher
    found = predict(
        network, evaluation_loader(open_source(images), size_px=16), normaliser(card.mean, card.std, "cpu")
    ).score()
    assert found.summary()["nll"] == pytest.approx(result.card["metrics"]["nll"], rel=1e-4)


@pytest.fixture(scope="module")
def pictured(store: LabelStore, tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    """The same images, labelled by a network that has layers to look into."""
    job = LabellingJob(
        images=str(Path(store.url).parent / "images"),
        store=str(tmp_path_factory.mktemp("pictured") / "labels"),
        teacher=TeacherArgs(arch=f"python:{__name__}:plain", num_classes=5, size_px=16),
        plan=ViewPlan(),
        views_per_image=2,
        k=5,
        outputs=("attention:1", "embedding", "boundary", "boundary_logits"),
    )
    return label_store(job).store


def _one_of_two(rank: int, job: TrainingJob, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train(job, rank=rank, world_size=2, wrap=nn.parallel.DistributedDataParallel)
    torch.distributed.destroy_process_group()


def plain(num_classes: int) -> nn.Module:
    """Without BatchNorm, whose statistics are a rank's own."""
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, num_classes))


def test_two_processes_train_parts_as_one_does(pictured: LabelStore, tmp_path: Path) -> None:
    """AT is a mean over images, so that two shares of a batch make the whole; layers above the node have no gradient
    of it, the head and the temperature learn outside the network's own forward pass, and boundary samples are a second
    one. A first stage is over for both before either begins the next."""
    terms = [{"name": "at", "teacher_nodes": ["1"], "student_nodes": ["1"], "weight": 10}]
    terms += [{"name": "aekt", "hard_weight": 1}, {"name": "ctkd"}, {"name": "bss", "weight": 5}]
    job = TrainingJob(
        store=pictured.url,
        run=str(tmp_path / "alone"),
        student=StudentArgs(arch=f"python:{__name__}:plain", num_classes=5),
        method={"name": "sum", "terms": terms},
        data=DataArgs(batch_size=17, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=2),
        first_stage=FirstStageArgs(method=terms[0], epochs=1),
    )
    only_at = dataclasses.replace(
        job, method={**terms[0], "name": "at", "hard_weight": 0}, run=job.run + "-at", first_stage=None
    )
    for one in (job, only_at):
        both = dataclasses.replace(one, run=one.run + "-both")
        args = (both, str(tmp_path / f"meeting{one.method['name']}"))
        torch.multiprocessing.start_processes(_one_of_two, args=args, nprocs=2, start_method="fork")
        assert train(both).loss_S == pytest.approx(train(one).loss_S, rel=1e-5)


def test_crd_trains_in_one_worker(pictured: LabelStore, tmp_path: Path) -> None:
    job = TrainingJob(
        store=pictured.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:plain", num_classes=5),
        method={"name": "crd", "num_images": 30},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=1),
    )
    with pytest.raises(ConfigError, match="trains in one worker; got 2 workers"):
        train(job, world_size=2)


def test_a_student_that_cannot_take_a_head_in_is_refused_before_the_first_step(
    store: LabelStore, tmp_path: Path
) -> None:
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:scaled", num_classes=5),
        method=METHODS["aekt"],
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.2, epochs=1),
    )
    with pytest.raises(ConfigError, match="something comes after it"):
        train(job)
    assert not Path(job.run, "job.json").exists()
    pixels = torch.randn(1, 3, 16, 16)
    with pytest.raises(ConfigError, match="no linear layer"):
        require_foldable(nn.Sequential(nn.Conv2d(3, 5, 16), nn.Flatten()), pixels, 5, where="here")
    with pytest.raises(ConfigError, match="with a bias"):
        require_foldable(nn.Sequential(nn.Flatten(), nn.Linear(768, 5, bias=False)), pixels, 5, where="here")
