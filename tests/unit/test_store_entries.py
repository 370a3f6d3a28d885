"""Units and image shards in parts beside the manifest: the same store to whoever reads it, and no more to open it."""

from __future__ import annotations

import dataclasses
import pickle
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import kddata
from kddata.errors import StoreBusyError, StoreDamagedError
from kddata.reader import order_of
from kddata.store import IndexedShard, LabelStore, Receipt, Unit, entries, open_storage, verify_store
from kddata.store.entries import Entries
from kddata.store.folding import fold
from kddata.store.manifest import newest, publish
from kddata.store.naming import MANIFEST, twin
from kddata.store.sealing import unseal
from kddata.store.steps import faults
from kddata.testing import begin_small_store, made_up_rows, small_store
from kddata.testing.chaos import Chaos

UNITS, IMAGES = "units-000001.arrow", "images-000001.arrow"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "INLINE_MOST", 0)


def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_a_store_is_the_same_whether_its_units_are_listed_or_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = small_store(memory())
    monkeypatch.setattr(entries, "INLINE_MOST", 5)
    parted = small_store(memory())
    assert set(parted.storage.sizes()) - set(listed.storage.sizes()) == {UNITS, IMAGES, twin(UNITS), twin(IMAGES)}
    assert not isinstance(listed.manifest["units"], Entries)
    assert isinstance(parted.manifest["units"], Entries)
    for key in ("units", "image_shards"):
        assert list(parted.manifest[key]) == list(listed.manifest[key])
    assert list(parted.units()) == list(listed.units())
    assert parted.units()[1:3] == list(listed.units())[1:3]
    assert parted.units()[-1] == listed.units()[-1]
    assert list(parted.images) == list(listed.images)
    assert np.array_equal(parted.rows_per_unit, listed.rows_per_unit)
    assert np.array_equal(parted.views_per_unit, listed.views_per_unit)
    assert np.array_equal(order_of(parted, 1).rows(0), order_of(listed, 1).rows(0))
    assert {**parted.info(), "url": ""} == {**listed.info(), "url": ""}
    with pytest.raises(IndexError):
        parted.units()[len(listed.units())]


def test_up_to_512_units_one_file_says_all() -> None:
    assert entries.INLINE_MOST == 512
    assert unseal(small_store(memory()).storage.read(MANIFEST), where="")["format_version"] == 1


def test_opening_reads_no_part_and_pickles_carry_none(parts: None, tmp_path: Path) -> None:
    small_store(str(tmp_path / "labels"))
    seen = Chaos()
    with faults(seen):
        store = LabelStore.open(str(tmp_path / "labels"))
        small = len(pickle.dumps(store))
        assert not [step for step in seen.steps if ".arrow" in step]
        assert store.num_rows == store.rows_per_unit.sum()
        assert [step for step in seen.steps if UNITS in step]
    assert len(pickle.dumps(store)) == small
    assert list(pickle.loads(pickle.dumps(store)).units()) == list(store.units())


def test_stock_pyarrow_reads_the_units(parts: None, tmp_path: Path) -> None:
    store = small_store(str(tmp_path / "labels"))
    table = pa.ipc.open_file(tmp_path / "labels" / UNITS).read_all()
    assert table["rows"].to_pylist() == store.rows_per_unit.tolist()
    assert table["sha256"][0].as_py().hex() == store.manifest["units"][0]["sha256"]


def test_a_damaged_part_is_not_used_and_its_copy_judges(parts: None) -> None:
    store = small_store(memory())
    storage = store.storage
    whole = storage.read(UNITS)
    with storage.replacing(UNITS) as out:
        out.write(whole[:-1] + b"?")
    with pytest.raises(StoreDamagedError, match=f"bytes that were written.*{UNITS}.*verify"):
        LabelStore.open(store.url).read(0)
    storage.remove("labels/000002.arrow")
    assert [problem.file for problem in verify_store(store.url)] == ["labels/000002.arrow", UNITS]
    storage.remove(twin(UNITS))
    found = verify_store(store.url)
    assert [(problem.file, problem.reason[:7]) for problem in found] == [(UNITS, "its byt"), (twin(UNITS), "missing")]


