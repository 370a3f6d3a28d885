"""Sleepers: drivers of a store that are stopped at a step of their run, are taken for dead, and wake in the end.

    steps = chaos.count_steps(run, url)
    for at in range(len(steps)):
        assert wakes(run, url, [at, None], wanted) is None    # it wakes when another has finished the store
        assert wakes(run, url, [at, 7], wanted) is None       # it wakes while another, which sleeps at step 7, owns it

Each driver is a process, stopped by SIGSTOP, and says that it is on a machine of its own, so that it counts as dead
after a lease without a sign of life. Trade-off: leases are of a hundredth of a second and nobody gives signs of life
within a run, so that steps have fixed numbers; a driver that wakes is then not told by its own signs of life that it
was taken over, which is the harder case for the store.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from kddata import rng
from kddata.errors import StoreBusyError
from kddata.labelling import job
from kddata.store import lock
from kddata.store.steps import faults
from kddata.testing import chaos

_LEASE_S = 0.01


@contextmanager
def elsewhere(machine: str, *, lease_s: float, renew_s: float = lock.RENEW_S) -> Iterator[None]:
    """A block in which this process is on another machine, for the locks of stores, and labels with this lease."""
    here = {**lock._here(), "machine": machine, "host": machine}
    driving = functools.partial(lock.driving, lease_s=lease_s, renew_s=renew_s)
    with mock.patch.object(lock, "_here", return_value=here), mock.patch.object(job, "driving", driving):
        yield


class _Stop:
    """For `faults`: stops this process before it takes the step of a number."""

    def __init__(self, at: int | None) -> None:
        self._at, self._number = at, 0

    def __call__(self, target: Any) -> Any:
        return _Stopping(target, self)

    def count(self) -> None:
        number, self._number = self._number, self._number + 1
        if number == self._at:
            os.kill(os.getpid(), signal.SIGSTOP)


class _Stopping:
    def __init__(self, target: Any, stop: _Stop) -> None:
        self._target, self._stop = target, stop

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self._stop.count()
            return getattr(self._target, name)(*args, **kwargs)

        return step


@dataclass(frozen=True)
class _Driver:
    """A process that drives a store, and the pipe by which it tells how it ended."""

    pid: int
    tells: int

    def asleep(self) -> bool:
        """Whether it is stopped now, once it is stopped or at its end."""
        return os.WIFSTOPPED(os.waitpid(self.pid, os.WUNTRACED)[1])

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        os.waitpid(self.pid, 0)

    def end(self) -> str:
        """How it ended, when it has: `done`, `busy`, or the error that it met."""
        with os.fdopen(self.tells, "rb") as pipe:
            return pipe.read().decode()


def _start(run: Callable[[str], object], url: str, *, machine: str, stop_at: int | None) -> _Driver:
    tells, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        end = "no end"
        try:
            with elsewhere(machine, lease_s=_LEASE_S), faults(_Stop(stop_at)):
                run(url)
            end = "done"
        except StoreBusyError:
            end = "busy"
        except BaseException as error:
            end = repr(error)
        finally:
            os.write(tell, end.encode())
            os._exit(0)
    os.close(tell)
    return _Driver(pid, tells)


def wakes(
    run: Callable[[str], object],
    url: str,
    stops: Sequence[int | None],
    wanted: dict[str, bytes],
    *,
    ends: Collection[str] | None = ("done", "busy"),
) -> str | None:
    """None where drivers that sleep and wake end in the wanted files, after the same command again if none finished.

    Else what is wrong. The place must be empty before; it is emptied after, unless something is wrong.

    Args:
        stops: of each driver the step before which it is stopped; None for one that is not. They are started in turn,
            each when the one before is stopped or at its end, and woken in the same order, each to its end.
        ends: how a driver may end: `done`, `busy` (StoreBusyError), or an error as `repr` has it; None for anyhow.
    """
    drivers, found_ends = [], []
    for number, at in enumerate(stops):
        driver = _start(run, url, machine=f"machine {number}", stop_at=at)
        drivers.append((driver, driver.asleep()))
    for driver, asleep in drivers:
        if asleep:
            driver.wake()
        found_ends.append(driver.end())
    what = f"stopped at {list(stops)}, ended {found_ends}"
    if "done" not in found_ends:
        run(url)
    found = chaos.contents(url)
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        return f"{what}: {names} are not as in an undisturbed run"
    if ends is not None and not set(ends).issuperset(found_ends):
        return what
    chaos.empty(url)
    return None


def pairs(first: range, second: range, count: int, *, seed: int = 0) -> Iterator[list[int | None]]:
    """Plans of two drivers that are both stopped, at steps of these; the second sleeps while the first wakes."""
    random = rng.stream(seed, "sleepers", first.stop, second.stop)
    for _ in range(count):
        yield [int(random.integers(steps.start, steps.stop)) for steps in (first, second)]
