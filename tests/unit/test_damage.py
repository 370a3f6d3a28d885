"""Damage anywhere in a store is found and its file named: flips, cuts, missing, extra, swapped and stale files."""

from __future__ import annotations

import dataclasses
import uuid

import numpy as np
import pytest

from kddata import rng
from kddata.cards import Format
from kddata.errors import StoreDamagedError, StoreMissingError, StoreVersionError
from kddata.store import LabelStore, entries, verify_store
from kddata.store.formats import FORMATS
from kddata.store.naming import MANIFEST, twin
from kddata.store.storage import Storage
from kddata.testing import begin_small_store, made_up_rows, small_spec, small_store

FLIPS = 2_000


@pytest.fixture
def store() -> LabelStore:
    return small_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=["arrow", "tar", "arrow, in parts"])
def any_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LabelStore:
    format, _, parts = request.param.partition(", ")
    spec = dataclasses.replace(small_spec(), format=format)
    if parts:
        monkeypatch.setattr(entries, "INLINE_MOST", 0)
    return small_store(f"memory://{uuid.uuid4().hex}", spec=spec)


def put(storage: Storage, name: str, data: bytes) -> None:
    with storage.replacing(name) as out:
        out.write(data)


def files(problems: list) -> list[str]:
    return [problem.file for problem in problems]


