"""The image cache: the same bytes with it and without, bounded, checked, and nobody else's files touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kddata.errors import ConfigError
from kddata.images import CachedSource, ImageCache, open_source
from kddata.replay import loader
from kddata.testing import make_images, make_store


class Counting:
    """A source that counts the images that are read from it."""

    def __init__(self, location: str) -> None:
        self._source, self.read = open_source(location), 0
        self.location, self.kind = self._source.location, self._source.kind
        self.shard_names, self.scan, self.fetch = self._source.shard_names, self._source.scan, self._source.fetch

    def stream(self, shard_name, refs):
        for ref, data in self._source.stream(shard_name, refs):
            self.read += 1
            yield ref, data


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def images_of(source) -> dict[str, bytes]:
    names = source.shard_names()
    return {ref.image_id: data for name in names for ref, data in source.stream(name, source.scan(name)[1])}


@pytest.mark.parametrize("form", ["tar", "folder", "parquet"])
def test_images_are_read_once_from_the_source_and_then_from_the_cache(tmp_path, form):
    source = Counting(make_images(tmp_path / "images", num_images=12, form=form))
    wanted = images_of(open_source(source.location))
    for _ in range(2):  # the second time by a new process, so to speak
        cached = CachedSource(source, ImageCache(str(tmp_path / "cache"), 10**9))
        assert images_of(cached) == wanted
        assert source.read == 12
    name = source.shard_names()[0]
    refs = source.scan(name)[1]
    again = [data for _, data in cached.stream(name, [refs[1], refs[0], refs[1]])]
    assert again == [wanted[refs[i].image_id] for i in (1, 0, 1)]
    assert cached.fetch(name, refs[0]) == wanted[refs[0].image_id]
    assert source.read == 12


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_read_again(tmp_path, damage):
    source = Counting(make_images(tmp_path / "images", num_images=6))
    cached = CachedSource(source, ImageCache(str(tmp_path / "cache"), 10**9))
    wanted = images_of(cached)
    for path in entries(tmp_path / "cache")[:2]:
        data = path.read_bytes()
        path.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b""}[damage])
    assert images_of(cached) == wanted
    assert source.read == 8
    assert images_of(cached) == wanted
    assert source.read == 8


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago(tmp_path):
    cache = ImageCache(str(tmp_path / "cache"), 10_000)
    for i in range(40):
        cache.put(str(i), bytes(500))
        assert cache.get("0") is not None, "it is used all the time"
        for path in entries(tmp_path / "cache"):  # clocks of file systems are coarse
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
        cache.get("0")
    assert sum(path.stat().st_size for path in entries(tmp_path / "cache")) <= 10_000
    assert cache.get("39") is not None
    assert cache.get("1") is None
    cache.put("large", bytes(5_000))
    assert cache.get("large") is None, "one entry does not push out the others"


def test_a_folder_with_other_files_is_refused_and_only_own_entries_are_dropped(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("the only copy")
    with pytest.raises(ConfigError, match=r"a folder of its own; got other files"):
        ImageCache(str(tmp_path / "mine"), 1000)
    cache = ImageCache(str(tmp_path / "cache"), 1000)
    (tmp_path / "cache" / "ab").mkdir()
    others = [tmp_path / "cache" / "notes.txt", tmp_path / "cache" / "ab" / "notes.txt"]
    for path in others:
        path.write_text("the only copy")
        os.utime(path, (0, 0))
    for i in range(50):
        cache.put(str(i), bytes(60))
    assert all(path.read_text() == "the only copy" for path in others)
    with pytest.raises(ConfigError, match="room for a byte"):
        ImageCache(str(tmp_path / "other"), 0)


@pytest.mark.parametrize("held", [0, 1])
def test_a_folder_that_another_process_begins_at_the_same_time_is_shared(tmp_path, monkeypatch, held):
    """The other one comes after the first look at the mark, and before the folder is listed."""
    listing, folder = Path.iterdir, str(tmp_path / "cache")

    def late(self):
        monkeypatch.setattr(Path, "iterdir", listing)
        other = ImageCache(folder, 10**9)
        for i in range(held):
            other.put(str(i), b"bytes")
        return listing(self)

    monkeypatch.setattr(Path, "iterdir", late)
    cache = ImageCache(folder, 10**9)
    assert Path.iterdir is listing, "the other one has come"
    assert cache.get("0") == (b"bytes" if held else None)


def test_a_disk_that_fails_costs_the_cache_and_nothing_else(tmp_path, caplog, monkeypatch):
    source = Counting(make_images(tmp_path / "images", num_images=6))
    cached = CachedSource(source, ImageCache(str(tmp_path / "cache"), 10**9))

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert len(images_of(cached)) == 6
    assert caplog.text.count("is not written any more") == 1


def test_students_see_the_same_pixels_from_a_cache(tmp_path):
    store = make_store(tmp_path, num_images=8)

    def pixels(**more):
        return torch.cat([batch.pixels_u8_B3SS for batch in loader(store, batch_size=4, size_px=16, epochs=2, **more)])

    cache = ImageCache(str(tmp_path / "cache"), 10**9)
    assert torch.equal(pixels(cache=cache, num_workers=2), pixels())
    assert len(entries(tmp_path / "cache")) == 8
