"""Chaos: every step of a storage is counted, and at any of them the process dies, a write tears, an answer is lost.

    steps = count_steps(run, url)                        # what an undisturbed run does, by name
    for fault in faults_at(len(steps), MODES):
        assert survives(run, url, [fault], wanted) is None

`run(url)` is a command that may be given again: what it leaves at the end must be the same bytes, whatever struck it
before. Trade-off: a killed process takes its memory with it but not what the kernel was told, so losing power is not
modelled; what is synced, and in which order, has a test of its own.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch

from kddata import rng
from kddata.errors import KddataError
from kddata.labelling import LabellingJob, label_store
from kddata.store import entries, open_storage
from kddata.store.steps import faults
from kddata.testing import fake_teacher_args
from kddata.views import ViewPlan

Check: TypeAlias = Callable[[Callable[[str], object], str, Any, dict[str, bytes]], str | None]
Mode = Literal["kill before", "kill after", "tear and kill", "raise", "tear", "lose", "delay", "full"]
MODES: tuple[Mode, ...] = ("kill before", "kill after", "tear and kill", "raise", "tear", "lose", "delay")
_DELAY_S = 0.002
_GROWING = ("write", "flush", "sync", "make_folder", "pipe_file", "put_file")
_WRITES = ("write", "pipe_file", "put_file")


@dataclass(frozen=True)
class SmallRun:
    """A labelling run of several small units in this process, to be called with the URL of a store.

    Attributes:
        images: as `make_images` gives them.
        unit_images: images of a unit.
        parts: whether its manifest keeps units and image shards in parts.
    """

    images: str
    unit_images: int = 2
    parts: bool = False

    def __call__(self, url: str) -> None:
        with mock.patch.object(entries, "INLINE_MOST", 0 if self.parts else entries.INLINE_MOST):
            self._label(url)

    def _label(self, url: str) -> None:
        job = LabellingJob(
            images=self.images,
            store=url,
            teacher=fake_teacher_args(),
            plan=ViewPlan(),
            k=2,
            unit_images=self.unit_images,
            batch_size=self.unit_images,
        )
        label_store(job)


class Died(BaseException):
    """Stands for the death of a process where it cannot really die: no step is done any more after it."""


@dataclass(frozen=True)
class Fault:
    """What happens at the step of a number, counted from 0.

    kill before, kill after: the process ends, with the step not done or done. tear and kill: half a write is done.
    raise: an error instead of the step. tear: half a write is done, then an error. lose: done, but an error is raised.
    delay: late. full: the disk has no room; other steps than those that
    need some are done. Steps that write nothing cannot tear; they are not done.
    """

    at: int
    mode: Mode


def kill() -> None:
    """Ends this process as `kill -9` does: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die() -> None:
    """Raises Died."""
    raise Died


