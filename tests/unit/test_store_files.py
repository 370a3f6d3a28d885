"""A store's files: readable by stock libraries, published whole and synced, cheap to open, bounded in memory."""

import logging
import os
import stat
import uuid
import weakref

import numpy as np
import pyarrow as pa
import pytest

from kddata import errors
from kddata.store import LabelRows, LabelStore, manifest, naming, open_storage
from kddata.store.storage import MemoryStorage
from kddata.testing import begin_small_store, made_up_rows, small_spec, small_store


def test_stock_pyarrow_reads_a_shard_in_three_lines(tmp_path):
    store = small_store(str(tmp_path / "labels"))
    path = tmp_path / "labels/labels/000001.arrow"

    import pyarrow.ipc

    table = pyarrow.ipc.open_file(path).read_all()

    rows = store.read(1)
    names = "image_id view label ids log_p log_tail resize box flip source offset length image_hash pixel_hash"
    assert " ".join(table.column_names) == names
    assert table["ids"].to_pylist() == rows.labels.ids_BK.tolist()
    assert table["label"].to_pylist() == [None if x < 0 else x for x in rows.label.tolist()]
    assert table["resize"].null_count == len(rows)


def test_stock_polars_reads_a_shard_in_three_lines(tmp_path):
    polars = pytest.importorskip("polars")
    store = small_store(str(tmp_path / "labels"))
    path = tmp_path / "labels/labels/000001.arrow"

    frame = polars.read_ipc(path)

    rows = store.read(1)
    assert frame["image_id"].to_list() == rows.image_id
    assert frame["box"].to_list() == rows.box.tolist()
    np.testing.assert_array_equal(frame["log_p"].to_numpy(), rows.labels.log_p_BK.numpy())
    assert frame["pixel_hash"].null_count() == len(rows) - rows.has_pixel_hash.sum()


def test_a_shard_says_what_it_belongs_to(tmp_path):
    store = small_store(str(tmp_path / "labels"))
    schema = pa.ipc.open_file(tmp_path / "labels/labels/000001.arrow").schema
    assert schema.metadata[b"kddata"].decode() == (
        f'{{"codec":"exact","fingerprint":"{store.spec.fingerprint}","format_version":1,"num_classes":10,'
        '"source":0,"temperatures":[1.0,4.0],"unit":1,"views":[2,3]}'
    )


def test_opening_reads_the_manifest_alone(tmp_path):
    store = small_store(str(tmp_path / "labels"))
    for path in sorted((tmp_path / "labels").rglob("*"), reverse=True):
        if path.name != naming.MANIFEST:
            path.rmdir() if path.is_dir() else path.unlink()
    opened = LabelStore.open(str(tmp_path / "labels"))
    assert list(opened.units()) == list(store.units())
    assert opened.images == store.images
    assert (opened.num_rows, opened.info()["bytes"]) == (store.num_rows, store.info()["bytes"])


def test_a_store_that_is_committed_while_it_is_opened_is_opened(monkeypatch):
    url = f"memory://{uuid.uuid4().hex}"
    store = begin_small_store(url)
    for unit in store.units():
        store.write_unit(unit, [made_up_rows(store, unit)])
    listed = MemoryStorage.sizes

    def commit_first(self, folder=""):
        monkeypatch.setattr(MemoryStorage, "sizes", listed)
        store.commit()
        return listed(self, folder)

    monkeypatch.setattr(MemoryStorage, "sizes", commit_first)
    assert LabelStore.open(url).num_rows == store.num_rows


def test_a_store_can_be_moved(tmp_path):
    small_store(str(tmp_path / "here")).read(0)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = LabelStore.open(f"file://{tmp_path}/there")
    assert moved.verify() == []
    assert moved.url == str(tmp_path / "there")
    assert str(tmp_path).encode() not in b"".join(map(moved.storage.read, moved.storage.sizes()))


