"""Sources and decoders on tars of any shape, cut or damaged anywhere, against the standard library's reader."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kddata.errors import BadImageError, SourceError
from kddata.images import decode, image_hash, open_source
from kddata.testing import encode, small_image

IMAGES = [
    encode(small_image(0, height_px=12, width_px=9), "png"),
    encode(small_image(1, height_px=9, width_px=14)),
    b"",
]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
names = st.text(
    st.characters(codec="utf-8", exclude_characters="/.", exclude_categories=("C",)), min_size=1, max_size=40
)
keys = st.lists(names, min_size=1, max_size=3).map("/".join)
members = st.lists(
    st.tuples(keys, st.sampled_from(["jpg", "JPEG", "png", "cls", "txt", "mask.png"]), st.integers(0, 2)),
    min_size=1,
    max_size=8,
    unique_by=lambda member: member[:1],
)


def tar_bytes(parts: list[tuple[str, str, int]], format: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for key, suffix, choice in parts:
            data = b"%d" % choice if suffix == "cls" else IMAGES[choice]
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def scan(data: bytes) -> list[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        path.write_bytes(data)
        source = open_source(str(path))
        refs = source.scan("x.tar")[1]
        found = list(source.stream("x.tar", refs))
        assert [ref for ref, _ in found] == refs
        assert [source.fetch("x.tar", ref) for ref in refs] == [data for _, data in found]
    return [(ref.image_id, data) for ref, data in found]


@given(members, st.sampled_from(FORMATS[1:]))
def test_images_of_a_tar_are_those_that_the_standard_library_finds(
    parts: list[tuple[str, str, int]], format: int
) -> None:
    data = tar_bytes(parts, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [
            (member.name.rpartition(".")[0], tar.extractfile(member).read())
            for member in tar
            if member.name.partition(".")[2].lower() in ("jpg", "jpeg", "png")
        ]
    if expected:
        assert scan(data) == expected
    else:
        with pytest.raises(SourceError, match="at least one image"):
            scan(data)


@given(st.integers(1, 4), st.sampled_from(FORMATS), st.data())
@settings(max_examples=150)
def test_a_cut_anywhere_loses_one_record_at_most_and_is_listed(
    num_images: int, format: int, data: st.DataObject
) -> None:
    parts = [
        (f"{i:0{1 + 150 * i}d}" if format != tarfile.USTAR_FORMAT else f"{i}", "png", 0) for i in range(num_images)
    ]
    whole = tar_bytes(parts, format)
    complete = scan(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [member.offset_data + member.size for member in tar]
    stop = data.draw(st.integers(512, len(whole)))
    padded_end = -(-ends[-1] // 512) * 512
    found = scan(whole[:stop])
    kept = sum(end <= stop for end in ends)
    assert found[:kept] == complete[:kept]
    if stop >= padded_end + 512:
        assert found == complete
    else:
        assert len(found) == kept + 1, "what is lost is one record"
        assert found[-1][1] == b""


@given(st.binary(min_size=1, max_size=40), st.integers(0, 4_000), st.sampled_from(FORMATS))
@settings(max_examples=300)
@example(b"\xff" * 12, 124, tarfile.GNU_FORMAT)  # a negative size
def test_damage_anywhere_is_an_error_or_other_bytes_and_never_anything_else(
    noise: bytes, place: int, format: int
) -> None:
    data = bytearray(tar_bytes([("a", "png", 0), ("b" * 120 if format else "b", "jpg", 1), ("c", "cls", 1)], format))
    place %= len(data)
    data[place : place + len(noise)] = noise
    try:
        found = scan(bytes(data))
    except SourceError:
        return
    for _, image in found:
        decode_or_refuse(image)


def decode_or_refuse(image: bytes) -> None:
    try:
        pixels = decode(image, max_pixels=1_000_000)
    except BadImageError:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


def saved(format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(small_image(0, height_px=20, width_px=17)).save(file, format)
    return file.getvalue()


SEEDS = [saved(format) for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(SEEDS), st.integers(0, 10_000), st.binary(max_size=12), st.integers(0, 10_000))
@settings(max_examples=400)
def test_decoding_any_bytes_gives_pixels_or_a_bad_image(seed: bytes, place: int, noise: bytes, stop: int) -> None:
    data = bytearray(seed)
    place %= len(data)
    data[place : place + len(noise)] = noise
    decode_or_refuse(bytes(data[: stop % (2 * len(data))]))


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_other_bytes_have_another_hash(one: bytes, other: bytes) -> None:
    assert (image_hash(one) == image_hash(other)) == (one == other)
