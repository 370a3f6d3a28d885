"""Sweeps on Ray: many students from one cache, side by side as far as there is room. Ray Tune places them.

A trial is `training.train` in one process, in a run folder of its own, from its own last checkpoint on. So a sweep that
was killed goes on by the same command: what has finished is read back, and what was under way is resumed. Tune's own
checkpoints, schedulers and restoring are not used; what it writes goes into a folder that is removed.

This process holds a lock in the sweep's folder, and each trial's process one in the trial's.

Trade-off: a trial has one process, and not several ranks: many students fill a cluster better than wide ones.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
from ray import tune

from kddata import training
from kddata.cluster.resources import require_room, require_shared
from kddata.cluster.session import connected
from kddata.errors import KddataError, StoreBusyError, within
from kddata.trackers import Trackers, require

_TUNE = ".tune"
_ORPHAN_S = 60.0  # that a trial's process may outlive a driver that was killed, and hold the lock of its run


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One student: its job, and what its process is given."""

    name: str
    job: training.TrainingJob
    threads: int = 1
    loader_processes: int = 0
    gpus: float = 0
    trackers: tuple[str, ...] = ()

    @property
    def cpus(self) -> int:
        """That its process reserves."""
        return self.threads + self.loader_processes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended: with the card of its student, or with an error."""

    name: str
    card: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(kw_only=True)
class Standing:
    """How far a sweep is: epochs trained over all trials, and trials that have ended, some of them with an error."""

    total_epochs: int
    trials: int
    epochs_of: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    failed: int = 0

    @property
    def epochs(self) -> int:
        """Trained so far."""
        return sum(self.epochs_of.values())


def sweep(
    trials: Sequence[Trial],
    *,
    folder: str,
    at_once: int | None = None,
    max_failures: int = 3,
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> list[Outcome]:
    """How every trial ended, in the order given. A trial that fails stops no other one.

    Args:
        folder: of the sweep, in which nothing is left but the trials' own run folders.
        at_once: at most so many trials; None for as many as there is room for.
        max_failures: how often a trial whose process died is tried again. An error that it raised is told, and not
            tried again: it would come again.

    Raises before any trial begins what `training.check` raises, with the name of the first trial that cannot work;
    StoreBusyError naming another process that drives a sweep in this folder; ResourceError where no node has room for
    one of the trials.
    """
    for trial in trials:
        with within(f"trial {trial.name}"):
            training.check(trial.job)
            require(trial.trackers)
    standing = Standing(total_epochs=sum(trial.job.optimizer.epochs for trial in trials), trials=len(trials))
    done = {trial.name: result.card for trial in trials if (result := training.finished(trial.job)) is not None}
    standing.epochs_of = {trial.name: trial.job.optimizer.epochs for trial in trials if trial.name in done}
    standing.finished = len(done)
    on_standing(standing)
    for trial in trials:
        if trial.name in done:
            training.tidy_up(trial.job.run)
    left = {trial.name: trial for trial in trials if trial.name not in done}
    errors: dict[str, str] = {}
    if left:
        with training.driving_run(folder, what="sweep"), connected():
            for trial in left.values():
                require_room("trials", 1, cpus=trial.cpus, gpus=trial.gpus, key=f"cluster, of trial {trial.name}")
                stores = (trial.job.store, *(member.url for member in trial.job.others))
                require_shared({"run": folder, "store": stores, "images": trial.job.images})
            errors = _tuned(left, folder, at_once, max_failures, standing, on_standing)
    outcomes = []
    for trial in trials:
        result = training.finished(trial.job)
        if result is not None:
            outcomes.append(Outcome(name=trial.name, card=result.card))
        else:
            outcomes.append(Outcome(name=trial.name, error=errors.get(trial.name, "it ended without a result")))
    return outcomes


def _tuned(
    trials: Mapping[str, Trial],
    folder: str,
    at_once: int | None,
    max_failures: int,
    standing: Standing,
    on_standing: Callable[[Standing], None],
) -> dict[str, str]:
    """Runs trials under Tune, and returns the errors of those that failed, by name."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the old output is silent where that is asked for
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ctrl-C ends a sweep as it ends any job
    jobs = dict(trials)

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        trial = jobs[config["trial"]]
        return tune.PlacementGroupFactory([{"CPU": trial.cpus, **({"GPU": trial.gpus} if trial.gpus else {})}])

    def run(config: dict[str, Any]) -> None:
        _train(jobs[config["trial"]])

    _remove(f"{folder}/{_TUNE}")  # of a sweep that was killed
    try:
        tuner = tune.Tuner(
            tune.with_resources(run, resources),
            param_space={"trial": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name=_TUNE,
                storage_path=folder,
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[_Following(standing, on_standing)],
                verbose=0,
            ),
        )
        results = tuner.fit()
    finally:
        _remove(f"{folder}/{_TUNE}")
    errors = {}
    for result in (results[i] for i in range(len(results))):
        name = (result.config or {}).get("trial")
        error = result.error or (result.metrics or {}).get("error")
        if name is not None and error:
            errors[name] = str(error)
    return errors


def _remove(url: str) -> None:
    """Removes a folder with all that is in it, hidden files and empty folders too; it may be gone already."""
    system, path = fsspec.core.url_to_fs(url)
    with contextlib.suppress(FileNotFoundError):
        system.rm(path, recursive=True)


def _train(trial: Trial) -> None:
    """One trial, in its own process: reports each epoch to Tune, and at the end its error, if it has one."""

    try:
        with Trackers(trial.trackers, trial.job) as track:

            def report(progress: training.Progress) -> None:
                track(progress)
                if progress.epoch_record is not None:
                    tune.report({"epochs": progress.epoch + 1})

            end_s = time.monotonic() + _ORPHAN_S
            while True:
                try:
                    training.train(
                        trial.job,
                        device="cuda" if trial.gpus else "cpu",
                        threads=trial.threads,
                        num_workers=trial.loader_processes,
                        report=report,
                    )
                    return
                except StoreBusyError:
                    if time.monotonic() > end_s:
                        raise
                time.sleep(1)
    except KddataError as error:
        tune.report({"error": str(error)})
    except Exception:  # a student's own code may raise anything: told as this trial's end, and no other one stops
        tune.report({"error": traceback.format_exc()})


class _Following(tune.Callback):
    """Keeps a standing up to date, and tells it."""

    def __init__(self, standing: Standing, on_standing: Callable[[Standing], None]) -> None:
        self._standing, self._tell = standing, on_standing

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks down, for a restoring that is not used

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "epochs" in result:
            self._standing.epochs_of[trial.config["trial"]] = result["epochs"]
        if "error" in result:
            self._standing.failed += 1
        self._tell(self._standing)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if "error" not in trial.last_result:
            self._standing.finished += 1
        self._tell(self._standing)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._standing.failed += 1
        self._tell(self._standing)
