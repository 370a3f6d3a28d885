"""The errors that users of kddata meet.

Every message says four things: the rule, the actual value, where it was found, and what to do next.
`except KddataError` catches all of them; bugs of our own stay plain `AssertionError`s.

    KddataError                     exit code
    ├── ConfigError (ValueError)        2   a job file or an argument is wrong
    ├── LabelError (ValueError)         2   soft labels asked for something that they do not hold
    ├── SourceError                     3   images are missing, empty or ambiguous
    │   ├── BadImageError               3   one image cannot be used (counted, listed, bounded)
    │   └── BadImageBudgetError         3   more bad images than limits.bad_images allows
    ├── TeacherError                    4   a teacher or student cannot be built, or answers with NaN
    ├── StoreError                      5   a label store cannot be used as asked
    │   ├── StoreMissingError           5   nothing there, or labelling has not finished
    │   ├── StoreMismatchError          5   another spec, plan, card or source; the field is named
    │   ├── StoreDamagedError           5   bytes differ from their recorded hash; the file is named
    │   ├── StoreVersionError           5   written by a newer format version
    │   └── StoreBusyError              5   another driver is writing to it, or trains in a run
    ├── ResourceError                   6   the machine or cluster has less than the job asks for
    └── TrialsFailedError               7   trials of a sweep failed; the others have finished
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KddataError(Exception):
    """Base of all errors for users. `str(error)` is the whole message, in order: rule, actual, where, next.

    Args:
        rule: what must hold, as a sentence without a full stop.
        actual: what was found instead.
        where: file, shard, row, field or key.
        fix: what the reader can do next.
    """

    exit_code = 1

    def __init__(self, rule: str, *, actual: object = None, where: object = None, fix: str | None = None) -> None:
        self.rule, self.actual, self.where, self.fix = rule, actual, where, fix
        text = rule
        if actual is not None:
            text += f"; got {actual}"
        if where is not None:
            text += f" (in {where})"
        text += "."
        if fix is not None:
            text += f" Next: {fix}."
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray, DataLoader workers) and keep their parts.
        return _rebuild, (type(self), self.rule, self.actual, self.where, self.fix)


@contextmanager
def within(place: str) -> Iterator[None]:
    """A block whose errors for users name this place too, before the one that they name; their kinds stay."""
    try:
        yield
    except KddataError as error:
        where = place if error.where is None else f"{place}: {error.where}"
        raise _rebuild(type(error), error.rule, error.actual, where, error.fix) from error


def _rebuild(kind: type[KddataError], rule: str, actual: object, where: object, fix: str | None) -> KddataError:
    return kind(rule, actual=actual, where=where, fix=fix)


class ConfigError(KddataError, ValueError):
    """A job file or an argument is wrong."""

    exit_code = 2


class LabelError(KddataError, ValueError):
    """Soft labels were asked for something that they do not hold, or do not keep their own rules."""

    exit_code = 2


class SourceError(KddataError):
    """Images are missing, empty or ambiguous."""

    exit_code = 3


class BadImageError(SourceError):
    """One image cannot be used. Labelling counts and lists it; past `limits.bad_images` the job fails."""


class BadImageBudgetError(SourceError):
    """More bad images than `limits.bad_images` allows. Finished units stay."""


class TeacherError(KddataError):
    """A network cannot be built from its description and weights, or its outputs are not finite."""

    exit_code = 4


class StoreError(KddataError):
    """A label store cannot be used as asked."""

    exit_code = 5


class StoreMissingError(StoreError):
    """There is no store, or labelling has not finished (no manifest yet)."""


class StoreMismatchError(StoreError):
    """A store exists with another spec, plan, card or source. Nothing was overwritten."""


class StoreDamagedError(StoreError):
    """Bytes of a store differ from their recorded hash, or a file is missing."""


class StoreVersionError(StoreError):
    """A store was written by a newer format version than this library reads."""


class StoreBusyError(StoreError):
    """Another live driver is writing to the store, or trains in the run's folder."""


class ResourceError(KddataError):
    """The machine or cluster has fewer CPUs or GPUs than the job asks for."""

    exit_code = 6


class TrialsFailedError(KddataError):
    """Trials of a sweep failed. The others have finished, and all are in its table."""

    exit_code = 7
