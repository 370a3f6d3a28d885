"""The reader: rows in order, each with the bytes of its own image, and nothing that has changed."""

from __future__ import annotations

import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kddata.errors import SourceError, StoreDamagedError
from kddata.images import image_hash, open_source
from kddata.order import Order
from kddata.reader import Reader, open_images, order_of
from kddata.store import LabelStore
from kddata.testing import make_store


def reader_of(store: LabelStore, *, seed: int = 0, window_rows: int = 1000, images: str | None = None) -> Reader:
    rows = Order(rows_per_unit=store.rows_per_unit, seed=seed, window_rows=window_rows)
    return Reader(store, open_images(store, images), rows)


def bytes_by_id(location: str | tuple[str, ...]) -> dict[str, bytes]:
    source = open_source(location)
    found = {}
    for name in source.shard_names():
        _, refs = source.scan(name)
        found |= {ref.image_id: data for ref, data in source.stream(name, refs)}
    return found


@pytest.mark.parametrize("form", ["tar", "folder", "parquet"])
def test_each_row_comes_with_the_bytes_of_its_image_in_the_order(tmp_path, form):
    store = make_store(tmp_path, form=form, num_images=10, views_per_image=3, unit_images=3)
    order = Order(rows_per_unit=store.rows_per_unit, seed=5, window_rows=1000)
    rows, images, *_ = Reader(store, open_images(store), order).read(2, 0, store.num_rows)
    kept = bytes_by_id(store.location)
    assert [kept[image_id] for image_id in rows.image_id] == images
    assert [image_hash(data) for data in images] == rows.image_hash.tolist()
    units = [store.read(unit) for unit in range(len(store.rows_per_unit))]
    wanted = [(units[unit].image_id[row], int(units[unit].view[row])) for unit, row in order.rows(2)]
    assert list(zip(rows.image_id, rows.view.tolist(), strict=True)) == wanted
    assert len(set(wanted)) == 30


def test_reading_over_window_borders_is_the_same_as_row_by_row(tmp_path):
    store = make_store(tmp_path, num_images=9, views_per_image=3, unit_images=2)
    whole, *_ = reader_of(store, window_rows=4).read(0, 0, 27)
    one_by_one = reader_of(store, window_rows=4)
    for position in reversed(range(27)):
        row, *_ = one_by_one.read(0, position, position + 1)
        assert row.image_id == whole.image_id[position : position + 1]
        assert np.array_equal(row.box, whole.box[position : position + 1])


def test_only_one_window_of_labels_is_held_and_loaded_once(tmp_path, monkeypatch):
    store = make_store(tmp_path, num_images=8, views_per_image=2, unit_images=2)
    reads = []
    read = LabelStore.read
    monkeypatch.setattr(LabelStore, "read", lambda self, unit, **more: reads.append(unit) or read(self, unit, **more))
    reader = reader_of(store, window_rows=8)  # two windows of two units each
    for position in range(0, 16, 2):
        reader.read(0, position, position + 2)
    assert sorted(reads) == [0, 1, 2, 3]


def test_memory_depends_on_the_window_and_not_on_how_many_there_are(tmp_path):
    peaks = []
    for views in (256, 1024):
        store = make_store(tmp_path / str(views), num_images=16, views_per_image=views, unit_images=8, unit_views=64)
        reader = reader_of(store, window_rows=1024)
        reader.rows(0, np.arange(64))
        tracemalloc.start()
        for start in range(0, store.num_rows, 64):
            reader.rows(1, np.arange(start, start + 64))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], "4 windows and 16, which would be four times as much"


def test_images_may_move_under_their_names(tmp_path):
    store = make_store(tmp_path / "first", num_images=6)
    moved = tmp_path / "moved"
    moved.mkdir()
    for tar in Path(store.location).parent.glob("*.tar"):
        shutil.move(tar, moved)
    reader_of(store, images=str(moved)).read(0, 0, store.num_rows)
    (moved / "00001.tar").unlink()
    with pytest.raises(SourceError, match=r"hold all 2 image shards of the store; got 1 missing: 00001.tar .*moved"):
        open_images(store, str(moved))


def test_a_changed_image_is_refused_before_its_label_is_used(tmp_path):
    store = make_store(tmp_path, form="folder", num_images=6)
    image = sorted(Path(store.location).rglob("*.jpg"))[0]
    data = bytearray(image.read_bytes())
    data[-3] ^= 1  # still a JPEG of the same length
    image.write_bytes(data)
    with pytest.raises(SourceError, match=rf"the one that was labelled; got other bytes under .*{image.stem}") as error:
        reader_of(store).read(0, 0, store.num_rows)
    assert "label these into a new store" in str(error.value)


def test_a_damaged_label_file_is_named(tmp_path):
    store = make_store(tmp_path, num_images=6)
    path = Path(store.url) / "labels" / "000000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamagedError, match=r"000000\.arrow"):
        reader_of(store).read(0, 0, store.num_rows)


def test_window_sizes_depend_on_the_store_alone(tmp_path):
    few, many = (make_store(tmp_path / str(k), num_images=4, num_classes=k, k=k) for k in (10, 400))
    assert order_of(few, 0).window_rows == 2**18
    assert order_of(many, 0).window_rows == 2**28 // (200 + 8 * 400 + 4)


def test_remote_image_shards_are_read_at_once_and_local_ones_in_turn(tmp_path):
    """Reads of the two shards of a batch wait for each other: in turn they would never meet."""
    store = make_store(tmp_path, num_images=12)
    source = open_images(store)
    meeting, threads = threading.Barrier(2, timeout=30), set()

    class Far:
        location, kind = "s3://far/away", source.kind

        def stream(self, name, refs):
            meeting.wait()
            threads.add(threading.get_ident())
            return source.stream(name, refs)

    order = order_of(store, 0)
    far, near = Reader(store, Far(), order).read(0, 0, 24), Reader(store, source, order).read(0, 0, 24)
    assert far.images == near.images
    assert len(threads) == 2
