"""A labelling driver is stopped for longer than its lease, and wakes: it harms nothing, and says who came after it.

On the machine of the others it counts as alive as long as its process is there, and nobody comes after it. What a
sleeper is, and how it counts as one on another machine, is in kddata.testing.sleepers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from kddata.errors import StoreBusyError
from kddata.labelling import LabellingJob, label_store
from kddata.labelling.job import alone_on
from kddata.store import driving, lock, open_storage
from kddata.store.sealing import seal
from kddata.teacher import TeacherArgs
from kddata.testing import chaos, make_images, sleepers
from kddata.testing.chaos import SmallRun
from kddata.views import ViewPlan

LEASE_S = 1.0
DRIVER = """
import contextlib, pickle, sys
from kddata.errors import KddataError
from kddata.labelling import label_store
from kddata.testing.sleepers import elsewhere

path, machine = sys.argv[1:]
job = pickle.load(open(path, "rb"))
with elsewhere(machine, lease_s=1.0, renew_s=0.1) if machine else contextlib.nullcontext():
    try:
        label_store(job)
    except KddataError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""
NETWORK = """
import time
from kddata.testing import FakeNetwork

class Slow(FakeNetwork):
    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)
"""


# -- at every step ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Three units of one image each."""
    return SmallRun(make_images(tmp_path_factory.mktemp("images"), num_images=3, shards=1), unit_images=1)


