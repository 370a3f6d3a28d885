"""Trackers: told each step once, however often a run is killed; and a run that never depends on one."""

from __future__ import annotations

import logging
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from kddata import trackers
from kddata.errors import ConfigError
from kddata.store import LabelStore, open_storage
from kddata.testing import make_store
from kddata.trackers import Trackers
from kddata.training import DataArgs, OptimizerArgs, Progress, StudentArgs, TrainingJob, train

REPORTS = [16, 30, 46, 60]  # of two epochs of 30 steps: at their ends, and 16 steps after the report before


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("trackers"), num_images=30, views_per_image=2, num_classes=5)


@pytest.fixture
def job(store: LabelStore, tmp_path: Path) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=5),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=2, size_px=16),
        optimizer=OptimizerArgs(lr=0.01, epochs=2),
    )


def killed_after(job: TrainingJob, names: list[str], step: int) -> None:
    """Trains in a process of its own, which is killed when the trackers have been told of a step."""
    pid = os.fork()
    if pid == 0:
        try:
            with Trackers(names, job) as track:

                def report(progress: Progress) -> None:
                    track(progress)
                    if progress.step >= step:
                        os.kill(os.getpid(), signal.SIGKILL)

                train(job, report=report)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def tracked(job: TrainingJob, names: list[str]) -> list[float]:
    with Trackers(names, job) as track:
        return train(job, report=track).loss_S


def events(run: str) -> Iterator[Event]:
    """What the event files of a run hold: records of length, its checksum, data, its checksum."""
    files = open_storage(run)
    for name in files.sizes("tensorboard"):
        data = files.read(name)
        while len(data) >= 12:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]


def scalars(run: str, name: str) -> list[tuple[int, float]]:
    return [(e.step, v.simple_value) for e in events(run) for v in e.summary.value if v.tag == name]


def test_tensorboard_has_each_step_once_though_the_run_was_killed_between_checkpoints(job: TrainingJob) -> None:
    for step in (16, 46):  # the second time it goes on from 30
        killed_after(job, ["tensorboard"], step)
    loss_S = tracked(job, ["tensorboard"])
    assert len(list(Path(job.run, "tensorboard").iterdir())) == 3
    found = scalars(job.run, "train/loss")
    assert [step for step, _ in found] == REPORTS
    assert [value for _, value in found] == pytest.approx([loss_S[step - 1] for step in REPORTS], rel=1e-6)
    for name in ("epoch/loss", "epoch/lr", "epoch/seconds"):
        assert [step for step, _ in scalars(job.run, name)] == [30, 60]
    described = [v for e in events(job.run) for v in e.summary.value if v.tag.startswith("job")]
    assert len(described) == 1
    assert b"method.temperature: 1" in described[0].tensor.string_val[0]


def test_event_files_of_a_run_on_an_object_store_are_there_when_it_ends(job: TrainingJob) -> None:
    import dataclasses

    job = dataclasses.replace(job, run=f"memory://trackers{job.run}")
    tracked(job, ["tensorboard"])
    assert [step for step, _ in scalars(job.run, "train/lr")] == REPORTS


@pytest.mark.parametrize("where", ["__init__", "log", "close"])
def test_a_tracker_that_fails_is_named_once_and_the_run_ends_well(
    where: str, job: TrainingJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(trackers._TensorBoard):
        pass

    def fail(*_: object) -> None:
        raise OSError("no route to the server")

    monkeypatch.setattr(Broken, where, fail)
    monkeypatch.setitem(trackers._OPEN, "mlflow", Broken)
    monkeypatch.setitem(trackers._MODULES, "mlflow", "tensorboardX")
    with caplog.at_level(logging.WARNING, "kddata"):
        tracked(job, ["tensorboard", "mlflow"])
    (warning,) = caplog.records
    assert "tracker mlflow failed, and training goes on without it: OSError('no route" in warning.getMessage()
    steps = [step for step, _ in scalars(job.run, "train/loss")]
    assert sorted(set(steps)) == REPORTS, "the other one was told of everything"


def test_a_tracker_is_known_and_installed(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"trackers are of tensorboard, mlflow, wandb; got 'tensorbord'"):
        Trackers(["tensorbord"], job)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package wandb; .*pip install 'kddata\[wandb\]'"):
        trackers.require(["wandb"])


def test_a_run_that_tells_no_tracker_has_no_file_of_any(job: TrainingJob) -> None:
    tracked(job, [])
    assert not {"tensorboard", "trackers.json"} & {path.name for path in Path(job.run).iterdir()}


def test_mlflow_has_one_run_and_each_step_once(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra kddata[mlflow] is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed_after(job, ["mlflow"], 46)
    loss_S = tracked(job, ["mlflow"])
    client = mlflow.MlflowClient(tracking_uri=Path(job.run, "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("kddata").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method.name"] == "kd"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == REPORTS
    assert [point.value for point in history] == pytest.approx([loss_S[step - 1] for step in REPORTS])


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB after 7 bytes of header, whose pieces have checksum, length, type."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb_goes_on_offline_with_one_id_and_each_step_once(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra kddata[wandb] is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    killed_after(job, ["wandb"], 46)
    tracked(job, ["wandb"])
    paths = sorted(Path(job.run, "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.stem for path in paths}) == 1
    records = [Record.FromString(data) for path in paths for data in wandb_records(path.read_bytes())]
    steps = [record.history.step.num for record in records if record.WhichOneof("record_type") == "history"]
    assert steps[-1] == REPORTS[-1]
    assert steps == sorted(set(steps))
