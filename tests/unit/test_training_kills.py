"""A run that is killed at any step, and given again, trains on exactly the rows that remain, to the same bits."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

from kddata.replay import loader
from kddata.store import LabelStore
from kddata.testing import make_store
from kddata.testing.consumed import FOLDER, attempts, consumed, strike, wanted
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob, normaliser, train

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


def killed(job: TrainingJob) -> bool:
    """Whether a run of this job, in a process of its own, ends by a kill."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(job)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def weights(job: TrainingJob) -> bytes:
    return Path(job.run, "model.safetensors").read_bytes()


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
