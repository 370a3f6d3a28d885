"""Packing: bounds, bytes, sizes, and that nothing half-written is ever seen."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
import webdataset

from kddata.errors import ConfigError, SourceError
from kddata.images import ImageRef, ImageShard, ImageSource, decode, image_size, image_suffix, open_source, pack
from kddata.images.pack import image_key
from kddata.testing import encode, make_images, small_image


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def labels_of(source: ImageSource) -> list[int | None]:
    return [ref.label for name in source.shard_names() for ref in source.scan(name)[1]]


def contents(source: ImageSource) -> dict[str, bytes]:
    found = {}
    for name in source.shard_names():
        found |= {ref.image_id: data for ref, data in source.stream(name, source.scan(name)[1])}
    return found


def test_equal_sources_give_equal_bytes_within_the_bounds(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "in", num_images=60, form="folder"))
    for out in ("a", "b"):
        packed = pack(source, str(tmp_path / out), max_shard_bytes=40_960)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").iterdir())]
    assert (packed.num_shards, packed.num_bytes) == (len(sizes), sum(sizes))
    assert len(sizes) > 2
    assert max(sizes) <= 40_960
    assert min(sizes[:-1]) > 40_960 - 10_240 - 3_000  # full but for tar's own padding and one more image
    pack(source, str(tmp_path / "c"), max_shard_images=7)
    counts = [open_source(str(tmp_path / "c")).scan(f"{i:06d}.tar")[0].num_images for i in range(9)]
    assert counts == [7] * 8 + [4]


def test_an_image_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    packed = pack(open_source(make_images(tmp_path / "in", num_images=4)), str(tmp_path / "out"), max_shard_bytes=1)
    assert (packed.num_images, packed.num_shards) == (4, 4)


def test_the_stock_webdataset_reads_what_was_packed(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "in", num_images=9, form="folder"))
    pack(source, str(tmp_path / "out"), max_shard_images=5)
    urls = str(tmp_path / "out" / "{000000..000001}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    mine = contents(open_source(str(tmp_path / "out")))
    assert [sample["__key__"] for sample in samples] == list(mine)
    assert [sample["cls"] for sample in samples] == labels_of(source)
    for sample in samples:
        assert sample["jpg"].shape[:2] == image_size(mine[sample["__key__"]])


def test_only_larger_images_are_made_smaller(tmp_path: Path) -> None:
    for name, (height, width), form in [
        ("tall.jpg", (80, 40), "jpg"),
        ("wide.png", (30, 90), "png"),
        ("exact.jpg", (20, 60), "jpg"),
        ("small.png", (10, 12), "png"),
    ]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encode(small_image(0, height_px=height, width_px=width), form))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "in" / "huge.jpg").write_bytes(encode(small_image(0, height_px=200, width_px=200)))
    source = open_source(str(tmp_path / "in"))
    before = contents(source)
    packed = pack(source, str(tmp_path / "out"), short_side_px=20, max_pixels=10_000)
    after = contents(open_source(str(tmp_path / "out")))
    sizes = {key: image_size(data) for key, data in after.items() if key != "broken"}
    assert sizes == {"tall": (40, 20), "wide": (20, 60), "exact": (20, 60), "small": (10, 12), "huge": (200, 200)}
    assert packed.num_resized == 2
    assert [image_suffix(after[key]) for key in ("tall", "wide")] == ["jpg", "png"]
    for name in ("exact.jpg", "small.png", "broken.jpg", "huge.jpg"):
        assert after[name.partition(".")[0]] == before[name], "copied byte for byte"
    reasons = dict(packed.unreadable)
    assert "no known image format" in reasons["broken.jpg"]
    assert "at most 10000 pixels" in reasons["huge.jpg"]
    large = decode(before["wide.png"], max_pixels=10_000).float().mean((1, 2))
    assert (decode(after["wide"], max_pixels=10_000).float().mean((1, 2)) - large).abs().max() < 3


def test_threads_change_nothing(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "in", num_images=20))
    pack(source, str(tmp_path / "one"), short_side_px=16)
    pack(source, str(tmp_path / "many"), short_side_px=16, threads=4)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def test_progress_counts_every_image(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "in", num_images=9, shards=2))
    calls: list[tuple[int, int]] = []
    pack(source, str(tmp_path / "out"), on_image=lambda done, expected: calls.append((done, expected)))
    assert [done for done, _ in calls] == list(range(1, 10))
    assert calls[0] == (1, 8)  # what the first shard holds, for both
    assert calls[-1] == (9, 9)


@pytest.mark.parametrize(
    ("image_id", "key"),
    [
        ("a/b", "a/b"),
        ("cats/1.JPEG", "cats/1"),
        ("cats/cat.17.jpg", "cats/cat_17"),
        ("x.parquet/3", "x.parquet/3"),
        ("v1.5", "v1_5"),
        ("a/.jpg", "a/_"),
    ],
)
def test_keys_have_no_dots_that_webdataset_would_cut_at(image_id: str, key: str) -> None:
    assert image_key(image_id) == key


def test_two_images_with_one_key_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("0.jpg", "a.jpg", "a.png"):
        (tmp_path / "in" / name).write_bytes(encode(small_image(0, height_px=9, width_px=9)))
    for out in (str(tmp_path / "out"), f"memory://{uuid.uuid4().hex}"):
        with pytest.raises(SourceError, match=r"a tar key of its own .* got 'a' again for 'a\.png'"):
            pack(open_source(str(tmp_path / "in")), out, max_shard_images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    system, root = fsspec.core.url_to_fs(out)
    assert not system.exists(root) or system.find(root) == []


class Interrupted:
    """A source that is stopped in its second shard."""

    def __init__(self, source: ImageSource, seen: list[bool], out: Path) -> None:
        self._source, self._seen, self._out = source, seen, out
        self.kind, self.location = source.kind, source.location

    def shard_names(self) -> list[str]:
        return self._source.shard_names()

    def scan(self, shard_name: str) -> tuple[ImageShard, list[ImageRef]]:
        return self._source.scan(shard_name)

    def stream(self, shard_name: str, refs: Sequence[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        yield from self._source.stream(shard_name, refs[:3])
        self._seen.append(self._out.exists())
        if shard_name == "00001.tar":
            raise KeyboardInterrupt

    def fetch(self, shard_name: str, ref: ImageRef) -> bytes:
        return self._source.fetch(shard_name, ref)


def test_a_local_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    source, seen = open_source(make_images(tmp_path / "in", num_images=12)), []
    with pytest.raises(KeyboardInterrupt):
        pack(Interrupted(source, seen, tmp_path / "out"), str(tmp_path / "out"), max_shard_images=1)
    assert seen == [False, False]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = open_source(make_images(tmp_path / "in", num_images=2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for out in ("full", "file", "in"):
        with pytest.raises(ConfigError, match="packing writes into a new or empty directory; got something is there"):
            pack(source, str(tmp_path / out))
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="a web server"):
        pack(source, "http://127.0.0.1/out")
    with pytest.raises(SourceError, match="commands and chained URLs are refused"):
        pack(source, "pipe:cat > x")
    assert pack(source, str(tmp_path / "empty")).num_images == 2


@pytest.mark.parametrize("name", ["max_shard_bytes", "max_shard_images", "short_side_px"])
def test_bounds_are_positive(tmp_path: Path, name: str) -> None:
    source = open_source(make_images(tmp_path / "in", num_images=2))
    with pytest.raises(ConfigError, match=f"{name} is at least 1; got 0"):
        pack(source, str(tmp_path / "out"), **{name: 0})


def test_ids_that_come_twice_in_two_shards_are_named(tmp_path: Path) -> None:
    for part in ("a", "b"):
        make_images(tmp_path / part, num_images=3, shards=1)
    source = open_source([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(SourceError, match="'image-00000' again"):
        pack(source, str(tmp_path / "out"))
