"""Tar sources: ids, labels, and tars that are cut, damaged or hostile."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import pytest

from kddata.errors import BadImageError, SourceError
from kddata.images import ImageRef, decode, open_source
from kddata.images import files as image_files
from kddata.testing import encode, make_images, small_image, write_tar

JPEG = encode(small_image(0, height_px=24, width_px=30))


def scan_tar(path: Path, members: list[tuple[str, bytes]]) -> list[ImageRef]:
    write_tar(path, members)
    return open_source(str(path)).scan(path.name)[1]


def test_tar_ids_are_webdataset_keys(tmp_path: Path) -> None:
    refs = scan_tar(
        tmp_path / "x.tar",
        [
            ("a/0.cls", b" 7\n"),
            ("a/0.jpg", JPEG),
            ("./1.JPEG", JPEG),
            ("v1.2/2.png", JPEG),
            ("v1.2/2.cls", b"-1"),
            ("3.jpg", JPEG),
            ("3.mask.png", JPEG),
            ("3.json", b"{}"),
            ("._4.jpg", b"what macOS leaves beside a file"),
            ("no suffix", b""),
            ("名前/é.webp", JPEG),
        ],
    )
    found = [(ref.image_id, ref.label) for ref in refs]
    assert found == [("a/0", 7), ("./1", None), ("v1.2/2", None), ("3", None), ("名前/é", None)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_dialect_are_read(tmp_path: Path, format: int) -> None:
    keys = ["short", "d" * 90 + "/" + "k" * 80] + ([] if format == tarfile.USTAR_FORMAT else ["é" * 300 + "/x"])
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        for key in keys:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size, info.mtime = len(JPEG), 1.5  # a fraction: a pax record of its own
            tar.addfile(info, io.BytesIO(JPEG))
    source = open_source(str(tmp_path / "x.tar"))
    refs = source.scan("x.tar")[1]
    assert [ref.image_id for ref in refs] == keys
    assert all(data == JPEG for _, data in source.stream("x.tar", refs))


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../up.jpg", "a\nb.jpg", "a\udcff.jpg"])
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(JPEG)
        tar.addfile(info, io.BytesIO(JPEG))
    with pytest.raises(SourceError, match="image names are") as caught:
        open_source(str(tmp_path / "x.tar")).scan("x.tar")
    assert ascii(name.removesuffix(".jpg"))[1:-1] in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_place_of_images_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(SourceError, match=r"images in a tar are plain files; got 'a\.jpg', a link"):
        open_source(str(tmp_path / "x.tar")).scan("x.tar")


@pytest.mark.parametrize("text", [b"cat", b"1_0", b"1.5", b"", b"0x10", b"9" * 40, b"2147483648", b"-2"])
def test_labels_are_class_indices(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(SourceError, match=r"one class index in ASCII digits|class indices from 0, or -1") as caught:
        scan_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", text)])
    assert str(tmp_path) in str(caught.value) or "'a'" in str(caught.value)


def test_ids_that_come_twice_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="image ids are unique in a source; got 'b' twice"):
        scan_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("b.png", JPEG)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes"),
        (b"short", "got 5 bytes"),
        (b"\x1f\x8b" + bytes(2000), "got a gzip file"),
        (b"not a tar " * 200, "got no tar"),
        (bytes(10240), "an image shard holds at least one image; got none"),
    ],
)
def test_files_that_are_no_tar_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        open_source(str(tmp_path / "x.tar")).scan("x.tar")
    assert message in str(caught.value)
    assert str(tmp_path / "x.tar") in str(caught.value)


def test_a_tar_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"an image shard holds at least one image; got none .*images are files ending"
    ):
        scan_tar(tmp_path / "x.tar", [("a.txt", b"text"), ("a.cls", b"1")])


def test_a_truncated_tar_keeps_what_is_whole_and_lists_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    whole = scan_tar(
        path, [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in [("jpg", JPEG), ("cls", b"1")]]
    )
    full = path.read_bytes()
    source = open_source(str(path))
    cuts = {  # byte where the file ends: ids that are listed
        whole[2].offset + 100: ["0", "1", "2"],  # inside an image, which stays
        whole[2].offset: ["0", "1", "2"],
        whole[2].offset + len(JPEG) - 1: ["0", "1", "2"],
        whole[2].offset - 10: ["0", "1", "x.tar#cut"],  # inside a header
        whole[2].offset - 512: ["0", "1", "x.tar#cut"],  # between two members: no end mark
        whole[2].offset - 1024: ["0", "1", "x.tar#cut"],  # inside a label
    }
    for stop, expected in cuts.items():
        path.write_bytes(full[:stop])
        refs = source.scan("x.tar")[1]
        assert [ref.image_id for ref in refs] == expected
        for ref, data in source.stream("x.tar", refs):
            assert source.fetch("x.tar", ref) == data
            if ref.image_id in ("0", "1"):
                decode(data, max_pixels=10_000)
            else:
                with pytest.raises(
                    BadImageError, match="zero bytes: an empty file, one that a truncated tar has lost, or"
                ):
                    decode(data, max_pixels=10_000)
    path.write_bytes(
        full[: whole[2].offset + 1024 + 3 * 512]
    )  # after the last label: one block of the end mark is enough
    assert source.scan("x.tar")[1] == whole


def test_a_damaged_header_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    refs = scan_tar(path, [("0.jpg", JPEG), ("1.jpg", JPEG)])
    data = bytearray(path.read_bytes())
    place = refs[1].offset - 512
    data[place + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"every header of a tar is whole; got bad checksum .*byte {place}"):
        open_source(str(path)).scan("x.tar")


@pytest.mark.parametrize("size", [-1024, -512, 1 << 62])
def test_lying_sizes_neither_loop_nor_fill_memory(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + JPEG)
    source = open_source(str(path))
    if size < 0:
        with pytest.raises(SourceError, match=f"every header of a tar is whole; got a size of {size}"):
            source.scan("x.tar")
    else:
        (ref,) = source.scan("x.tar")[1]
        assert (ref.image_id, source.fetch("x.tar", ref)) == ("a", b"")
        far = ImageRef(image_id="a", label=None, offset=512, length=1 << 62)
        with pytest.raises(SourceError, match="image files stay as they were"):
            source.fetch("x.tar", far)


def test_lying_name_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    image = tarfile.TarInfo("a.jpg").tobuf()
    for kind, body, message in [
        (tarfile.GNUTYPE_LONGNAME, b"x" * 70_000, "a name header of 70000 bytes"),
        (tarfile.XHDTYPE, b"99 path=a.jpg\n", "a pax header that is none"),
        (tarfile.XHDTYPE, b"3 path=a.jpg\n", "a pax header that is none"),
        (tarfile.XHDTYPE, b"12 size=-99\n", "a size of '-99'"),
    ]:
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, len(body)
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512) + image + bytes(1024))
        with pytest.raises(SourceError) as caught:
            open_source(str(path)).scan("x.tar")
        assert message in str(caught.value)


def test_a_stream_reads_many_images_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(make_images(tmp_path, num_images=50, shards=1))
    refs = source.scan("00000.tar")[1]
    reads = []
    read_range = image_files.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        reads.append(stop - start)
        return read_range(url, start, stop)

    monkeypatch.setattr(image_files, "read_range", counted)
    assert len(list(source.stream("00000.tar", refs))) == 50
    assert len(reads) == 1
    reads.clear()
    monkeypatch.setattr("kddata.images.tar._SPAN_BYTES", 10_000)
    assert [data for _, data in source.stream("00000.tar", refs)] == [source.fetch("00000.tar", ref) for ref in refs]
    assert max(reads) <= 10_000


def test_a_remote_shard_is_streamed_through_gaps_that_cost_less_than_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of 300 kB, every other one: locally each by itself, from far away the shard in one read."""
    members = [(f"{i}.jpg", bytes([i]) * 300_000) for i in range(8)]
    write_tar(tmp_path / "a.tar", members)
    fsspec.filesystem("memory").pipe_file("/gaps/a.tar", (tmp_path / "a.tar").read_bytes())
    reads: list[int] = []
    read_range = image_files.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        reads.append(stop - start)
        return read_range(url, start, stop)

    monkeypatch.setattr(image_files, "read_range", counted)
    for location, number in ((str(tmp_path / "a.tar"), 4), ("memory://gaps/a.tar", 1)):
        source = open_source(location)
        refs = source.scan("a.tar")[1][::2]
        reads.clear()
        assert [data[:1] for _, data in source.stream("a.tar", refs)] == [bytes([i]) for i in (0, 2, 4, 6)]
        assert len(reads) == number
