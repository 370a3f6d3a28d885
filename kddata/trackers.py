"""Trackers: the numbers of a training run, passed on to TensorBoard, MLflow or Weights & Biases as they come.

    tensorboard   event files in the folder `tensorboard` of the run
    mlflow        where MLFLOW_TRACKING_URI says; else a file store in the folder `mlruns` of the run
    wandb         as WANDB_MODE and `wandb login` say; offline runs go into the folder `wandb` of the run

A step is passed on at most once, however often a run is killed: its number is written into the run's trackers.json
first. Training never depends on a tracker: one that fails is named in a warning, once, and dropped.

Trade-off: numbers are passed on by the process that trains, which waits for a slow server; and those of a report during
which it is killed are lost, where the other choice would have been to pass them on twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kddata.errors import ConfigError
from kddata.store.storage import Storage, open_storage
from kddata.training import Progress, TrainingJob

_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
NAMES = tuple(_MODULES)
_FILE = "trackers.json"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where numbers go. Any error of it is handled by `Trackers`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers by name; steps rise."""
        ...

    def close(self) -> None:
        """Ends it; what was logged is then where it belongs."""
        ...


def require(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is not known, or whose package is not installed."""
    for name in names:
        if name not in _MODULES:
            raise ConfigError(f"trackers are of {', '.join(NAMES)}", actual=repr(name), where="trackers")
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(
                f"tracker {name} needs the package {_MODULES[name]}",
                actual="it is not installed",
                where="trackers",
                fix=f"pip install 'kddata[{name}]'",
            )


class Trackers:
    """The trackers of one run, as one, to be called with each report; see `training.train`. Opened by the first one.

        with Trackers(["tensorboard"], job) as report:
            train(job, report=report)

    Args:
        names: some of NAMES.

    Raises ConfigError like `require`.
    """

    def __init__(self, names: Sequence[str], job: TrainingJob) -> None:
        require(names)
        self._names, self._job, self._files = tuple(names), job, open_storage(job.run)
        self._trackers: dict[str, Tracker] = {}
        self._step, self._ids, self._opened = -1, dict[str, str](), not names

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Passes on the numbers of a report, unless those of its step or of a later one have been."""
        if not self._opened:
            self._open()
        if not self._trackers or progress.step <= self._step:
            return
        self._step = progress.step
        with self._guarded(*self._trackers):
            self._save()
            for name, tracker in list(self._trackers.items()):
                with self._guarded(name):
                    tracker.log(progress.step, numbers(progress))

    def _open(self) -> None:
        self._opened = True
        with self._guarded(*self._names):
            with contextlib.suppress(FileNotFoundError):
                state = json.loads(self._files.read(_FILE))
                self._step, self._ids = state["step"], state["ids"]
            for name in self._names:
                with self._guarded(name):
                    self._trackers[name] = _OPEN[name](self._files, self._ids, settings(self._job))
            self._save()

    def _save(self) -> None:
        with self._files.replacing(_FILE) as file:
            file.write(json.dumps({"step": self._step, "ids": self._ids}).encode())

    def close(self) -> None:
        """Ends all of them."""
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tracker.close()
        self._trackers.clear()

    @contextlib.contextmanager
    def _guarded(self, *names: str) -> Iterator[None]:
        """A block whose error ends these trackers, and nothing else: foreign code may raise anything."""
        try:
            yield
        except Exception as error:
            _log.warning("tracker %s failed, and training goes on without it: %r", ", ".join(names), error)
            for name in names:
                self._trackers.pop(name, None)


def numbers(progress: Progress) -> dict[str, float]:
    """What trackers are told of a report, by name: of the step, and of an epoch that has just ended."""
    found = {f"train/{name}": float(getattr(progress, name)) for name in ("loss", "lr", "images_per_s", "data_wait")}
    record = progress.epoch_record or {}
    return found | {f"epoch/{name}": float(x) for name, x in record.items() if isinstance(x, int | float)}


def settings(job: TrainingJob) -> dict[str, Any]:
    """What a run is, by dotted name."""
    fields = dataclasses.asdict(job)
    return dict(_flat({name: fields[name] for name in ("student", "method", "data", "optimizer")}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _local(files: Storage) -> Path | None:
    """The folder of a run on a disk."""
    return None if "://" in files.url else Path(files.url)


class _TensorBoard:
    """An event file for each time that the run was started. On an object store it appears, whole, when it ends."""

    def __init__(self, files: Storage, ids: dict[str, str], settings: Mapping[str, Any]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        self._event, self._summary, self._files, folder = Event, Summary, files, _local(files)
        self._temporary = None if folder is not None else tempfile.TemporaryDirectory()
        self._folder = folder / "tensorboard" if folder is not None else Path(self._temporary.name)  # type: ignore[union-attr]
        self._folder.mkdir(exist_ok=True)
        # SummaryWriter writes in a thread, so that a kill takes seconds of numbers with it; this one does at once. Its
        # file is named by whole seconds, in whose order TensorBoard reads: a start within one of another needs more.
        self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        if "tensorboard" not in ids:
            ids["tensorboard"] = "described"
            self._write(text("job", "\n".join(f"    {key}: {value}" for key, value in settings.items())), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._write(self._summary(value=[{"tag": name, "simple_value": x} for name, x in values.items()]), step)

    def close(self) -> None:
        self._writer.close()
        if self._temporary is not None:
            for path in sorted(self._folder.iterdir()):
                with self._files.replacing(f"tensorboard/{path.name}") as file:
                    file.write(path.read_bytes())
            self._temporary.cleanup()

    def _write(self, summary: Any, step: int) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class _MLflow:
    """One MLflow run of the experiment MLFLOW_EXPERIMENT_NAME, else kddata, which a resumed run goes on with."""

    def __init__(self, files: Storage, ids: dict[str, str], settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.utils.time import get_current_time_millis

        self._metric, self._now_ms = Metric, get_current_time_millis
        folder, uri = _local(files), os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and folder is not None:
            uri = (folder / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones refuse it unless told
        self._client = MlflowClient(tracking_uri=uri)
        if "mlflow" not in ids:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "kddata")
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            run = self._client.create_run(experiment, run_name=files.url.rstrip("/").rpartition("/")[2])
            ids["mlflow"] = run.info.run_id
            params = [Param(key, str(value)[:500]) for key, value in settings.items()]
            self._client.log_batch(ids["mlflow"], params=params[:100])
        self._id = ids["mlflow"]
        self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = self._now_ms()
        self._client.log_batch(self._id, metrics=[self._metric(name, x, now_ms, step) for name, x in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Wandb:
    """One W&B run, which a resumed run goes on with by its id. The project is WANDB_PROJECT, else kddata."""

    def __init__(self, files: Storage, ids: dict[str, str], settings: Mapping[str, Any]) -> None:
        import wandb

        folder = _local(files)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kddata"),
            name=files.url.rstrip("/").rpartition("/")[2],
            id=ids.setdefault("wandb", secrets.token_hex(4)),
            resume="allow",
            dir=None if folder is None else str(folder),
            config=dict(settings),
            settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[str, type[_TensorBoard] | type[_MLflow] | type[_Wandb]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
}
