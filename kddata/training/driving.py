"""Driving: of several processes that would train one run, one does, and the others are told who does.

The lock is that of a store (`kddata.store.lock`), in the run's folder: whoever starts the ranks holds it, and it goes
with them. It is no part of what a run leaves. Trade-off: as for a store it is a courtesy. Ranks of a driver that was
killed may take a step more before they end, which is why files of a run appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from kddata.errors import StoreBusyError, StoreError
from kddata.store import driving
from kddata.training.run import Run


@contextmanager
def driving_run(url: str, *, what: str = "run") -> Iterator[Callable[[], None]]:
    """A block in which this process is the one driver of a run, whose folder need not exist yet.

    It gives a function that raises where another has taken over, as this process gave no sign of life for a lease.

    Raises StoreBusyError, naming the owner, where another driver lives; see `kddata.store.driving`.
    """
    with ExitStack() as stack:
        with _told_of(what):
            driver = stack.enter_context(driving(url))

        def check() -> None:
            with _told_of(what):
                driver.check()

        yield check


def tidy_up(url: str) -> None:
    """Removes what a process that was killed at its very end left in the folder of a finished run, where it can be."""
    run = Run(url)
    if run.leftovers():
        with suppress(OSError, StoreError), driving_run(url):  # the result is there; that is what counts
            run.tidy()


@contextmanager
def _told_of(what: str) -> Iterator[None]:
    """A block in which a store that is busy is said to be what it is."""
    try:
        yield
    except StoreBusyError as error:
        raise StoreBusyError(
            f"a {what} has one driver",
            actual=error.actual,
            where=error.where,
            fix="nothing was changed here; let it finish, or stop it and run the same command again",
        ) from None
