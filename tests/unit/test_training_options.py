"""Options of a training job: micro-batches, a compiled student, an early stop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from kddata import losses
from kddata.errors import ConfigError
from kddata.images import open_source
from kddata.labels import SoftLabels
from kddata.losses.method import OF_ROWS
from kddata.replay import Batch, evaluation_loader, loader
from kddata.store import LabelStore
from kddata.teacher import build_network
from kddata.testing import make_images, make_store
from kddata.training import (
    DataArgs,
    EvaluationArgs,
    OptimizerArgs,
    Progress,
    StudentArgs,
    TrainingJob,
    normaliser,
    predict,
    train,
)
from kddata.training.stopping import best_epoch, is_over

# 32 images x 2 views in steps of 16 rows: 4 steps an epoch


def net(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 6 * 6, num_classes))


def small_net(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, num_classes))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("options"), num_images=32, views_per_image=2, num_classes=5)


@pytest.fixture
def job(store: LabelStore, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch=f"python:{__name__}:net", num_classes=5),
        method={"name": "kd", "temperature": 1, "alpha": 0.7},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.1, epochs=2),
    )


def changed(job: TrainingJob, name: str, *, student: dict[str, Any] | None = None, **optimizer: Any) -> TrainingJob:
    return dataclasses.replace(
        job,
        run=f"{job.run}-{name}",
        student=dataclasses.replace(job.student, **(student or {})),
        optimizer=dataclasses.replace(job.optimizer, **optimizer),
    )


def close(a: TrainingJob, b: TrainingJob) -> None:
    """The weights of two runs are equal, to rounding that adds up over the steps."""
    x, y = (load_file(f"{one.run}/model.safetensors") for one in (a, b))
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=1e-4, atol=1e-6)


# --- micro-batches


@pytest.mark.parametrize("accumulate", [3, 8])
def test_micro_batches_make_the_step_of_the_whole_batch(accumulate: int, job: TrainingJob) -> None:
    clipped = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, clip_norm=0.5))
    whole, parts = changed(clipped, "whole"), changed(clipped, "parts", accumulate=accumulate)
    rows: list[int] = []

    class Counting(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x):
            rows.append(len(x))
            return self.network(x)

    assert train(parts, wrap=Counting).loss_S == pytest.approx(train(whole).loss_S, rel=1e-5)
    assert len(rows) == 8 * accumulate
    assert sum(rows) == 2 * 64
    assert max(rows) - min(rows) <= 1
    close(parts, whole)


def test_a_batch_in_parts_is_the_batch(store: LabelStore) -> None:
    batch = next(iter(loader(store, batch_size=16, size_px=16, teacher_px=12)))
    parts = batch.split(5)
    assert [len(part) for part in parts] == [3, 3, 3, 3, 4]
    joined = Batch.cat(parts)
    for field in dataclasses.fields(Batch):
        a, b = getattr(joined, field.name), getattr(batch, field.name)
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif isinstance(b, SoftLabels):
            assert torch.equal(a.ids_BK, b.ids_BK)
            assert torch.equal(a.log_tail_BT, b.log_tail_BT)
        else:
            assert a == b, field.name
    assert batch.split(1) == [batch]
    assert len(batch.split(99)) == 16


@pytest.mark.parametrize("name", [*OF_ROWS, "dist"])
def test_the_methods_that_say_so_have_losses_of_single_rows(name: str) -> None:
    torch.manual_seed(0)
    labels = SoftLabels.from_logits(torch.randn(12, 6), k=6)
    args = {"temperature": 2} if name in ("kd", "lskd") else {}
    for variant in ({}, {"weighted": True}) if name == "ttm" else ({},):
        method, logits, targets = losses.make(name, **args, **variant), torch.randn(12, 6), torch.arange(12) % 6
        whole = method(logits, labels, targets, reduction="none")
        parts = [
            method(logits[i : i + 4], labels.rows(slice(i, i + 4)), targets[i : i + 4], reduction="none")
            for i in (0, 4, 8)
        ]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-5) == method.of_rows == (name in OF_ROWS)


def test_micro_batches_that_cannot_be_are_refused(job: TrainingJob) -> None:
    with pytest.raises(ConfigError, match=r"for each micro-batch; got 1 workers, 9 micro-batches and a step of 16"):
        train(changed(job, "a", accumulate=9))
    sum_of = {"name": "sum", "terms": [{"name": "kd", "temperature": 1}, {"name": "dist", "tail": "uniform"}]}
    with pytest.raises(ConfigError, match=r"micro-batches are for losses of single rows; got method sum"):
        train(changed(dataclasses.replace(job, method=sum_of), "b", accumulate=2))
    with pytest.raises(ConfigError, match=r"optimizer.accumulate is at least 1; got 0"):
        OptimizerArgs(lr=1, epochs=1, accumulate=0)


# --- an early stop


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_images(tmp_path_factory.mktemp("options"), num_images=20, num_classes=5, seed=1)


@pytest.fixture
def patient(job: TrainingJob, images: str) -> TrainingJob:
    """Its learning rate is so high that evaluations get worse now and then."""
    return dataclasses.replace(
        job,
        evaluate=EvaluationArgs(images=images, metric="nll", patience=2),
        optimizer=OptimizerArgs(lr=1.0, epochs=30, schedule="constant"),
    )


def test_the_best_epoch_and_the_end() -> None:
    records = [{"top1": x} if x is not None else {} for x in (0.1, None, 0.3, 0.3, None, 0.2)]
    assert best_epoch([], "top1") is best_epoch([{}], "top1") is None
    assert best_epoch(records, "top1") == 2, "of equal ones the first"
    assert best_epoch([{"nll": 2.0}, {"nll": 1.0}, {"nll": 3.0}], "nll") == 1, "lower is better"
    args = EvaluationArgs(images="x", patience=2)
    assert [is_over(records[:n], args) for n in range(7)] == [False] * 6 + [True]
    assert not is_over(records, EvaluationArgs(images="x"))
    assert not is_over(records, None)


def test_training_ends_early_and_keeps_the_best_student(patient: TrainingJob, images: str) -> None:
    result = train(patient)
    nll = [record["nll"] for record in result.epochs]
    best = nll.index(min(nll))
    assert len(nll) == best + 3 < 30
    assert len(result.loss_S) == 4 * len(nll)
    assert result.card["early_stop"] == {"best_epoch": best, "epochs_trained": len(nll)}
    assert result.card["metrics"] == json.loads(json.dumps(result.epochs[best]))
    network = build_network(patient.student.arch, num_classes=5, weights=f"{patient.run}/model.safetensors")
    spec = LabelStore.open(patient.store).spec
    pixels_of = normaliser(spec.teacher.mean, spec.teacher.std, "cpu")
    found = predict(network, evaluation_loader(open_source(images), size_px=16), pixels_of).score().summary()
    assert found["nll"] == min(nll)


def test_an_early_stop_is_the_same_after_any_stop(patient: TrainingJob) -> None:
    undisturbed = train(changed(patient, "undisturbed"))
    last = 4 * len(undisturbed.epochs)
    for stop in range(4, last + 1, 4):
        job, taken = changed(patient, str(stop)), []

        def report(progress: Progress, stop: int = stop) -> None:
            if progress.step == stop:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(job, report=report)
        again = train(job, report=taken.append)
        assert bool(taken) == (stop < last), "after the last one there is nothing to train"
        assert again.loss_S == undisturbed.loss_S
        assert again.card["early_stop"] == undisturbed.card["early_stop"]
        weights = [Path(one.run, "model.safetensors").read_bytes() for one in (job, changed(patient, "undisturbed"))]
        assert weights[0] == weights[1]


def test_patience_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.patience is at least 1; got 0"):
        EvaluationArgs(images="x", patience=0)
    with pytest.raises(ConfigError, match=r"evaluate.metric is one of top1, .*; got 'loss'"):
        EvaluationArgs(images="x", metric="loss")  # type: ignore[arg-type]


def _one_of_two(rank: int, job: TrainingJob, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    reductions = []

    def hook(state, bucket):
        reductions.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    def wrap(network: nn.Module) -> nn.Module:
        ddp = nn.parallel.DistributedDataParallel(network)
        ddp.register_comm_hook(None, hook)
        return ddp

    result = train(job, rank=rank, world_size=2, wrap=wrap)
    found = {"steps": len(result.loss_S), "reductions": sum(reductions)}
    Path(f"{job.run}-rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_ranks_stop_at_one_step_and_speak_once_a_step(patient: TrainingJob, tmp_path: Path) -> None:
    alone, both = changed(patient, "alone", accumulate=2), changed(patient, "both", accumulate=2)
    one = train(alone)
    torch.multiprocessing.start_processes(
        _one_of_two, args=(both, str(tmp_path / "meeting")), nprocs=2, start_method="fork"
    )
    two = train(both)
    assert two.card["early_stop"] == one.card["early_stop"]
    for rank in (0, 1):
        found = json.loads(Path(f"{both.run}-rank-{rank}.json").read_text())
        assert found == {"steps": len(one.loss_S), "reductions": len(one.loss_S)}


# --- a compiled student


def test_a_compiled_student_learns_as_any_and_keeps_its_names(job: TrainingJob, images: str) -> None:
    from torch._dynamo.utils import counters

    job = changed(job, "small", student={"arch": f"python:{__name__}:small_net"}, epochs=1)
    job = dataclasses.replace(job, evaluate=EvaluationArgs(images=images))
    plain, compiled = changed(job, "plain"), changed(job, "compiled", student={"compile": True})
    counters.clear()
    result = train(compiled)
    assert counters["stats"]["unique_graphs"] > 0
    assert result.loss_S == pytest.approx(train(plain).loss_S, rel=1e-4)
    close(compiled, plain)


def test_a_compiled_student_is_not_looked_into(job: TrainingJob) -> None:
    at = {"name": "at", "teacher_nodes": ["a"], "student_nodes": ["0"]}
    with pytest.raises(ConfigError, match=r"a compiled student is for methods on logits; got method at"):
        train(dataclasses.replace(changed(job, "at", student={"compile": True}), method=at))
