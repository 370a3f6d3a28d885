"""What a source of images promises, for every kind of source, on local disk, in memory and on S3 over real HTTP."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import threading
import uuid
from pathlib import Path

import fsspec
import pytest

from kddata.errors import SourceError
from kddata.images import ImageRef, ImageSource, decode, open_source, pack
from kddata.testing import make_images

NUM_IMAGES = 11


@pytest.fixture(params=["local", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place for images."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    return str(tmp_path / "moved") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture(params=["tar", "folder", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def put(local: Path, url: str) -> None:
    """Copies a local directory to a URL."""
    for path in sorted(local.rglob("*")):
        if path.is_file():
            with fsspec.open(f"{url}/{path.relative_to(local).as_posix()}", "wb", auto_mkdir=True) as file:
                file.write(path.read_bytes())


def images_at(base: str, tmp_path: Path, kind: str, *, labelled: bool = True) -> ImageSource:
    location = make_images(tmp_path / "made", num_images=NUM_IMAGES, form=kind, labelled=labelled)
    put(tmp_path / "made", base)
    return open_source(location.replace(str(tmp_path / "made"), base))


def everything(source: ImageSource) -> list[tuple[str, ImageRef, bytes]]:
    found = []
    for name in source.shard_names():
        shard, refs = source.scan(name)
        assert (shard.name, shard.num_images) == (name, len(refs))
        streamed = list(source.stream(name, refs))
        assert [ref for ref, _ in streamed] == refs
        found += [(name, ref, data) for ref, data in streamed]
    return found


def test_every_image_is_found_read_and_fetched(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    assert source.kind == kind
    found = everything(source)
    assert len(found) == len({ref.image_id for _, ref, _ in found}) == NUM_IMAGES
    for name, ref, data in found:
        number = int(ref.image_id.rpartition("image-")[2].removesuffix(".jpg"))
        assert ref.label == number % 4
        assert decode(data, max_pixels=10_000).shape[0] == 3
        assert source.fetch(name, ref) == data
        assert ref.length in (len(data), 0)


def test_images_without_labels_are_first_class(base: str, tmp_path: Path, kind: str) -> None:
    found = everything(images_at(base, tmp_path, kind, labelled=False))
    assert [ref.label for _, ref, _ in found] == [None] * NUM_IMAGES


def test_a_copy_elsewhere_has_the_same_shards_ids_and_places(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    put(tmp_path / "made", f"{base}-elsewhere/still")
    assert isinstance(source.location, str)
    moved = open_source(source.location.replace(base, f"{base}-elsewhere/still"))
    assert everything(moved) == everything(source)


def test_any_order_and_repeats_are_served(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    name = source.shard_names()[0]
    refs = source.scan(name)[1]
    wanted = [refs[3], refs[3], refs[0], refs[-1], refs[1], refs[1]]
    assert list(source.stream(name, wanted)) == [(ref, source.fetch(name, ref)) for ref in wanted]
    assert list(source.stream(name, [])) == []


def test_a_source_travels_to_other_processes(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    assert pickle.loads(pickle.dumps(source)) == source
    assert open_source(source.location) == source


def test_a_stream_can_be_left_early(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    name = source.shard_names()[0]
    stream = source.stream(name, source.scan(name)[1])
    next(stream)
    stream.close()


def test_missing_images_are_named(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    name = source.shard_names()[0]
    ref = source.scan(name)[1][0]
    with pytest.raises(SourceError, match=r"an image shard is one of its source; got '../secret' .*point `images`"):
        source.scan("../secret")
    system, root = fsspec.core.url_to_fs(base)
    system.rm(root, recursive=True)
    for read in (lambda: source.shard_names(), lambda: source.scan(name), lambda: source.fetch(name, ref)):
        with pytest.raises(SourceError) as caught:
            read()
        assert base in str(caught.value)
    with pytest.raises(SourceError, match="images exist where `images` says; got nothing there"):
        source.shard_names()
    with pytest.raises(SourceError, match="nothing there"):
        open_source(f"{base}/never")


def test_files_that_another_process_adds_are_seen(base: str, tmp_path: Path) -> None:
    images_at(base, tmp_path, "tar")
    assert open_source(base).shard_names() == ["00000.tar", "00001.tar"]
    system, root = fsspec.core.url_to_fs(base)
    other = type(system)(skip_instance_cache=True)  # it shares no listing with the one that was asked
    other.pipe_file(f"{root}/00002.tar", other.cat_file(f"{root}/00000.tar"))
    assert open_source(base).shard_names() == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_file_that_shrank_is_noticed(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    name = source.shard_names()[0]
    ref = source.scan(name)[1][-1]
    system, root = fsspec.core.url_to_fs(base)
    for path in system.find(root):
        data = system.cat_file(path)
        system.pipe_file(path, data[: 600 if kind == "tar" else len(data) // 2])
    for read in (lambda: source.fetch(name, ref), lambda: list(source.stream(name, [ref]))):
        with pytest.raises(SourceError, match=r"stay as they were|whole parquet files|can be read"):
            read()


def test_packed_images_are_the_same_images(base: str, tmp_path: Path, kind: str) -> None:
    source = images_at(base, tmp_path, kind)
    out = f"{base}/packed" if kind != "folder" else f"{base}-packed"
    packed = pack(source, out, max_shard_images=4)
    assert (packed.num_images, packed.num_shards, packed.num_resized, packed.unreadable) == (NUM_IMAGES, 3, 0, ())
    copy = open_source(out)
    assert copy.shard_names() == ["000000.tar", "000001.tar", "000002.tar"]
    theirs, mine = everything(source), everything(copy)
    assert [(ref.label, data) for _, ref, data in mine] == [(ref.label, data) for _, ref, data in theirs]
    assert [ref.image_id for _, ref, _ in mine] == [ref.image_id.removesuffix(".jpg") for _, ref, _ in theirs]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_web_servers_with_byte_ranges_are_read(s3_bucket: str, tmp_path: Path, kind: str) -> None:
    bucket = f"{s3_bucket}/{uuid.uuid4().hex}"
    source = images_at(bucket, tmp_path, kind)
    assert isinstance(source.location, str)
    system, root = fsspec.core.url_to_fs(bucket)
    for path in system.find(root):
        system.chmod(path, "public-read")
    web = open_source(source.location.replace("s3://", os.environ["AWS_ENDPOINT_URL"] + "/"))
    assert everything(web) == everything(source)


def test_web_servers_without_byte_ranges_are_refused(tmp_path: Path) -> None:
    make_images(tmp_path, shards=1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = open_source(f"http://127.0.0.1:{server.server_port}/00000.tar")
        assert source.shard_names() == ["00000.tar"]
        with pytest.raises(SourceError, match="their servers honour byte ranges"):
            source.scan("00000.tar")
    finally:
        server.shutdown()
        server.server_close()
