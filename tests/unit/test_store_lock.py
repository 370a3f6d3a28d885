"""Two drivers on one store: one works, the other is told who; a dead one blocks nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kddata.errors import StoreBusyError, StoreMissingError
from kddata.store import Driver, LabelStore, driving, lock, open_storage, require_free
from kddata.store.sealing import seal
from kddata.testing import begin_small_store, chaos, made_up_rows, make_images, small_store
from kddata.testing.chaos import SmallRun

LOCK = "lock-000001.json"


def owner(**changes: object) -> bytes:
    return seal({**lock._here(), "token": "0", "beat": 0, **changes})


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    return str(tmp_path / "labels") if request.param == "local" else f"memory://lock/{tmp_path.name}"


def test_the_second_driver_is_told_who_is_the_first_and_the_lock_goes_with_it(url: str) -> None:
    with driving(url):
        for call in (lambda: driving(url).__enter__(), lambda: require_free(url)):
            with pytest.raises(StoreBusyError, match=rf"one driver; got process {os.getpid()} on .*let it finish, or"):
                call()
        assert list(open_storage(url).sizes()) == [LOCK]
    assert open_storage(url).sizes() == {}
    require_free(url)
    with pytest.raises(RuntimeError, match="mine"), driving(url):
        raise RuntimeError("mine")
    assert open_storage(url).sizes() == {}


def test_of_many_drivers_at_once_one_wins(url: str) -> None:
    won, told, barrier, end = [], [], threading.Barrier(8), threading.Event()

    def drive(number: int) -> None:
        barrier.wait()
        try:
            with driving(url):
                won.append(number)
                end.wait(30)
        except StoreBusyError as error:
            told.append(str(error))
        if len(told) == 7:
            end.set()

    threads = [threading.Thread(target=drive, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(told)) == (1, 7)
    assert open_storage(url).sizes() == {}


def test_a_dead_owner_on_this_machine_is_taken_over_at_once(url: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in (
        {"pid": gone.pid},
        {"pid": os.getppid(), "started": "another process of that id"},
        {"pid": os.getpid()},
    ):
        open_storage(url).create(LOCK, owner(**changes))
        begin = time.monotonic()
        with driving(url):
            assert time.monotonic() - begin < 5
            assert set(open_storage(url).sizes()) == {LOCK, "lock-000002.json"}
        assert open_storage(url).sizes() == {}


def test_an_owner_elsewhere_is_dead_when_it_shows_no_life_for_a_lease(url: str) -> None:
    storage = open_storage(url)
    storage.create(LOCK, owner(machine="another", host="far", pid=7))
    require_free(url)  # not seen from here
    with driving(url, lease_s=0.3):
        assert "lock-000002.json" in storage.sizes()
    assert storage.sizes() == {}

    storage.create(LOCK, owner(machine="another", host="far", pid=7))
    stop = threading.Event()

    def live() -> None:
        beat = 0
        while not stop.wait(0.05):
            beat += 1
            with storage.replacing(LOCK) as out:
                out.write(owner(machine="another", host="far", pid=7, beat=beat))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(StoreBusyError, match=r"got process 7 on far"), driving(url, lease_s=20):
            pytest.fail("a live owner was taken over")
    finally:
        stop.set()
        thread.join()


def check_for_a_while(driver: Driver) -> None:
    for _ in range(400):
        driver.check()
        time.sleep(0.02)


def test_a_driver_gives_signs_of_life_and_notices_that_it_was_taken_over(url: str) -> None:
    storage = open_storage(url)
    with driving(url, renew_s=0.05) as driver:
        first = storage.read(LOCK)
        for _ in range(400):
            if storage.read(LOCK) != first:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the lock was not renewed")
        driver.check()
        storage.create("lock-000002.json", owner(machine="another", host="far", pid=7))
        with pytest.raises(StoreBusyError, match="process 7 on far, which took over from this one"):
            check_for_a_while(driver)
    assert "lock-000002.json" in storage.sizes(), "the lock of the new owner stays"


def test_a_second_label_run_is_told_and_harms_nothing(tmp_path: Path) -> None:
    run = SmallRun(make_images(tmp_path / "images", num_images=3, shards=1))
    wanted = chaos.contents(chaos.undisturbed(run, str(tmp_path / "wanted")))
    url = str(tmp_path / "labels")
    with driving(url):
        with pytest.raises(StoreBusyError, match=str(os.getpid())):
            run(url)
        with pytest.raises(StoreMissingError):
            LabelStore.open(url)
    run(url)
    assert chaos.contents(url) == wanted
    before = {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")}
    run(url)
    assert {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")} == before, "a finished store is not touched"


def test_a_writer_that_wakes_after_its_unit_was_reissued_harms_nothing(url: str) -> None:
    """It slept while its rows were made: its unit was done by another, then the whole store."""
    wanted = chaos.contents(small_store(f"{url}-wanted").url)
    store = begin_small_store(url)
    first, second = store.units()[:2]

    def asleep_while(others: list[int], unit):  # type: ignore[no-untyped-def]
        rows = made_up_rows(store, unit)
        yield rows.take(slice(0, 1))
        again = begin_small_store(url)
        for number in others:
            again.write_unit(again.units()[number], [made_up_rows(again, again.units()[number])])
        if len(others) > 1:
            again.commit()
        yield rows.take(slice(1, None))

    receipt = store.write_unit(first, asleep_while([0], first))
    assert receipt == next(begin_small_store(url).receipts())
    with pytest.raises(StoreBusyError, match="another driver has finished it"):
        store.write_unit(second, asleep_while(list(range(1, len(store.units()))), second))
    assert chaos.contents(url) == wanted
    assert LabelStore.open(url).verify() == []
