"""Training: guard rails, exact resume, equal results for any world; the teacher in the loop is the cache's oracle."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kddata import losses
from kddata.errors import ConfigError, SourceError, StoreError, StoreMismatchError, StoreMissingError, TeacherError
from kddata.labels import SoftLabels
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.teacher import build_network
from kddata.testing import fake_teacher, fake_teacher_args, make_images, make_store
from kddata.training import (
    DataArgs,
    EvaluationArgs,
    OptimizerArgs,
    Progress,
    Step,
    StudentArgs,
    TrainingJob,
    finished,
    train,
)
from kddata.training.steps import require_finite

# 30 images x 2 views in steps of 16 rows: 3 steps an epoch, the last of 28 rows


def dropout_net(num_classes: int) -> nn.Module:
    """Small, with everything that has state: BatchNorm, momentum, and dropout for its random numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def plain_net(num_classes: int) -> nn.Module:
    """Without BatchNorm, whose statistics are a rank's own."""
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 6 * 6, num_classes))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(
        tmp_path_factory.mktemp("training"), num_images=30, views_per_image=2, num_classes=5, temperatures=(1.0, 2.0)
    )


@pytest.fixture
def job(store: LabelStore, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:dropout_net", num_classes=5),
        method={"name": "kd", "temperature": 2, "alpha": 0.7},
        data=DataArgs(batch_size=16, size_px=16, seed=3),
        optimizer=OptimizerArgs(lr=0.1, epochs=4, weight_decay=1e-4, warmup_epochs=0.5),
    )


def other(job: TrainingJob, run: str, **changes: object) -> TrainingJob:
    return dataclasses.replace(job, run=str(Path(job.run).parent / run), **changes)  # type: ignore[arg-type]


def weights(job: TrainingJob) -> bytes:
    return (Path(job.run) / "model.safetensors").read_bytes()


class Stop(Exception):
    pass


def stop_after(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step >= step:
            raise Stop

    return report


def test_a_student_learns_and_leaves_a_result(job, tmp_path):
    images = make_images(tmp_path / "test", num_images=20, num_classes=5, seed=1)
    job = dataclasses.replace(job, evaluate=EvaluationArgs(images=images, every_epochs=3))
    seen = []
    result = train(job, report=seen.append)
    assert result.epochs[-1]["loss"] < result.epochs[0]["loss"]
    assert len(result.loss_S) == 12
    assert [sorted(record) for record in result.epochs[:2]] == [
        ["data_wait", "epoch", "images_per_s", "loss", "lr", "seconds"]
    ] * 2
    for epoch in (2, 3):  # after three, and after the last
        assert {"top1", "nll", "ece"} < result.epochs[epoch].keys()
    assert [progress.step for progress in seen] == [3, 6, 9, 12]
    assert seen[-1].epoch_record == result.epochs[-1]
    files = sorted(path.relative_to(job.run).as_posix() for path in Path(job.run).rglob("*") if path.is_file())
    assert files == ["card.json", "job.json", "metrics.json", "model.safetensors"]
    network = build_network(job.student.arch, num_classes=5, weights=f"{job.run}/model.safetensors")
    assert set(load_file(f"{job.run}/model.safetensors")) == set(network.state_dict())
    card = json.loads(Path(job.run, "card.json").read_text())
    assert card["method"] == {"name": "kd", "temperature": 2, "alpha": 0.7}
    assert card["teacher"]["arch"] == "python:kddata.testing:fake_network"
    assert card["metrics"]["top1"] == result.epochs[-1]["top1"]


def test_a_finished_run_is_read_back_and_nothing_is_done(job):
    first = train(job)
    files = {path: path.stat().st_mtime_ns for path in Path(job.run).rglob("*")}
    again = train(job, report=stop_after(0))
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in Path(job.run).rglob("*")} == files


def test_another_job_under_the_name_of_a_run_is_refused(job):
    with pytest.raises(Stop):
        train(job, report=stop_after(3))
    changed = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, lr=0.2))
    with pytest.raises(ConfigError, match=r"begun with; got optimizer.lr: begun with 0.1, now 0.2"):
        train(changed)
    train(dataclasses.replace(job, checkpoint_steps=1))  # how often it is saved is no part of what it is


def test_two_runs_of_one_job_have_equal_bits_however_they_read_and_are_judged(job, tmp_path):
    images = make_images(tmp_path / "test", num_images=4, num_classes=5)
    judged = other(job, "judged", evaluate=EvaluationArgs(images=images))
    assert train(job).loss_S == train(judged, num_workers=2).loss_S
    assert weights(job) == weights(judged)