def test_memory_does_not_grow_with_the_unit(monkeypatch):
    """Of 60 parts that stream into one unit, only those of one record batch are alive at any time."""
    monkeypatch.setattr("kddata.store.columns._BATCH_ROWS", 8)
    store = begin_small_store("memory://bounded", spec=small_spec(unit_images=200), images=(120,), views_per_image=2)
    [unit] = store.units()
    rows = made_up_rows(store, unit)
    alive: weakref.WeakSet[LabelRows] = weakref.WeakSet()
    most = 0

    def parts():
        nonlocal most
        for start in range(0, len(rows), 4):
            part = rows.take(slice(start, start + 4))
            alive.add(part)
            most = max(most, len(alive))
            yield part
            del part

    assert store.write_unit(unit, parts()).rows == 240
    assert most <= 4


def test_a_file_is_synced_before_it_is_seen_and_its_folder_after(tmp_path, monkeypatch):
    order = []
    storage = open_storage(str(tmp_path))
    for module, name in ((os, "fsync"), (os, "link"), (type(tmp_path), "replace")):
        real = getattr(module, name)

        def spy(*args, real=real, name=name):
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            order.append("fsync folder" if is_folder else name)
            return real(*args)

        monkeypatch.setattr(module, name, spy)
    storage.create("a", b"1")
    assert order == ["fsync", "link", "fsync folder"]
    order.clear()
    with storage.replacing("a") as out:
        out.write(b"2")
    assert order == ["fsync", "replace", "fsync folder"]


def test_others_may_read_a_store_as_far_as_the_umask_lets_them(tmp_path):
    small_store(str(tmp_path / "labels"))
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_a_disk_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(errors.StoreError, match=r"makes hard links.*put the store on another disk, or on s3://"):
        begin_small_store(str(tmp_path / "labels"))
    assert list((tmp_path / "labels").iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = begin_small_store(str(tmp_path / "labels"))

    def fsync(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(errors.StoreError, match=r"disk has room; got No space left.*free some space"):
            store.write_unit(store.units()[0], [made_up_rows(store, store.units()[0])])
    assert list(store.receipts()) == []
    assert not any(path.name.startswith((".tmp", "0000")) for path in (tmp_path / "labels/labels").iterdir())


def test_half_written_files_of_dead_writers_are_swept_at_the_commit(tmp_path):
    store = begin_small_store(str(tmp_path / "labels"))
    for unit in store.units():
        store.write_unit(unit, [made_up_rows(store, unit)])
    for folder in ("", "labels", "receipts"):
        (tmp_path / "labels" / folder / ".tmp-0123456789abcdef").write_bytes(b"half")
    assert [receipt.unit for receipt in begin_small_store(store.url).receipts()] == [0, 1, 2, 3, 4, 5]
    store.commit()
    assert store.verify() == []
    assert not (tmp_path / "labels/receipts").exists()


def test_begin_goes_on_beside_a_half_written_header(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/.tmp-0123456789abcdef").write_bytes(b"half")
    assert len(begin_small_store(str(tmp_path / "labels")).units()) == 6


@pytest.mark.parametrize("url", ["", "pipe:cat x", "zip::file:///x", "https://host/x", "gs://x/y"])
def test_other_places_are_refused(url):
    with pytest.raises(errors.ConfigError, match=r"a store lies (at one path|on local disk, memory:// or s3://).*got"):
        LabelStore.open(url)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "labels").write_bytes(b"x")
    with pytest.raises(errors.StoreError, match=r"a store is a folder; got a file .*labels.*name another place"):
        begin_small_store(str(tmp_path / "labels"))
    with pytest.raises(errors.StoreMissingError, match="check the path"):
        LabelStore.open(str(tmp_path / "labels"))


def test_other_library_versions_are_named_when_a_store_is_opened(tmp_path, monkeypatch, caplog):
    small_store(str(tmp_path / "labels"))
    with caplog.at_level(logging.WARNING):
        LabelStore.open(str(tmp_path / "labels"))
    assert caplog.text == ""
    now = manifest.libraries() | {"torchvision": "9.9"}
    monkeypatch.setattr(manifest, "libraries", lambda: now)
    with caplog.at_level(logging.WARNING):
        LabelStore.open(str(tmp_path / "labels"))
    assert "may not replay to the very pixels: torchvision 0." in caplog.text
    assert "then, 9.9 now" in caplog.text
