"""A labelling run is struck at every single step by which it touches its store; given again, it ends in the same bytes.

What chaos does and counts is in kddata.testing.chaos; longer forms of these tests are in benchmarks/chaos.py.
"""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kddata.errors import StoreError
from kddata.store import LabelStore, manifest, naming, open_storage, s3, verify_store
from kddata.store.disk import LocalStorage
from kddata.store.folding import fold
from kddata.store.steps import HashingWriter, faults
from kddata.testing import chaos, make_images
from kddata.testing.chaos import MODES, Chaos, SmallRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Three units of one image each."""
    return SmallRun(make_images(tmp_path_factory.mktemp("images"), num_images=3, shards=1), unit_images=1)


@pytest.fixture
def bucket(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket, and retries without long pauses."""
    monkeypatch.setattr(s3, "PAUSE_S", 0.001)
    return s3_bucket


def complaints(run: Callable[[str], object], root: str, modes: tuple[chaos.Mode, ...], **how: bool) -> Iterator[str]:
    """What is wrong after a fault at each step, without processes that die: there, death is an exception."""
    wanted = chaos.contents(chaos.undisturbed(run, f"{root}/wanted"))
    steps = chaos.count_steps(run, f"{root}/counted")
    for fault in chaos.faults_at(len(steps), modes, **how):
        complaint = chaos.survives(run, f"{root}/{fault.at}-{fault.mode}", [fault], wanted, fork=False)
        if complaint is not None:
            yield f"{steps[fault.at]}: {complaint}"


@pytest.mark.timeout(600)
def test_killed_at_every_step_on_a_disk(run: SmallRun, tmp_path: Path) -> None:
    """Of a run that does all that any does: its manifest has parts."""
    run = dataclasses.replace(run, parts=True)
    steps = chaos.count_steps(run, str(tmp_path / "counted"))
    assert len(steps) >= 300
    assert {step.split()[0] for step in steps} >= {"open", "write", "flush", "sync", "close", "link", "replace"}
    plans = [[fault] for fault in chaos.faults_at(len(steps), MODES, rotate=True)]
    doubles = list(chaos.pairs(len(steps), 20))
    assert chaos.survey(run, str(tmp_path), plans + doubles) == []


def test_struck_at_every_step_in_memory(run: SmallRun) -> None:
    modes: tuple[chaos.Mode, ...] = ("kill before", "kill after", "raise", "lose")
    assert list(complaints(run, f"memory://{uuid.uuid4().hex}", modes)) == []


@pytest.mark.timeout(600)
def test_struck_at_every_step_on_s3(bucket: str, tmp_path: Path) -> None:
    four = SmallRun(make_images(tmp_path, num_images=4, shards=1), unit_images=1)
    modes: tuple[chaos.Mode, ...] = ("kill before", "lose", "kill after", "tear", "raise")
    assert list(complaints(four, f"{bucket}/{uuid.uuid4().hex}", modes, rotate=True)) == []


def test_a_network_that_fails_now_and_then_costs_time_alone(bucket: str, run: SmallRun) -> None:
    root = f"{bucket}/{uuid.uuid4().hex}"
    wanted = chaos.contents(chaos.undisturbed(run, f"memory://{root[5:]}"))
    for seed in range(3):
        storm = Chaos(chaos.now_and_then({"raise": 0.10, "lose": 0.05, "tear": 0.01}, seed=seed))
        with faults(storm):
            run(f"{root}/{seed}")
        assert len(storm.steps) >= 60
        assert chaos.contents(f"{root}/{seed}") == wanted, "the same bytes, and no other file"
        assert verify_store(f"{root}/{seed}") == []


def test_a_network_that_is_down_ends_in_one_clear_error(bucket: str, run: SmallRun) -> None:
    url = f"{bucket}/{uuid.uuid4().hex}"
    down = Chaos(lambda number: "raise" if number >= 20 else None)
    with (
        pytest.raises(StoreError, match=r"answers within 6 tries; got .*finished units are kept") as caught,
        faults(down),
    ):
        run(url)
    assert url in str(caught.value)
    run(url)
    assert chaos.contents(url) == chaos.contents(chaos.undisturbed(run, f"memory://{url[5:]}"))


def test_a_disk_that_fills_up_is_said_and_gone_on_from(run: SmallRun, tmp_path: Path) -> None:
    wanted = chaos.contents(chaos.undisturbed(run, str(tmp_path / "wanted")))
    steps = chaos.count_steps(run, str(tmp_path / "counted"))
    places = [at for at, step in enumerate(steps) if step.split()[0] in ("write", "flush", "sync", "make_folder")]
    for at in places[::7]:
        url = str(tmp_path / f"full-{at}")
        with (
            pytest.raises(StoreError, match=r"disk has room; got No space left.*free some space.*units are kept"),
            faults(Chaos(lambda number, at=at: "full" if number >= at else None)),  # type: ignore[misc]
        ):
            run(url)
        assert not [name for name in chaos.contents(url) if ".tmp" in name], "no half a file is left"
        run(url)
        assert chaos.contents(url) == wanted