@pytest.mark.parametrize(("format", "inline_most"), [*((format, 512) for format in FORMATS), ("arrow", 0)])
def test_two_thousand_flipped_bits_are_all_found_and_named(
    format: Format, inline_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places are even over files, then over bytes, so that small files are hit as often as large ones."""
    monkeypatch.setattr(entries, "INLINE_MOST", inline_most)
    spec = dataclasses.replace(small_spec(), format=format)
    store = small_store(f"memory://{uuid.uuid4().hex}", spec=spec)
    storage = store.storage
    names = list(storage.sizes())
    random, hit = rng.stream(0, "flips"), set()
    for _ in range(FLIPS):
        name = names[int(random.random() * len(names))]
        data = storage.read(name)
        flipped = bytearray(data)
        flipped[int(random.random() * len(data))] ^= 1 << int(random.random() * 8)
        put(storage, name, bytes(flipped))
        assert files(verify_store(store.url)) == [name]
        put(storage, name, data)
        hit.add(name)
    assert hit == set(names)
    assert verify_store(store.url) == []


def test_every_file_cut_missing_empty_or_longer(any_store: LabelStore) -> None:
    storage = any_store.storage
    for name in storage.sizes():
        data = storage.read(name)
        for other in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
            put(storage, name, other)
            assert files(verify_store(any_store.url)) == [name]
        storage.remove(name)
        assert [(problem.file, problem.reason) for problem in verify_store(any_store.url)] == [(name, "missing")]
        put(storage, name, data)


def test_any_two_files_swapped(any_store: LabelStore) -> None:
    storage = any_store.storage
    names = list(storage.sizes())
    for i, one in enumerate(names):
        for other in names[:i]:
            a, b = storage.read(one), storage.read(other)
            if a == b:
                assert twin(one) == other
                continue
            put(storage, one, b)
            put(storage, other, a)
            found = set(files(verify_store(any_store.url)))
            # A manifest of a store is sealed, wherever it lies: the other one of the pair then judges the rest.
            assert {one, other} <= found
            put(storage, one, a)
            put(storage, other, b)


def test_stale_files_of_another_labelling_of_the_same_images(store: LabelStore) -> None:
    stale = small_store(f"memory://{uuid.uuid4().hex}", spec=small_spec(k=4)).storage
    for name in store.storage.sizes():
        data = store.storage.read(name)
        put(store.storage, name, stale.read(name))
        assert name in files(verify_store(store.url)) or twin(name) in files(verify_store(store.url))
        put(store.storage, name, data)


def test_extra_files_of_any_name(any_store: LabelStore) -> None:
    for name in ("x", "labels/000077.arrow", ".tmp-0123456789abcdef", "receipts/000000.json", "labels/a/b"):
        any_store.storage.create(name, b"x")
        assert files(verify_store(any_store.url)) == [name]
        any_store.storage.remove(name)


def test_a_later_manifest_that_vanished_is_missed(store: LabelStore) -> None:
    extend_views(store)
    names = list(store.storage.sizes())
    assert "manifest-000002.json" in names
    for name in names:
        data = store.storage.read(name)
        store.storage.remove(name)
        assert ("missing", name) in [(problem.reason, problem.file) for problem in verify_store(store.url)]
        put(store.storage, name, data)
    for name in ("manifest-000002.json", "manifest-000001.json", "extension-000002.json"):
        if name in names:
            data = bytearray(store.storage.read(name))
            data[len(data) // 2] ^= 4
            put(store.storage, name, bytes(data))
            assert files(verify_store(store.url)) == [name]
            data[len(data) // 2] ^= 4
            put(store.storage, name, bytes(data))


def test_both_manifests_damaged_are_the_only_problems(store: LabelStore) -> None:
    for name in (MANIFEST, twin(MANIFEST)):
        put(store.storage, name, b"{}")
    store.storage.remove("store.json")
    assert files(verify_store(store.url)) == [twin(MANIFEST), MANIFEST] or set(files(verify_store(store.url))) == {
        MANIFEST,
        twin(MANIFEST),
    }


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = small_store(str(tmp_path / "store"))
    shard = tmp_path / "store/labels/000001.arrow"
    shard.unlink()
    shard.mkdir()
    assert files(verify_store(store.url)) == ["labels/000001.arrow"]


def test_a_manifest_that_vanished_is_no_reason_to_label_everything_again(store: LabelStore) -> None:
    store.storage.remove(MANIFEST)
    for call in (lambda: LabelStore.open(store.url), lambda: begin_small_store(store.url)):
        with pytest.raises(StoreDamagedError, match=r"no manifest-000001\.json.*`kddata repair` restores it"):
            call()


def test_a_commit_that_died_between_the_copy_and_the_manifest_is_an_unfinished_store(store: LabelStore) -> None:
    wanted = {name: store.storage.read(name) for name in store.storage.sizes()}
    other = begin_small_store(f"memory://{uuid.uuid4().hex}")
    for unit in other.units():
        other.write_unit(unit, [made_up_rows(other, unit)])
    put(other.storage, twin(MANIFEST), b"half of it")
    with pytest.raises(StoreMissingError, match="6 finished units and no manifest"):
        verify_store(other.url)
    begin_small_store(other.url).commit()
    assert {name: other.storage.read(name) for name in other.storage.sizes()} == wanted


def test_a_flip_in_the_format_version_is_damage_and_no_newer_version(store: LabelStore) -> None:
    data = store.storage.read(MANIFEST)
    put(store.storage, MANIFEST, data.replace(b'"format_version": 1', b'"format_version": 9'))
    assert store.storage.read(MANIFEST) != data
    with pytest.raises(StoreDamagedError) as caught:
        LabelStore.open(store.url)
    assert not isinstance(caught.value, StoreVersionError)


def extend_views(store: LabelStore, *, views_per_image: int = 5) -> LabelStore:
    """The store with more views of each image."""
    names = [shard.name for shard in store.images]
    arguments = {"spec": store.spec, "location": "made up", "kind": "tar", "names": names}
    extended = LabelStore.extend(store.url, views_per_image=views_per_image, **arguments)  # type: ignore[arg-type]
    if extended.manifest is None:
        extended.finish_index(names)
        for unit in extended.units():
            extended.write_unit(unit, [made_up_rows(extended, unit)])
        extended.commit()
    return extended


@pytest.mark.parametrize("inline_most", [512, 0])
def test_rows_of_an_extended_store_are_those_of_a_store_begun_larger(
    store: LabelStore, inline_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the manifest lists its units, and its next ones have them in parts."""
    monkeypatch.setattr(entries, "INLINE_MOST", inline_most)
    before = {name: store.storage.read(name) for name in store.storage.sizes()}
    extended = extend_views(store, views_per_image=5)
    assert (extended.manifest or {})["generation"] == 2
    assert {name: store.storage.read(name) for name in before} == before
    assert verify_store(store.url) == []
    opened = LabelStore.open(store.url)
    assert opened.num_rows == 9 * 5
    seen = [
        (row, view)
        for unit in opened.units()
        for row, view in zip(opened.read(unit.number).image_id, opened.read(unit.number).view.tolist(), strict=True)
    ]
    assert len(set(seen)) == len(seen) == 45
    assert np.array_equal(opened.rows_per_unit, [unit.num_views * (unit.stop - unit.start) for unit in opened.units()])
    assert extend_views(store, views_per_image=5).manifest == opened.manifest, "nothing more to do"
    third = extend_views(store, views_per_image=6)
    assert ((third.manifest or {})["generation"], third.num_rows, verify_store(store.url)) == (3, 54, [])