def test_each_step_has_its_own_random_numbers(job):
    seeds = []

    class Watch(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x):
            seeds.append(torch.initial_seed())
            return self.network(x)

    train(job, wrap=Watch)
    train(other(job, "other seed", data=DataArgs(batch_size=16, size_px=16, seed=4)), wrap=Watch)
    assert len(set(seeds)) == 24


@pytest.mark.parametrize(("stopped_after", "checkpoint_steps"), [(3, None), (5, 1), (8, 2), (12, None)])
def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(job, stopped_after, checkpoint_steps):
    undisturbed = train(other(job, "undisturbed"))
    job = dataclasses.replace(job, checkpoint_steps=checkpoint_steps)
    with pytest.raises(Stop):
        train(job, report=stop_after(stopped_after))
    torch.manual_seed(stopped_after)  # no state is left in this process that a new one would not have
    resumed = train(job)
    assert resumed.loss_S == undisturbed.loss_S
    assert weights(job) == weights(other(job, "undisturbed"))
    assert [record["loss"] for record in resumed.epochs] == [record["loss"] for record in undisturbed.epochs]


def test_a_torn_checkpoint_is_never_loaded(job, monkeypatch):
    undisturbed = train(other(job, "undisturbed"))
    with pytest.raises(Stop):
        train(job, report=stop_after(3))
    save = torch.save

    def torn(state, file):
        file.write(b"PK half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(StoreError, match="No space"):
        train(job)
    assert [path.name for path in Path(job.run, "checkpoints").iterdir()] == ["000000003.pt"]
    monkeypatch.setattr(torch, "save", save)
    assert train(job).loss_S == undisturbed.loss_S


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_run_may_lie_on_other_storage(job, scheme, request):
    undisturbed = train(job)
    root = "memory://runs" if scheme == "memory" else f"{request.getfixturevalue('s3_bucket')}/runs"
    elsewhere = dataclasses.replace(job, run=f"{root}/elsewhere", checkpoint_steps=2)
    with pytest.raises(Stop):
        train(elsewhere, report=stop_after(8))
    assert train(elsewhere).loss_S == undisturbed.loss_S
    assert finished(elsewhere).loss_S == undisturbed.loss_S


def test_all_methods_see_the_same_pixels_in_the_same_order(job):
    def seen_by(job: TrainingJob) -> list[str]:
        seen = []

        class Watch(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, x):
                assert self.network.training
                seen.append(hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest())
                return self.network(x)

        train(job, wrap=Watch)
        return seen

    cached = seen_by(job)
    assert len(cached) == len(set(cached)) == 12
    assert seen_by(other(job, "hard", method={"name": "hard"})) == cached
    assert seen_by(other(job, "live", teacher=fake_teacher_args(num_classes=5, size_px=16))) == cached


def test_the_loss_of_a_row_differs_from_the_teacher_in_the_loop_by_its_rounding_alone(store):
    """fp16 keeps log p to a relative 2^-11, so at T the log p_t move by d = 2^-11 |log p / T|, and by less than twice
    the largest d after they are brought to sum to 1. To first order the loss moves by T^2 sum p_t d |1 + log p_t/q_t|.
    """
    temperature, network = 2.0, plain_net(5)
    method = losses.make("kd", temperature=temperature)
    teacher = fake_teacher(num_classes=5, size_px=16)
    worst = 0.0
    for batch in loader(store, batch_size=16, size_px=16, teacher_px=16):
        with torch.no_grad():
            logits = network(batch.pixels_u8_B3SS / 255)
        live = SoftLabels.from_logits(
            teacher(batch.teacher_pixels_u8), k=store.spec.k, temperatures=store.spec.temperatures
        )
        moved = (method(logits, batch.labels, reduction="none") - method(logits, live, reduction="none")).abs()
        log_p, log_tail = live.at(temperature)
        log_q = (logits / temperature).log_softmax(1)
        log_q_tail = log_q.exp().scatter(1, live.ids_BK.long(), 0).sum(1).log()
        log_p = torch.cat([log_p, log_tail[:, None]], 1)
        log_q = torch.cat([log_q.gather(1, live.ids_BK.long()), log_q_tail[:, None]], 1)
        d = 2 * 2**-11 * (live.log_p_BK / temperature).abs().amax(1)
        bound = temperature**2 * d * (log_p.exp() * (1 + log_p - log_q).abs()).sum(1)
        assert (moved <= bound * 1.01 + 1e-6).all()
        worst = max(worst, float((moved / bound).max()))
    assert worst > 0.01  # the bound is of the size of what it bounds


def test_cached_labels_train_as_the_teacher_in_the_loop_does(job):
    """Roundings of about 1e-4 of a step's loss add up over steps, here with a learning rate that does not amplify."""
    student = StudentArgs(arch=f"python:{__name__}:plain_net", num_classes=5)
    job = dataclasses.replace(job, student=student, optimizer=OptimizerArgs(lr=0.01, epochs=4))
    cached = train(other(job, "cached"))
    live = train(other(job, "live", teacher=fake_teacher_args(num_classes=5, size_px=16)))
    assert cached.loss_S != live.loss_S
    assert cached.loss_S == pytest.approx(live.loss_S, rel=5e-4)
    assert live.card["teacher_in_the_loop"]
    assert live.cached_loss_S != live.loss_S
    assert live.cached_loss_S == pytest.approx(live.loss_S, rel=1e-4)  # the same weights: nothing adds up
    assert live.cached_loss_S[0] == cached.loss_S[0]
    assert cached.cached_loss_S == []


def test_a_teacher_in_the_loop_has_its_own_input_size(tmp_path, job):
    store = make_store(tmp_path / "large", num_images=20, num_classes=5, size_px=24, temperatures=(1.0, 2.0))
    job = dataclasses.replace(job, store=store.url)
    live = train(other(job, "live", teacher=fake_teacher_args(num_classes=5, size_px=24)))
    assert live.loss_S[0] == pytest.approx(train(other(job, "cached")).loss_S[0], rel=5e-4)


def test_a_loss_that_is_not_finite_stops_with_the_images_of_its_step(job, store):
    job = dataclasses.replace(job, optimizer=OptimizerArgs(lr=1e38, epochs=4, schedule="constant"))
    with pytest.raises(TeacherError, match=r"the loss is finite; got \S+ at step 1, .*image-000\d\d, .*optimizer.lr"):
        train(job)
    noted = json.loads(Path(job.run, "nonfinite-0.json").read_text())
    batch = list(loader(store, batch_size=16, size_px=16, seed=3))[1]
    assert (noted["step"], noted["rank"]) == (1, 0)
    assert noted["what"] in ("a loss of nan", "a loss of inf")
    assert noted["rows"] == [
        {"image_id": i, "view": v} for i, v in zip(batch.image_ids, batch.view_indices, strict=True)
    ]
    assert not Path(job.run, "checkpoints").exists()


def test_weights_that_are_not_finite_are_refused():
    network = plain_net(5)
    step = Step(
        number=7,
        loss=torch.tensor(1.0),
        lr=0.5,
        rows=2,
        image_ids=["a", "b"],
        view_indices=[3, 0],
        wait_s=0.0,
        seconds=1.0,
    )
    noted = []

    def note(step: Step, what: str) -> str:
        noted.append(what)
        return "nonfinite-0.json"

    require_finite(network, step, note)
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(TeacherError, match=r"in 0.weight after step 7, .* \(in images a, b, as nonfinite-0.json says"):
        require_finite(network, step, note)
    assert noted == ["0.weight not finite after the step"]


class RootNet(nn.Module):
    """Its logits are finite where its gradient is not: the slope of a square root at 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None] * torch.arange(5) + self.weight.sqrt()


def test_a_checkpoint_is_not_made_of_weights_that_are_not_finite(job):
    student = StudentArgs(arch=f"python:{__name__}:RootNet", num_classes=5)
    with pytest.raises(TeacherError, match=r"weights are finite; got otherwise in weight after step 0"):
        train(dataclasses.replace(job, student=student, checkpoint_steps=1))
    assert not Path(job.run, "checkpoints").exists()


def _one_of_two(rank: int, job: TrainingJob, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    train(job, rank=rank, world_size=2, wrap=nn.parallel.DistributedDataParallel)
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_does(job, tmp_path):
    """Steps of 17 rows are shared as 8 and 9: only weighting by rows makes the mean over ranks the mean over rows."""
    job = dataclasses.replace(
        job,
        student=StudentArgs(arch=f"python:{__name__}:plain_net", num_classes=5),
        data=DataArgs(batch_size=17, size_px=16),
    )
    alone, both = other(job, "alone"), other(job, "both")
    one = train(alone)
    args = (both, str(tmp_path / "meeting"))
    torch.multiprocessing.start_processes(_one_of_two, args=args, nprocs=2, start_method="fork")
    two = train(both)
    assert two.loss_S == pytest.approx(one.loss_S, rel=1e-5)
    a, b = (load_file(f"{run.run}/model.safetensors") for run in (alone, both))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"student": StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=7)},
            StoreMismatchError,
            r"has the 5 classes of the store's teacher; got student.num_classes 7",
        ),
        (
            {"method": {"name": "kd", "temperature": 3}},
            ConfigError,
            r"tail mass at temperature 3; got it at \[1.0, 2.0\] alone",
        ),
        ({"method": {"name": "kdd", "temperature": 2}}, ConfigError, r"method.name is one of kd"),
        ({"data": DataArgs(batch_size=1, size_px=16)}, ConfigError, r"two rows or more of each step; got 1 workers"),
        (
            {"teacher": dataclasses.replace(fake_teacher_args(num_classes=5), std=(0.5, 0.5, 0.5))},
            StoreMismatchError,
            r"the store's own; got std",
        ),
        ({"store": "nowhere"}, StoreMissingError, r"nowhere"),
        ({"images": "nowhere"}, SourceError, r"nowhere"),
        ({"evaluate": EvaluationArgs(images="nowhere")}, SourceError, r"nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(job, changes, error, message):
    with pytest.raises(error, match=message):
        train(dataclasses.replace(job, **changes), report=stop_after(0))


def test_other_images_under_the_names_of_the_labelled_ones_are_refused_before_the_first_step(job, tmp_path):
    others = make_images(tmp_path / "others", num_images=30, num_classes=5, seed=1)
    seen = []

    def watch(network: nn.Module) -> nn.Module:
        network.register_forward_hook(lambda *_: seen.append(1))
        return network

    with pytest.raises(SourceError, match=r"image-000\d\d"):
        train(dataclasses.replace(job, images=others), wrap=watch)
    assert not seen
    assert train(job).loss_S, "the run can be gone on with, from the right ones"


def test_a_hard_term_without_ground_truth_is_refused(job, tmp_path):
    store = make_store(tmp_path / "unlabelled", num_images=10, num_classes=5, labelled=False, temperatures=(1.0, 2.0))
    job = dataclasses.replace(job, store=store.url)
    with pytest.raises(ConfigError, match=r"method kd needs ground-truth labels .*method.alpha=1"):
        train(job)
    with pytest.raises(ConfigError, match=r"method hard needs ground-truth labels"):
        train(dataclasses.replace(job, method={"name": "hard"}))
    train(dataclasses.replace(job, method={"name": "kd", "temperature": 2}))


def test_a_job_that_was_refused_does_not_claim_its_run(job):
    wrong = dataclasses.replace(job, student=StudentArgs(arch=f"python:{__name__}:drop_out_net", num_classes=5))
    with pytest.raises(ConfigError, match="drop_out_net"):
        train(wrong)
    train(job)


def test_images_to_judge_on_without_labels_are_refused(job, tmp_path):
    images = make_images(tmp_path / "unlabelled", num_images=4, labelled=False)
    with pytest.raises(ConfigError, match=r"judged on have labels; got none has .*a folder for each class"):
        train(dataclasses.replace(job, evaluate=EvaluationArgs(images=images)))


def test_a_student_of_another_width_than_it_says_is_refused(job):
    student = StudentArgs(arch=f"python:{__name__}:seven_wide", num_classes=5)
    with pytest.raises(TeacherError, match=r"answers a view with 5 logits; got \(1, 7\)"):
        train(dataclasses.replace(job, student=student))


def seven_wide(num_classes: int) -> nn.Module:
    return dropout_net(7)


def test_the_learning_rate_rises_and_falls():
    cosine = OptimizerArgs(lr=1.0, epochs=10, warmup_epochs=2)
    rates = [cosine.learning_rate(step, 5) for step in range(50)]
    assert rates[:11] == pytest.approx([0.1 * step for step in range(1, 11)] + [1.0])
    assert rates[30] == pytest.approx(0.5)
    assert rates[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    constant = OptimizerArgs(lr=1.0, epochs=10, schedule="constant")
    assert {constant.learning_rate(step, 5) for step in range(50)} == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, r"optimizer.name is one of sgd, adamw; got 'adam'"),
        ({"schedule": "step"}, r"optimizer.schedule is one of cosine, constant"),
        ({"epochs": 0}, r"epochs is at least 1"),
        ({"warmup_epochs": 5}, r"warm-up lies within them; got 4 epochs, warmup_epochs 5"),
    ],
)
def test_an_optimizer_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerArgs(**{"lr": 0.1, "epochs": 4} | change)


def test_adamw_trains_too(job):
    result = train(dataclasses.replace(job, optimizer=OptimizerArgs(name="adamw", lr=0.01, epochs=4)))
    assert result.epochs[-1]["loss"] < result.epochs[0]["loss"]
