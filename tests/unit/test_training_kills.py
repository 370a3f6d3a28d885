"""A run that is killed at any step, and given again, trains on exactly the rows that remain, to the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kddata.replay import loader
from kddata.store import LabelStore, open_storage, s3
from kddata.store.steps import faults
from kddata.testing import chaos, make_store
from kddata.testing.chaos import Chaos
from kddata.testing.consumed import FOLDER, attempts, consumed, strike, wanted
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob, normaliser, train
from kddata.training.checkpoints import Checkpoints

STEPS = 8  # of two epochs: 16 images x 2 views in steps of 8 rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("kills"), num_images=16, views_per_image=2, num_classes=5)


@pytest.fixture
def job(store: LabelStore, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch="python:kddata.testing.consumed:RecordingStudent", num_classes=5),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=8, size_px=16, seed=3),
        optimizer=OptimizerArgs(lr=0.1, epochs=2),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def killed(job: TrainingJob, mode_of: Callable[[str], chaos.Mode | None] = lambda step: None) -> bool:
    """Whether a run of this job, in a process of its own, ends by a kill.

    `mode_of` gives what happens at a step of its storage, by the step's name.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        around = Chaos(lambda number: mode_of(around.steps[number]), end=chaos.kill)
        try:
            with faults(around):
                train(job)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def weights(job: TrainingJob) -> bytes:
    return open_storage(job.run).read("model.safetensors")


@pytest.mark.parametrize("checkpoint_steps", [1, 3, None])
def test_killed_at_any_step_a_run_has_the_rows_and_the_bits_of_an_undisturbed_one(
    checkpoint_steps: int | None, job: TrainingJob, store: LabelStore, folder: Path
) -> None:
    batches = loader(store, batch_size=8, size_px=16, seed=3, epochs=2)
    mean, std = store.spec.teacher.mean, store.spec.teacher.std
    rows = wanted(batches, normaliser(mean, std, "cpu"))
    assert len({row for step in rows.values() for row in step}) == store.num_rows, "a hash tells rows apart"
    undisturbed = dataclasses.replace(job, run=f"{job.run}-undisturbed")
    train(undisturbed)
    assert consumed(folder) == rows
    for step in range(STEPS):
        for path in folder.glob("*.jsonl"):
            path.unlink()
        again = dataclasses.replace(job, run=f"{job.run}-{step}", checkpoint_steps=checkpoint_steps)
        strike(folder, step=step)
        assert killed(again)
        assert max(consumed(folder)) == step
        train(again)
        assert consumed(folder) == rows
        saved = max(step // 4 * 4, step // (checkpoint_steps or STEPS) * (checkpoint_steps or STEPS))
        assert dict(attempts(folder)) == {s: 1 + (saved <= s <= step) for s in range(STEPS)}
        assert weights(again) == weights(undisturbed)


@pytest.fixture
def bucket(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in a bucket for this test, and retries without long pauses."""
    monkeypatch.setattr(s3, "PAUSE_S", 0.001)
    return f"{s3_bucket}/{tmp_path.name}"


def test_on_s3_a_run_killed_again_and_again_ends_in_the_bits_of_an_undisturbed_one(
    job: TrainingJob, store: LabelStore, folder: Path, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At two steps, and in the middle of an upload, to a server that shows the half that has come: S3 would not."""
    batches = loader(store, batch_size=8, size_px=16, seed=3, epochs=2)
    rows = wanted(batches, normaliser(store.spec.teacher.mean, store.spec.teacher.std, "cpu"))
    undisturbed = dataclasses.replace(job, run=f"{bucket}/undisturbed")
    train(undisturbed)
    for path in folder.glob("*.jsonl"):
        path.unlink()
    again = dataclasses.replace(job, run=f"{bucket}/run", checkpoint_steps=1)
    files, torn = open_storage(again.run), "checkpoints/000000005.pt"

    strike(folder, step=2)
    assert killed(again)
    assert killed(again, lambda step: "tear and kill" if step == f"put_file {torn}" else None)
    assert torn in files.sizes("checkpoints")
    checkpoint = Checkpoints(files).load()
    assert checkpoint is not None
    assert len(checkpoint["loss_S"]) == 4, "of the one before it"
    assert f"{torn} of {files.url} is damaged and passed over" in caplog.text
    strike(folder, step=6)
    assert killed(again)
    train(again)

    assert consumed(folder) == rows
    assert dict(attempts(folder)) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 2, 5: 1, 6: 2, 7: 1}
    assert weights(again) == weights(undisturbed)
    assert files.sizes().keys() == open_storage(undisturbed.run).sizes().keys()


KILLS: dict[str, tuple[chaos.Mode, ...]] = {
    "pipe_file": ("kill before", "kill after"),
    "put_file": ("kill before", "tear and kill", "kill after"),  # S3 would show nothing of a torn one
    "rm_file": ("kill before", "kill after"),
    **dict.fromkeys(("sync", "link", "replace", "remove", "remove_folder"), ("kill after",)),  # of a disk
}


@pytest.mark.parametrize("scheme", ["disk", "s3"])
def test_killed_at_any_step_by_which_it_writes_a_run_ends_in_the_same_files_and_bits(
    scheme: str, job: TrainingJob, tmp_path: Path, folder: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path / "runs") if scheme == "disk" else request.getfixturevalue("bucket")
    (tmp_path / "runs").mkdir()  # the first of them would take more steps
    undisturbed = dataclasses.replace(job, run=f"{root}/undisturbed")
    steps = chaos.count_steps(lambda url: train(dataclasses.replace(job, run=url)), undisturbed.run)
    names = open_storage(undisturbed.run).sizes().keys()
    wanted_weights, struck = weights(undisturbed), 0
    for at, step in enumerate(steps):
        for mode in KILLS.get(step.split()[0], ()):
            if mode == "tear and kill" and step.endswith("card.json"):
                continue
            again = dataclasses.replace(job, run=f"{root}/{at}-{mode.replace(' ', '-')}")
            numbers = itertools.count()
            assert killed(again, lambda _, at=at, mode=mode, numbers=numbers: mode if next(numbers) == at else None)
            train(again)
            assert weights(again) == wanted_weights, f"{mode} {step}"
            assert open_storage(again.run).sizes().keys() == names, f"{mode} {step}"
            struck += 1
    assert struck >= 20
