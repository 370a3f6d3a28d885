"""Decoding: what pixels come out, and what is refused before any are made."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kddata.errors import BadImageError
from kddata.images import decode, image_hash, image_size, image_suffix
from kddata.testing import encode, small_image

LIMIT = 10_000
PIXELS = small_image(1, height_px=37, width_px=53)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


RGB = Image.fromarray(PIXELS)
GREY = RGB.convert("L")
ALPHA = RGB.copy()
ALPHA.putalpha(GREY)
LOSSLESS = {  # what it is, and what it must decode to
    "png": (encode(PIXELS, "png"), PIXELS),
    "grey png": (saved(GREY, "PNG"), np.repeat(np.asarray(GREY)[..., None], 3, 2)),
    "1-bit png": (saved(GREY.convert("1"), "PNG"), pillow_rgb(saved(GREY.convert("1"), "PNG"))),
    "palette png": (saved(RGB.quantize(50), "PNG"), np.asarray(RGB.quantize(50).convert("RGB"))),
    "rgba png": (saved(ALPHA, "PNG"), PIXELS),
    "grey and alpha png": (saved(ALPHA.convert("LA"), "PNG"), np.repeat(np.asarray(GREY)[..., None], 3, 2)),
    "bmp": (saved(RGB, "BMP"), PIXELS),
    "gif": (saved(GREY, "GIF"), np.repeat(np.asarray(GREY)[..., None], 3, 2)),
    "ppm": (saved(RGB, "PPM"), PIXELS),
    "tiff": (saved(RGB, "TIFF"), PIXELS),
    "webp": (saved(RGB, "WEBP", lossless=True), PIXELS),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_form_decodes_to_its_rgb_pixels(name: str) -> None:
    data, expected_HW3 = LOSSLESS[name]
    pixels = decode(data, max_pixels=LIMIT)
    assert pixels.dtype == torch.uint8
    assert pixels.stride() == (1, 3 * 53, 3)  # one layout for all decoders: resizing is fastest on it
    assert torch.equal(pixels, torch.from_numpy(expected_HW3.copy()).permute(2, 0, 1))
    assert image_size(data) == (37, 53)
    assert image_suffix(data) == name.split()[-1].replace("tiff", "tif")


def test_16_bit_channels_keep_their_high_byte() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        pixels = decode(saved(Image.fromarray(values), format), max_pixels=LIMIT)
        assert torch.equal(pixels, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 5, 7))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *, before: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + before + chunk(b"IHDR", header) + end


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_16_bit_colour_keeps_its_high_byte() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    pixels = decode(png(7, 5, 16, 2, rows), max_pixels=LIMIT)
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy((values >> 8).astype(np.uint8)))


def test_jpegs_of_any_colour_space_decode_to_rgb() -> None:
    for image in (RGB, GREY, RGB.convert("CMYK")):
        data = saved(image, "JPEG", quality=95)
        pixels = decode(data, max_pixels=LIMIT)
        assert pixels.shape == (3, 37, 53)
        assert torch.equal(pixels, decode(data, max_pixels=LIMIT))
        difference = pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(image.convert("RGB"))
        assert abs(difference).mean() < 3, image.mode
    grey = decode(saved(GREY, "JPEG"), max_pixels=LIMIT)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(RGB, "JPEG", exif=exif)
    assert image_size(turned) == (37, 53)
    assert torch.equal(decode(turned, max_pixels=LIMIT), decode(saved(RGB, "JPEG"), max_pixels=LIMIT))


def test_no_warning_comes_from_decoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encode(PIXELS, "jpg"), max_pixels=LIMIT)
        decode(encode(PIXELS, "png"), max_pixels=LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "zero bytes"),
        (
            b"this is a text, not a picture",
            "29 bytes that start with 'this is a te', no known image format",
        ),
        (b"\xff\xd8\xff", "cut inside the header"),
        (encode(PIXELS, "jpg")[:100], "cut inside the header"),
        (encode(PIXELS, "png")[:20], "20 bytes: Truncated File Read"),
        (encode(PIXELS, "jpg")[:-300], "incomplete or truncated"),
        (encode(PIXELS, "jpg")[:-2], "incomplete or truncated"),
        (encode(PIXELS, "png")[:-300], "truncated"),
        (saved(RGB, "WEBP")[:-100], "bytes"),
        (saved(RGB, "BMP")[:-100], "truncated"),
        (saved(RGB.convert("CMYK"), "JPEG")[:-100], "truncated"),
        (b"\xff\xd8\xff\xe0\x00\x01", "segment of negative length"),
        (b"\xff\xd8\xff\xd9", "without a frame header"),
        (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "mode F"),
    ],
)
def test_what_is_no_whole_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(BadImageError, match="an image is a whole file of a known format") as caught:
        decode(data, max_pixels=LIMIT)
    assert message in str(caught.value)
    assert "limits.bad_images" in str(caught.value)


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = png(4_000, 4_000, 8, 0, bytes(4_001 * 4_000))  # 16 KB that would be 48 MB
    assert len(bomb) < 20_000
    with pytest.raises(BadImageError) as caught:
        decode(bomb, max_pixels=15_999_999)
    assert str(caught.value) == (
        "an image has at most 15999999 pixels; got 4000 x 4000 px by its header, not decoded. "
        "Next: raise limits.pixels, or leave the image out."
    )
    assert decode(bomb, max_pixels=16_000_000).shape == (3, 4000, 4000)
    # Only a header, with nothing behind it: an attempt to decode would complain about the missing data instead.
    for header in (bomb[:60], encode(PIXELS, "jpg")[:300], saved(RGB, "BMP")[:54], saved(RGB, "PPM")[:20]):
        with pytest.raises(BadImageError, match="by its header, not decoded"):
            decode(header, max_pixels=10)


def test_a_bomb_behind_a_false_header_is_refused() -> None:
    # The place of the size in a plain PNG holds a small one; the real header comes later.
    false = chunk(b"tEXt", struct.pack(">II", 1, 1) + bytes(5))
    with pytest.raises(BadImageError):
        decode(png(4_000, 4_000, 8, 0, bytes(4_001 * 4_000), before=false), max_pixels=LIMIT)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_damage_at_every_byte_leaves_the_process_alive(format: str) -> None:
    """torchvision's decode_png dies of it: a change of decoder has to come past this test."""
    data = saved(Image.fromarray(small_image(0, height_px=12, width_px=9)), format)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        with contextlib.suppress(BadImageError):
            assert decode(bytes(damaged), max_pixels=LIMIT).dtype == torch.uint8