def test_a_disk_that_is_truly_full(run: SmallRun, tmp_path: Path) -> None:
    """No file may grow past 3 kB, which the records fit in and label shards do not."""
    code = "import resource, sys; from kddata.testing.chaos import SmallRun; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); {run!r}(sys.argv[1])"
    url = str(tmp_path / "labels")
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True)
    assert "StoreError: a store's disk has room; got File too large" in done.stderr
    assert "store.json" in chaos.contents(url)
    assert not [name for name in chaos.contents(url) if ".tmp" in name or name.startswith("lock")]
    run(url)
    assert chaos.contents(url) == chaos.contents(chaos.undisturbed(run, str(tmp_path / "wanted")))


# -- the harness finds planted bugs -----------------------------------------------------------------------------------


def receipt_before_shard(patch: pytest.MonkeyPatch) -> None:
    real = LabelStore._write_labels

    def write(self: LabelStore, unit: Any, rows: Any, *rest: Any, **options: Any) -> Any:
        held = list(rows)
        with patch.context() as aside:
            aside.setattr(self, "storage", open_storage(f"memory://{uuid.uuid4().hex}"))
            receipt = real(self, unit, held, *rest, **options)
        self.storage.create(naming.receipt_name(unit.number), manifest.receipt_bytes(receipt))
        return real(self, unit, held, *rest, **options)

    patch.setattr(LabelStore, "_write_labels", write)
    patch.setattr(LabelStore, "_require_unfinished", lambda self, unit: None)  # it would notice


def manifest_before_the_last_receipt(patch: pytest.MonkeyPatch) -> None:
    """The manifest is made of receipts in memory, before the last shard has its place."""
    real = LabelStore._write_labels

    def write(self: LabelStore, unit: Any, rows: Any, *rest: Any, **options: Any) -> Any:
        held = list(rows)
        if unit == self.units()[-1]:
            with patch.context() as aside:
                aside.setattr(self, "storage", open_storage(f"memory://{uuid.uuid4().hex}"))
                receipts = {unit.number: real(self, unit, held, *rest, **options)}
            receipts |= {receipt.unit: receipt for receipt in self.receipts()}
            units = self.units()
            done = [receipts[one.number] for one in units]
            manifest.publish(self.storage, fold(self.storage, self._head, self.images, units, done, files={}))
        return real(self, unit, held, *rest, **options)

    patch.setattr(LabelStore, "_write_labels", write)
    patch.setattr(LabelStore, "_require_unfinished", lambda self, unit: None)  # it would notice


def published_in_place(patch: pytest.MonkeyPatch) -> None:
    real = LocalStorage.create

    def create(self: LocalStorage, name: str, data: bytes) -> bool:
        path = self._root / name
        if name.startswith("lock"):  # a torn lock is nobody's until a lease has passed
            return real(self, name, data)
        self._make_folder(path.parent)
        if path.exists():
            return False
        with self._disk.open(path, "wb") as file:
            self._disk.write(file, data)
        return True

    patch.setattr(LocalStorage, "create", create)


def finished_is_taken_for_tidy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LabelStore, "leftovers", lambda self: [])


@pytest.mark.parametrize(
    "plant", [receipt_before_shard, manifest_before_the_last_receipt, published_in_place, finished_is_taken_for_tidy]
)
def test_planted_bugs_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    root = str(tmp_path) if plant is published_in_place else f"memory://{uuid.uuid4().hex}"
    assert next(complaints(run, root, ("kill after",)), None) is not None


def test_chaos_does_what_it_says(tmp_path: Path) -> None:
    def write(url: str) -> None:
        with open_storage(url).replacing("a") as out:
            out.write(b"0123456789")

    steps = chaos.count_steps(write, str(tmp_path / "counted"))
    assert [step.split()[0] for step in steps[-7:]] == [
        "write",
        "flush",
        "sync",
        "close",
        "replace",
        "sync_folder",
        "remove",
    ]
    at = len(steps) - 7
    for mode, left in (("tear", []), ("lose", []), ("tear and kill", [b"01234"]), ("delay", [b"0123456789"])):
        url = str(tmp_path / mode)
        assert chaos.strike(write, url, chaos.Fault(at, mode), fork=True) == {
            "delay": "done",
            "tear and kill": "dead",
        }.get(  # type: ignore[arg-type]
            mode, "error"
        )
        assert list(chaos.contents(url).values()) == left
    assert chaos.strike(write, str(tmp_path / "x"), chaos.Fault(at + 4, "lose"), fork=False) == "error"
    assert chaos.contents(str(tmp_path / "x")) == {"a": b"0123456789"}
    assert io.RawIOBase in HashingWriter.__mro__
