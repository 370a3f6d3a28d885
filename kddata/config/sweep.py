"""The sweep file, and the train jobs that it stands for: a train job, and several values for some of its keys.

Trade-off: a grid and nothing else. Every trial is a train job of its own in a folder of its own, so that what has been
trained stays valid when the grid grows, and any trial can be repeated alone with `kddata train`.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kddata.cards import canonical_json
from kddata.config.reading import Count, Section, absolute, check, parse
from kddata.config.train import TrainFile
from kddata.errors import ConfigError

_NAME_CHARS = 60


class SweepPlace(Section):
    """`run:` the folder storage/name holds a folder for each trial, and the table, the plot and all values."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    storage: str = "runs"


class SweepCluster(Section):
    """`cluster:` at_once: at most so many trials, null for as many as there is room for. What each gets is in the job.

    max_failures: how often a trial whose process died is tried again.
    """

    at_once: Count | None = None
    max_failures: Annotated[int, Field(ge=0)] = 3


class SweepFile(Section):
    """A sweep: a student for every combination of the values in `grid`.

    job: a train job file, or its content; its own `run` may be left out. grid: lists of values by dotted key of the
    train job, where a number names a place in a list (store.0.weight). metric: of the card, by which trials are ranked;
    null for top1 where the job evaluates, and loss where it does not.
    """

    job: str | dict[str, Any]
    grid: dict[str, Any]
    metric: str | None = None
    run: SweepPlace
    cluster: SweepCluster = SweepCluster()

    @property
    def folder(self) -> str:
        """Where the sweep lies; a plain path is absolute."""
        return absolute(self.run.storage).rstrip("/") + "/" + self.run.name


@dataclass(frozen=True, kw_only=True)
class SweepTrial:
    """One student of a sweep: its name, its value of each key of the grid, and its train job."""

    name: str
    values: Mapping[str, Any]
    file: TrainFile


def sweep_trials(file: SweepFile) -> list[SweepTrial]:
    """Every combination, in the order of the grid, with the last key the quickest.

    Raises ConfigError for a grid that is empty or names two equal trials, and for a trial that is no train job.
    """
    job, where = _job(file)
    grid = dict(_leaves(file.grid))
    if not grid:
        raise ConfigError("a sweep has a grid", actual="none", fix="such as grid: {data.seed: [0, 1, 2]}")
    for key, options in grid.items():
        if not isinstance(options, list) or not options:
            raise ConfigError("a key of the grid has a list of values", actual=repr(options), where=f"grid.{key}")
    trials: dict[str, SweepTrial] = {}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        name = _name(values, [key for key, options in grid.items() if len(options) > 1])
        if name in trials:
            raise ConfigError("the trials of a sweep differ", actual=f"twice {values}", where="grid")
        data = copy.deepcopy(job)
        for key, value in values.items():
            _set(data, key, value)
        data["run"] = {**(data.get("run") or {}), "name": name, "storage": file.folder}
        train = check(TrainFile, data, where=f"{where}, with {values}")
        if train.cluster.workers != 1:
            raise ConfigError(
                "a trial of a sweep trains in one worker",
                actual=f"cluster.workers {train.cluster.workers}",
                where=where,
                fix="set cluster.workers: 1 there, or cluster.workers: [1] in the grid; trials run side by side",
            )
        trials[name] = SweepTrial(name=name, values=values, file=train)
    return list(trials.values())


def _job(file: SweepFile) -> tuple[dict[str, Any], str]:
    """The train job as a mapping, and what to call it in errors."""
    if isinstance(file.job, dict):
        return file.job, "job"
    try:
        text = Path(file.job).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the train job of a sweep can be read", actual=error, where=file.job) from error
    data = parse(text, where=file.job)
    if not isinstance(data, dict):
        raise ConfigError("a job file is a mapping of keys to values", actual=type(data).__name__, where=file.job)
    return data, file.job


def _leaves(grid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, values). Keys may be dotted or nested; of two that are equal the later one counts."""
    for key, value in grid.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets one dotted key of a job in place. Raises ConfigError where the way there leads through a plain value."""
    *way, last = key.split(".")
    at: Any = data
    try:
        for part in way:
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
            at = at[int(part)] if isinstance(at, list) else at[part]
        if isinstance(at, list):
            at[int(last)] = value
        else:
            at[last] = value
    except (IndexError, TypeError, ValueError):
        raise ConfigError("a key of the grid is one of the train job's", actual=key, where=f"grid.{key}") from None


def _name(values: Mapping[str, Any], varied: list[str]) -> str:
    """Says what varies, as far as it is short, and ends in a hash of all values, so that it is the trial's alone."""
    words = [_word(key, values[key]) for key in varied]
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(words)).strip("-._")[:_NAME_CHARS]
    digest = hashlib.sha256(canonical_json(dict(values)).encode()).hexdigest()[:8]
    return f"{text}_{digest}" if text else digest


def _word(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(str(x) for name, x in value.items() if isinstance(x, str | int | float) and name != "terms")
    if isinstance(value, str):
        return re.split("[:/]", value)[-1]
    return f"{key.rpartition('.')[2]}-{value}"