def test_a_listed_store_is_extended_in_parts_and_further(monkeypatch: pytest.MonkeyPatch) -> None:
    def views(store: LabelStore, count: int) -> LabelStore:
        larger = LabelStore.extend(
            store.url,
            spec=store.spec,
            location=store.location,
            kind=store.kind,
            views_per_image=count,
            names=[shard.name for shard in store.images],
        )
        larger.finish_index([shard.name for shard in store.images])
        for unit in larger.units():
            larger.write_unit(unit, [made_up_rows(larger, unit)])
        larger.commit()
        return larger

    store = small_store(memory())
    monkeypatch.setattr(entries, "INLINE_MOST", 0)
    second = views(store, 5)
    third = views(second, 6)
    names = [part.file for part in third.manifest["units"].parts]
    assert names == ["units-000002.arrow", "units-000003.arrow"]
    assert [part.file for part in third.manifest["image_shards"].parts] == ["images-000002.arrow"]
    assert [unit.number for unit in third.units()] == list(range(len(third.units())))
    assert third.num_rows == 9 * 6
    assert verify_store(store.url) == []


def test_a_driver_that_slept_through_the_commit_writes_no_part(parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    late = begin_small_store(memory())
    for unit in late.units():
        late.write_unit(unit, [made_up_rows(late, unit)])
    other = begin_small_store(late.url)
    real = entries._write

    def slow(*args: object) -> int:
        monkeypatch.setattr(entries, "_write", real)
        other.commit()
        before.update({name: other.storage.read(name) for name in other.storage.sizes()})
        return real(*args)  # type: ignore[arg-type]

    before: dict[str, bytes] = {}
    monkeypatch.setattr(entries, "_write", slow)
    with pytest.raises(StoreBusyError):
        late.commit()
    assert {name: late.storage.read(name) for name in late.storage.sizes()} == before
    assert begin_small_store(late.url).manifest is not None


def receipts(units: list[Unit] | range, fingerprint: str) -> Iterator[Receipt]:
    for number in range(len(units)):
        yield Receipt(
            unit=number,
            fingerprint=fingerprint,
            rows=12,
            bytes=100,
            sha256=f"{number:064x}",
            images=4,
            bad=(),
            correct=1,
            labelled=4,
            entropy_sum=1.0,
            tail_sum=0.5,
        )


def test_memory_of_a_commit_does_not_grow_with_the_units() -> None:
    """100,000 receipts held are 36 MB; passing by, they take 10, of which the part itself, in memory here, is 6."""
    store = small_store(memory())
    shards = [IndexedShard(name="a.tar", size_bytes=None, num_images=400_000, sha256="0" * 64)]
    units = kddata.store.PlannedUnits([400_000], views=[(0, 3)], unit_images=4, unit_views=None)
    storage = open_storage(memory())
    tracemalloc.start()
    done = receipts(range(len(units)), store.spec.fingerprint)
    content = fold(storage, store._head, shards, units, done, files={})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    publish(storage, content)
    opened = LabelStore.open(storage.url)
    assert (len(opened.units()), opened.num_rows) == (100_000, 1_200_000)
    assert opened.units()[77_777] == units[77_777]
    assert opened.manifest["units"][77_777]["sha256"] == f"{77_777:064x}"
    assert peak < 20e6
    assert len(newest(storage)[1]) < 4_000  # type: ignore[index]


def test_parts_are_the_same_bytes_from_the_same_receipts(parts: None) -> None:
    first, second = small_store(memory()), small_store(memory())
    assert first.manifest == second.manifest
    assert hash(first.manifest["units"]) == hash(second.manifest["units"])
    other = small_store(memory(), spec=dataclasses.replace(first.spec, codec="compact"))
    assert first.manifest["units"] != other.manifest["units"]
