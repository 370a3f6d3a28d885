"""Two processes on one run: one trains, the other is told who does; a dead one blocks nobody."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import time
from pathlib import Path

import pytest

from kddata.errors import ConfigError, StoreBusyError
from kddata.store import LabelStore, driving, lock, open_storage
from kddata.store.sealing import seal
from kddata.testing import chaos, make_images, make_store
from kddata.training import (
    DataArgs,
    FirstStageArgs,
    OptimizerArgs,
    Progress,
    StudentArgs,
    TrainingJob,
    finished,
    train,
)
from kddata.training import driving as driving_module
from kddata.training.teach import TeachingJob, teach
from kddata.views import ViewPlan

LOCK = "lock-000001.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("locks"), num_images=16, views_per_image=2, num_classes=5)


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    return str(tmp_path / "run") if request.param == "local" else f"memory://runs/{tmp_path.name}"


def job_of(store: LabelStore, run: str) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=run,
        student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=5),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=8, size_px=16, seed=3),
        optimizer=OptimizerArgs(lr=0.1, epochs=2),
    )


def test_a_run_in_training_is_refused_and_left_as_it_is(store: LabelStore, url: str) -> None:
    job, told = job_of(store, url), []

    def again(progress: Progress) -> None:
        before = chaos.contents(url)
        assert LOCK in before
        with pytest.raises(StoreBusyError) as caught:
            train(job)
        told.append(str(caught.value))
        assert chaos.contents(url) == before

    train(job, report=again)
    host = lock._here()["host"]
    assert set(told) == {
        f"a run has one driver; got process {os.getpid()} on {host} (in {open_storage(url).url}). Next: nothing was "
        "changed here; let it finish, or stop it and run the same command again."
    }
    assert sorted(open_storage(url).sizes()) == ["card.json", "job.json", "metrics.json", "model.safetensors"]
    assert train(job) == finished(job)


def test_a_killed_process_is_told_of_while_it_lives_and_blocks_nobody_after(store: LabelStore, tmp_path: Path) -> None:
    job = job_of(store, str(tmp_path / "run"))
    undisturbed = dataclasses.replace(job, run=str(tmp_path / "undisturbed"))
    train(undisturbed)
    pid = os.fork()
    if pid == 0:
        try:
            train(job, report=lambda progress: time.sleep(600))
        finally:
            os._exit(1)
    try:
        checkpoint = tmp_path / "run/checkpoints/000000004.pt"
        until = time.monotonic() + 60
        while not checkpoint.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        before = chaos.contents(job.run)
        begin = time.monotonic()
        for _ in range(2):
            with pytest.raises(
                StoreBusyError, match=rf"a run has one driver; got process {pid} on .*nothing was changed"
            ):
                train(job)
        assert time.monotonic() - begin < 30, "at once: nothing is watched for a lease"
        after = chaos.contents(job.run)
        assert after.keys() == before.keys()
        assert {name for name in before if before[name] != after[name]} <= {LOCK}, "but for its own signs of life"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    begin = time.monotonic()
    train(job)
    assert time.monotonic() - begin < 30
    found, wanted = chaos.contents(job.run), chaos.contents(undisturbed.run)
    assert found.keys() == wanted.keys(), "no lock is left"
    assert found["model.safetensors"] == wanted["model.safetensors"]


def test_a_job_that_is_refused_leaves_no_lock(store: LabelStore, tmp_path: Path) -> None:
    job = job_of(store, str(tmp_path / "run"))
    unknown = dataclasses.replace(job, student=StudentArgs(arch="python:kddata.nets:nothing", num_classes=5))
    with pytest.raises(ConfigError):
        train(unknown)
    assert not Path(job.run).exists()


def test_both_stages_of_a_run_are_driven_as_one(store: LabelStore, tmp_path: Path) -> None:
    stage = FirstStageArgs(method={"name": "hard"}, epochs=1)
    job = dataclasses.replace(job_of(store, str(tmp_path / "run")), first_stage=stage)
    steps = []

    def again(progress: Progress) -> None:
        steps.append(progress.step)
        with pytest.raises(StoreBusyError, match="a run has one driver"):
            train(job)

    train(job, report=again)
    assert steps == [4, 8, 12]
    assert not list(tmp_path.rglob("lock-*"))


def test_a_process_that_was_taken_over_stops(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving_module, "driving", functools.partial(driving, renew_s=0.01))
    job, steps = job_of(store, str(tmp_path / "run")), []

    def takeover(progress: Progress) -> None:
        steps.append(progress.step)
        value = {**lock._here(), "machine": "another", "host": "far", "pid": 7, "token": "0", "beat": 0}
        open_storage(job.run).create("lock-000002.json", seal(value))
        time.sleep(1)

    with pytest.raises(StoreBusyError, match="a run has one driver; got process 7 on far, which took over from this"):
        train(job, report=takeover)
    assert steps == [4]
    assert sorted(path.name for path in Path(job.run, "checkpoints").iterdir()) == ["000000004.pt"]


def test_what_a_killed_process_left_in_a_finished_run_goes_unless_another_drives_it(
    store: LabelStore, url: str
) -> None:
    stage = FirstStageArgs(method={"name": "hard"}, epochs=1)
    job = dataclasses.replace(job_of(store, url), first_stage=stage)
    result, files = train(job), open_storage(url)
    names = files.sizes().keys()
    left = ("checkpoints/000000008.pt", "first/checkpoints/.tmp-0a", ".tmp-0123456789abcdef", "progress.json")
    mine = ("first/checkpoints.txt", "tensorboard/progress.json", "lock.txt")
    for name in (*left, *mine):
        files.create(name, b"")
    with driving(url):
        assert train(job) == result
        assert files.sizes().keys() == names | {*left, *mine, LOCK}
    assert train(job) == result
    assert files.sizes().keys() == names | {*mine}


def test_a_teacher_is_taught_by_one_process(tmp_path: Path) -> None:
    job = TeachingJob(
        images=make_images(tmp_path / "images", num_images=16, num_classes=4),
        run=str(tmp_path / "run"),
        network=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=4),
        plan=ViewPlan(),
        size_px=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        batch_size=8,
        optimizer=OptimizerArgs(lr=0.1, epochs=1),
    )
    told = []

    def again(step: int, num_steps: int, loss: float) -> None:
        with pytest.raises(StoreBusyError, match=f"a run has one driver; got process {os.getpid()}"):
            teach(job)
        told.append(step)

    card = teach(job, report=again)
    assert told == [1, 2]
    assert not list(Path(job.run).glob("lock-*"))
    Path(job.run, ".tmp-0123456789abcdef").touch()
    assert teach(job) == card
    assert not list(Path(job.run).glob(".tmp-*"))
