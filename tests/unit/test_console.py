"""What a person at a console sees: exit codes, one message for an error of theirs, progress without a terminal."""

from __future__ import annotations

import os
import signal

import pytest

from kddata.console import Bar, clock, exit_code
from kddata.errors import ConfigError, KddataError, ResourceError, SourceError, StoreDamagedError, TeacherError


def all_errors(kind: type[KddataError]) -> list[type[KddataError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in all_errors(child))]


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ConfigError, 2), (SourceError, 3), (TeacherError, 4), (StoreDamagedError, 5), (ResourceError, 6)],
)
def test_an_error_of_the_user_is_one_message_and_its_code(
    kind: type[KddataError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        raise kind("a rule", actual=3, where="file", fix="do this")

    assert exit_code(job) == code
    captured = capsys.readouterr()
    assert captured.err == "error: a rule; got 3 (in file). Next: do this.\n"
    assert captured.out == ""


def test_every_error_has_a_documented_code() -> None:
    from kddata.cli import EXIT_CODES

    codes = {kind.exit_code for kind in all_errors(KddataError)} | {0, 130, 143}
    assert all(f"{code} " in EXIT_CODES for code in codes)
    assert {kind.exit_code for kind in all_errors(KddataError)[1:]} == {2, 3, 4, 5, 6, 7}


def test_done_is_0_and_the_unforeseen_is_raised_on() -> None:
    def job() -> None:
        raise KeyError("a bug")

    assert exit_code(lambda: None) == 0
    with pytest.raises(KeyError, match="a bug"):
        exit_code(job)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_end_a_job_cleanly(number: int, code: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def job() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    assert exit_code(job) == code
    assert cleaned == [True]
    assert word in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("labelling", unit="views", line_s=1000) as bar:
        for done in range(0, 101, 10):
            bar.update(done, 100, note="2 bad images")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "the first and the last"
    assert lines[0] == "labelling: 0/100 views  2 bad images"
    assert lines[1].startswith("labelling: 100/100 views")
    assert "views/s" in lines[1]


def test_what_was_done_before_does_not_count_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("labelling", unit="views", line_s=0) as bar:
        bar.update(90, 100)
        bar.update(90, 100)
    assert "views/s" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("after_s", "text"),
    [
        (0.1, "8/10 epochs  80 epochs/s"),
        (2.0, "8/10 epochs  4 epochs/s"),
        (60, "8/10 epochs  0.13 epochs/s  0:15 left"),
    ],
)
def test_slow_things_have_a_speed_too(
    after_s: float, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("kddata.console.time.monotonic", lambda: now)
    with Bar("sweep", unit="epochs", line_s=0) as bar:
        bar.update(0, 10)
        now = after_s
        bar.update(8, 10)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text