class Chaos:
    """Puts faults around the steps of storages; for `kddata.store.steps.faults`.

    Args:
        mode_of: the mode of a fault at the step of a number, or None.
        end: how a process dies: `kill` in a process of its own, else `die`.

    Attributes:
        steps: names of the steps so far, such as `link labels/000000.arrow`.
    """

    def __init__(
        self, mode_of: Callable[[int], Mode | None] = lambda _: None, *, end: Callable[[], None] = die
    ) -> None:
        self.steps: list[str] = []
        self._mode_of, self._end, self._lock, self._dead = mode_of, end, threading.Lock(), False

    def __call__(self, target: Any) -> Any:
        return _Faulty(target, self)

    def step(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Does a step of `target`, or what is planned for it."""
        with self._lock:
            if self._dead:
                raise Died
            number = len(self.steps)
            self.steps.append(f"{name} {_subject(args)}")
        mode = self._mode_of(number)
        if mode == "full" and name not in _GROWING:
            mode = None
        if mode == "delay":
            time.sleep(_DELAY_S)
        if mode in ("tear", "tear and kill") and name in _WRITES:
            _tear(target, name, args, kwargs)
        result = None
        try:
            if mode in (None, "delay", "kill after", "lose"):
                result = getattr(target, name)(*args, **kwargs)
        finally:  # a step may end in an error of its own, such as for a file that is not there
            if mode in ("kill before", "kill after", "tear and kill"):
                self._dead = True
                self._end()
        if mode == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if mode in ("raise", "tear", "lose"):
            raise OSError(errno.EIO, f"planned at step {number}: {self.steps[number]}")
        return result


class _Faulty:
    def __init__(self, target: Any, chaos: Chaos) -> None:
        self._target, self._chaos = target, chaos

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._chaos.step(self._target, name, args, kwargs)


def _tear(target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Half of a write. On a file system in memory a write cannot tear."""
    if name == "write":
        file, data = args
        target.write(file, memoryview(data)[: len(data) // 2])
        target.flush(file)
    elif getattr(target, "protocol", None) != "memory":
        path, data = args if name == "pipe_file" else (args[1], Path(args[0]).read_bytes())
        target.pipe_file(path, data[: len(data) // 2], **kwargs)


def _subject(args: tuple[Any, ...]) -> str:
    """The file that a step is about, without what is random in the name of a temporary one."""
    for arg in reversed(args):
        path = arg if isinstance(arg, (str, Path)) else getattr(arg, "name", None)
        if isinstance(path, (str, Path)) and "/" in str(path):
            parts = Path(path).parts[-2:]
            return "/".join(".tmp" if part.startswith(".tmp-") else part for part in parts)
    return ""


def contents(url: str) -> dict[str, bytes]:
    """Every file of a store, temporary ones and locks included."""
    storage = open_storage(url)
    return {name: storage.read(name) for name in storage.sizes()}


def count_steps(run: Callable[[str], object], url: str) -> list[str]:
    """The steps of an undisturbed run."""
    chaos = Chaos()
    with faults(chaos):
        run(url)
    return chaos.steps


def faults_at(num_steps: int, modes: Sequence[Mode], *, rotate: bool = False) -> Iterator[Fault]:
    """A fault of each mode at every step; with `rotate`, one at every step, the modes taken in turn."""
    for at in range(num_steps):
        for mode in [modes[at % len(modes)]] if rotate else modes:
            yield Fault(at, mode)


def now_and_then(rates: dict[Mode, float], *, seed: int = 0) -> Callable[[int], Mode | None]:
    """For `Chaos`: each mode strikes this share of all steps, by chance."""

    def mode_of(number: int) -> Mode | None:
        left = rng.unit_interval(seed, "now and then", number)
        for mode, rate in rates.items():
            left -= rate
            if left < 0:
                return mode
        return None

    return mode_of


def strike(run: Callable[[str], object], url: str, fault: Fault, *, fork: bool) -> str:
    """Runs a command with a fault in it, and says how it ended: `done`, `error` or `dead`.

    Args:
        fork: in a process of its own, which then really dies; else a death is an exception that ends all steps.
    """
    if not fork:
        try:
            with faults(Chaos({fault.at: fault.mode}.get)):
                run(url)
        except Died:
            return "dead"
        except (KddataError, OSError):
            return "error"
        return "done"
    pid = os.fork()
    if pid == 0:
        code = 70  # anything unforeseen
        try:
            with faults(Chaos({fault.at: fault.mode}.get, end=kill)):
                run(url)
            code = 0
        except (KddataError, OSError):
            code = 1
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "dead"
    return {0: "done", 1: "error"}.get(os.waitstatus_to_exitcode(status), f"status {status}")


def survives(
    run: Callable[[str], object], url: str, plan: Sequence[Fault], wanted: dict[str, bytes], *, fork: bool
) -> str | None:
    """None where a command, struck by each fault of a plan in turn and then given again, leaves the wanted files.

    Else what is wrong. The place must be empty before; it is emptied after, unless something is wrong.
    """
    ends = []
    for fault in plan:
        end = strike(run, url, fault, fork=fork)
        ends.append(end)
        if ("kill" in fault.mode) != (end == "dead") and len(plan) == 1:
            return f"{plan}: was to die, and ended {end}" if "kill" in fault.mode else f"{plan}: ended {end}"
    try:
        run(url)
    except (KddataError, OSError) as error:
        return f"{plan}, ended {ends}: then {error!r}"
    found = contents(url)
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        return f"{plan}, ended {ends}: {names} are not as in an undisturbed run"
    empty(url)
    return None


def survey(
    run: Callable[[str], object],
    root: str,
    plans: Sequence[Any],
    *,
    check: Check | None = None,
    processes: int = 2,
) -> list[str]:
    """What is wrong after each of many plans, below a folder of a local disk, in several processes.

    Args:
        run: picklable.
        plans: of real kills; or what `check` takes.
        check: picklable; gets run, URL, plan and wanted files, and says what is wrong. None for `survives`.
    """
    wanted = contents(undisturbed(run, f"{root}/undisturbed"))
    check = check or functools.partial(survives, fork=True)
    parts = [list(plans[i::processes]) for i in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        urls = [f"{root}/{i}" for i in range(processes)]
        found = pool.map(_survey, [run] * processes, urls, parts, [wanted] * processes, [check] * processes)
        return [complaint for part in found for complaint in part]


def undisturbed(run: Callable[[str], object], url: str) -> str:
    """The URL, after a run."""
    run(url)
    return url


def _survey(
    run: Callable[[str], object],
    url: str,
    plans: Sequence[Any],
    wanted: dict[str, bytes],
    check: Check,
) -> list[str]:
    logging.disable(logging.WARNING)  # of takeovers, one a kill
    torch.set_num_threads(1)  # threads do not survive a fork
    complaints = []
    for number, plan in enumerate(plans):
        complaint = check(run, f"{url}-{number}", plan, wanted)
        complaints += [] if complaint is None else [complaint]
    return complaints


def empty(url: str) -> None:
    """Removes every file of a store."""
    storage = open_storage(url)
    for name in storage.sizes():
        storage.remove(name)
    if "://" not in url:
        shutil.rmtree(url)


def pairs(num_steps: int, count: int, *, seed: int = 0) -> Iterator[list[Fault]]:
    """Plans of two kills each, spread over all steps: the second strikes the run that mends what the first did."""
    random = rng.stream(seed, "double kills", num_steps)
    kills: tuple[Mode, ...] = ("kill before", "kill after", "tear and kill")
    for _ in range(count):
        a, b = (int(x) for x in random.integers(0, num_steps, 2))
        modes = [kills[int(x)] for x in random.integers(0, len(kills), 2)]
        yield [Fault(a, modes[0]), Fault(b, modes[1])]