def test_a_jpeg_frame_behind_long_segments_and_fill_bytes_is_found() -> None:
    data = encode(PIXELS, "jpg")
    comment = b"\xff\xff\xff\xfe" + (60_002).to_bytes(2, "big") + b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01\x03" * 6_000
    commented = data[:2] + comment + data[2:]
    assert image_size(commented) == (37, 53)
    assert torch.equal(decode(commented, max_pixels=LIMIT), decode(data, max_pixels=LIMIT))


MODULE = sys.modules["kddata.images.decode"]  # the package has a function of that name
FORMS: list[dict[str, object]] = [
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:2:0"},
    {"subsampling": "4:2:0", "optimize": True},
    {"subsampling": "4:2:0", "restart_marker_blocks": 3},
    {"subsampling": "4:4:4", "restart_marker_rows": 1},
    {"progressive": True},
    {"keep_rgb": True},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(f"{key}={value}" for key, value in form.items()))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_first_rows_alone_are_those_of_the_whole_image(mode: str, form: dict[str, object]) -> None:
    pytest.importorskip("simplejpeg")
    noise = np.random.default_rng(0).integers(0, 256, (101, 67, 3), dtype=np.uint8)
    picture = small_image(2, height_px=101, width_px=67) // 2 + noise // 2
    data = saved(Image.fromarray(picture).convert(mode), "JPEG", quality=85, **form)
    whole, heights = decode(data, max_pixels=LIMIT), set()
    for rows in range(1, 102):
        first = decode(data, max_pixels=LIMIT, rows=rows)
        assert first.dtype == torch.uint8
        assert torch.equal(first[:, :rows], whole[:, :rows]), rows
        heights.add(first.shape[1])
    assert len(heights) == 1 if "progressive" in form else len(heights) > 3


def test_rows_cost_nothing_of_an_image_that_is_no_jpeg_or_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (encode(PIXELS, "png"), encode(PIXELS, "jpg")):
        monkeypatch.setattr(MODULE, "simplejpeg", None)
        assert torch.equal(decode(data, max_pixels=LIMIT, rows=3), decode(data, max_pixels=LIMIT))


def test_a_decoder_that_gives_other_pixels_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    honest, calls = simplejpeg.decode_jpeg, []

    def other(data: bytes, **options: object) -> np.ndarray:
        calls.append(1)
        return honest(data, **options) ^ 1

    monkeypatch.setattr(simplejpeg, "decode_jpeg", other)
    monkeypatch.setattr(MODULE, "_proofs_left", 8)
    data = encode(PIXELS, "jpg")
    for _ in range(2):
        assert torch.equal(decode(data, max_pixels=LIMIT, rows=3), decode(data, max_pixels=LIMIT))
    assert len(calls) == 1
    assert "simplejpeg gives other pixels here" in caplog.text


def test_image_hash_is_of_the_encoded_bytes() -> None:
    assert image_hash(b"kddata") == 0xBF9D35C672C9A64C  # stores hold it: it must never change


def test_real_photos_decode_as_pillow_reads_them() -> None:
    data_dir = Path(os.environ.get("KDDATA_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
    shard = data_dir / "imagenet_photos" / "shard-00000.tar"
    if not shard.exists():
        pytest.skip(f"no real photos at {shard}")
    with tarfile.open(shard) as tar:
        photos = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    for data in photos[:40]:
        pixels = decode(data, max_pixels=10**8)
        expected = pillow_rgb(data)
        assert image_size(data) == expected.shape[:2]
        # Two builds of libjpeg-turbo: the same integers but for rounding in colour conversion.
        assert abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2