@pytest.fixture(scope="module")
def steps(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return chaos.count_steps(run, str(tmp_path_factory.mktemp("counted") / "store"))


@pytest.fixture
def first_write(steps: list[str]) -> int:
    """The step by which a driver that owns the store begins to write to it."""
    return steps.index("open store/.tmp", steps.index("open store/lock-000002.json"))


def test_a_driver_that_sleeps_while_it_takes_the_lock_wakes_as_any_other(
    run: SmallRun, steps: list[str], tmp_path: Path
) -> None:
    """Also where the lock that it wakes with is a dead one, below that of an owner who sleeps."""
    taking = range(steps.index("open store/lock-000001.json"), steps.index("open store/lock-000002.json") + 1)
    assert chaos.survey(run, str(tmp_path), [[at, None] for at in taking], check=sleepers.wakes) == []
    pairs = list(sleepers.pairs(taking, range(len(steps)), 20))
    check = functools.partial(sleepers.wakes, ends=None)
    assert chaos.survey(run, f"{tmp_path}/pairs", pairs, check=check) == []


def test_a_driver_that_wakes_when_another_has_finished_the_store_harms_nothing_and_says_so(
    run: SmallRun, steps: list[str], first_write: int, tmp_path: Path
) -> None:
    """Stopped at each kind of step: what it had half-written is gone, and so are its receipts."""
    kinds = {name: at for at, name in enumerate(steps) if at >= first_write}
    assert {name.split()[0] for name in kinds} >= {"open", "write", "flush", "sync", "close", "link", "replace"}
    plans = [[at, None] for at in kinds.values()]
    assert chaos.survey(run, str(tmp_path), plans, check=sleepers.wakes) == []


def test_drivers_that_sleep_and_wake_over_each_other_end_in_the_same_bytes(
    run: SmallRun, steps: list[str], first_write: int, tmp_path: Path
) -> None:
    """The second sleeps as the owner, while the first, which knows nothing of it, goes on to the end."""
    plans = list(sleepers.pairs(range(first_write, len(steps)), range(len(steps)), 40))
    assert chaos.survey(run, str(tmp_path), plans, check=functools.partial(sleepers.wakes, ends=None)) == []


# -- as people meet it ------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabellingJob:
    """Sixteen units, each of 0.2 s."""
    (tmp_path / "slow_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    teacher = TeacherArgs(arch="python:slow_network:Slow", num_classes=10, size_px=16, mean=(0, 0, 0), std=(1, 1, 1))
    images = make_images(tmp_path / "images", num_images=16)
    store = str(tmp_path / "labels")
    return LabellingJob(images=images, store=store, teacher=teacher, plan=ViewPlan(), k=3, unit_images=1, batch_size=1)


@pytest.fixture
def wanted(job: LabellingJob, tmp_path: Path) -> dict[str, bytes]:
    return chaos.contents(label_store(dataclasses.replace(job, store=str(tmp_path / "wanted"))).store.url)


@pytest.fixture
def start(job: LabellingJob, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a driver of the job in a process of its own, on a machine of this name; here, for no name."""
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    drivers = []

    def start(machine: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "job"), machine]
        drivers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return drivers[-1]

    yield start
    for driver in drivers:
        with driver:
            driver.kill()


def wait_for_receipts(store: str, count: int, driver: subprocess.Popen[str]) -> None:
    while len(list(Path(store).glob("receipts/*.json"))) < count:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)


def test_a_stopped_driver_of_this_machine_is_alive_and_goes_on_when_it_wakes(
    job: LabellingJob, wanted: dict[str, bytes], start: Callable[[str], subprocess.Popen[str]]
) -> None:
    driver = start("")
    wait_for_receipts(job.store, 2, driver)
    driver.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreBusyError, match=f"got process {driver.pid} on "), driving(job.store, lease_s=LEASE_S):
        pytest.fail("a stopped driver was taken over at once")
    time.sleep(2 * LEASE_S)
    before = chaos.contents(job.store)
    assert "lock-000001.json" in before
    with pytest.raises(StoreBusyError, match=f"got process {driver.pid} on "), driving(job.store, lease_s=LEASE_S):
        pytest.fail("a stopped driver was taken over after a lease")
    assert chaos.contents(job.store) == before
    driver.send_signal(signal.SIGCONT)
    assert driver.wait(60) == 0, driver.communicate()
    assert chaos.contents(job.store) == wanted


@pytest.mark.parametrize("finished", [False, True])
def test_a_driver_of_another_machine_that_wakes_after_a_lease_names_who_took_over(
    finished: bool, job: LabellingJob, wanted: dict[str, bytes], start: Callable[[str], subprocess.Popen[str]]
) -> None:
    """It wakes while the second is at work, whose units it must not hinder, or when that has finished."""
    first = start("first-host")
    wait_for_receipts(job.store, 2, first)
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.3)  # a unit that was being published may be whole by now
    there = len(list(Path(job.store).glob("receipts/*.json")))
    second = start("second-host")
    wait_for_receipts(job.store, there + 1, second)
    if finished:
        assert second.wait(60) == 0, second.communicate()
        assert chaos.contents(job.store) == wanted
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 1
    told = first.communicate()[1].strip().splitlines()[-1]
    assert told.startswith("StoreBusyError: a store has one driver; got "), told
    if finished:
        assert "another" in told
    else:
        assert f"process {second.pid} on second-host, which took over from this one" in told
    assert second.wait(60) == 0, second.communicate()
    assert chaos.contents(job.store) == wanted


def test_an_error_of_a_driver_that_was_taken_over_is_that_it_was(tmp_path: Path) -> None:
    url = str(tmp_path / "labels")
    owner = {**lock._here(), "machine": "far", "host": "far", "pid": 7}

    def drive() -> None:
        with driving(url, renew_s=0.02) as driver, alone_on(url, driver):
            open_storage(url).create("lock-000002.json", seal(owner))
            time.sleep(0.5)  # until its signs of life have told it
            raise FileNotFoundError("half-written")

    with pytest.raises(StoreBusyError, match="process 7 on far, which took over") as caught:
        drive()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_error_of_a_driver_that_is_alone_stays_what_it_is(run: SmallRun, tmp_path: Path) -> None:
    """Also on a store that was finished before, such as one that is tidied up or extended."""
    for url in (str(tmp_path / "empty"), chaos.undisturbed(run, str(tmp_path / "finished"))):
        with pytest.raises(FileNotFoundError, match="of its own"), driving(url) as driver, alone_on(url, driver):
            raise FileNotFoundError("of its own")


def test_what_a_driver_met_is_told_and_a_disk_that_fails_after_the_commit_is_no_other_driver(
    run: SmallRun, tmp_path: Path
) -> None:
    for error, told in (
        (
            FileNotFoundError("half-written"),
            pytest.raises(StoreBusyError, match=r"another .* finished .*: half-written"),
        ),
        (OSError("no disk"), pytest.raises(OSError, match=r"^no disk$")),
    ):
        url = str(tmp_path / type(error).__name__)
        with told, driving(url) as driver, alone_on(url, driver):
            driven(run, url)
            raise error


def driven(run: SmallRun, url: str) -> None:
    """Finishes the store of a driver under its nose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kddata.labelling.job.driving", lambda _: contextlib.nullcontext(mock.Mock()))
        run(url)
