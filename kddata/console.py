"""What a person at a console sees of a job: a bar, a line now and then where there is no terminal, and one clean
message for an error of theirs.

All but tables goes to stderr; stdout belongs to results. Trade-off: speeds and times left are means since the start
of this process, not of the last seconds, so that they are steady enough to plan with.

Exit codes: 0 done · 1 a bug or something unforeseen, with its traceback · 2 to 7 see `kddata.errors` ·
130 ctrl-C · 143 SIGTERM. After any of them the same command goes on where it stopped.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kddata.errors import KddataError

LINE_S = 10.0  # between two lines where there is no terminal
_ROUND_PER_S = 10.0  # from here on a speed is a whole number
_TABLE_COLUMNS = 120  # characters, where there is no terminal


class Bar:
    """Progress of a job: count, speed, time left and a note, as a bar on a terminal, else as a line now and then."""

    def __init__(self, what: str, *, unit: str, line_s: float = LINE_S) -> None:
        self._what, self._unit, self._line_s = what, unit, line_s
        self._first: int | None = None
        self._begin, self._last_line = time.monotonic(), float("-inf")
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=None, text="starting")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, *, speed: str | None = None, note: str = "") -> None:
        """Shows that so many of the total are done. The first call tells what was done before this process began."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, now
        per_s = (done - self._first) / max(now - self._begin, 1e-9)
        parts = [f"{done:,}/{total:,} {self._unit}"]
        if per_s > 0:
            number = f"{per_s:,.0f}" if per_s >= _ROUND_PER_S else f"{per_s:.2g}"  # a sweep has 0.12 epochs a second
            parts += [speed or f"{number} {self._unit}/s", f"{clock((total - done) / per_s)} left"]
        text = "  ".join([*parts, note]).rstrip()
        self._bar.update(self._task, completed=done, total=total, text=text)
        if not self._console.is_terminal and (now - self._last_line >= self._line_s or done == total):
            self._last_line = now
            self._console.print(f"{self._what}: {text}", soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(f"{self._what}: {text}", soft_wrap=True, markup=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of results on stdout."""
    drawn = Table(*columns)
    for row in rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _TABLE_COLUMNS).print(drawn)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def exit_code(job: Callable[[], None]) -> int:
    """Runs a job and returns the exit code of its process; an error for users becomes one message on stderr.

    SIGTERM (a spot node, `ray job stop`) ends the job like ctrl-C does. Anything unforeseen is raised on.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        job()
    except KddataError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        return 130
    except _TerminatedError:
        _say("terminated; the same command goes on from here")
        return 143
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class _TerminatedError(BaseException):
    """SIGTERM has arrived."""


def _terminate(number: int, frame: object) -> None:
    raise _TerminatedError


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
