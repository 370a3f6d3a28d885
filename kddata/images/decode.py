"""Encoded images to pixels, by their header: common JPEGs by torchvision, everything else by Pillow.

The header is read first, and an image over the pixel limit is refused before anything is allocated. Which decoder
reads an image depends on its header alone, never on another decoder's failure, so that equal bytes give equal pixels.
EXIF orientation is not applied, alpha is dropped, and of several frames the first counts: what training sets are
commonly read as. Trade-off: PNGs cost 50 us more than they would with torchvision, whose decode_png ends the whole
process with a segmentation fault on a PNG with one damaged byte (seen with 0.29).

Shapes: H, W image height and width in pixels.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io  # noqa: F401  # registers the operators that are called below
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kddata.errors import BadImageError

try:
    import simplejpeg
except ImportError:  # an extra: kddata[fast]
    simplejpeg = None

_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_PIL_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # convert() keeps 8 bits
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm"}
_JPEG_START = b"\xff\xd8\xff"
_proofs_left: int | None = 8  # None once one has failed
_log = logging.getLogger(__name__)
_RGB = 3  # torchvision.io.ImageReadMode.RGB.value
# What Pillow's plugins raise on bytes that are not what they claim to be; it promises no common base.
_PIL_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def image_size(data: bytes) -> tuple[int, int]:
    """(height_px, width_px), from the header alone. Raises BadImageError for what is no image."""
    if data.startswith(_JPEG_START):
        frame = _jpeg_header(data)
        return frame.height_px, frame.width_px
    with _opened(data) as image:
        return image.height, image.width


def image_suffix(data: bytes) -> str | None:
    """The usual file name ending of these bytes, such as "jpg", from their header; None for what is no image."""
    try:
        with _opened(data) as image:
            return _SUFFIXES.get(image.format or "")
    except BadImageError:
        return None


def image_hash(data: bytes) -> int:
    """A 64-bit BLAKE2b hash of an encoded image."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def decode(data: bytes, *, max_pixels: int, rows: int | None = None) -> Tensor:
    """The pixels of an encoded image, uint8 [3, H, W], RGB, with the channels innermost in memory.

    Greyscale fills three channels; palettes, CMYK and alpha become RGB; 16-bit channels keep their high byte.

    Args:
        rows: only so many rows from the top are wanted: there may be fewer than H then, with the same pixels. Damage
            below them may go unnoticed. It saves time where simplejpeg is installed.

    Raises BadImageError for no image, for one that is cut or damaged, and for one of more than max_pixels pixels.
    """
    if data.startswith(_JPEG_START):
        frame = _jpeg_header(data)
        if frame.common:
            _check_pixels(frame.height_px, frame.width_px, max_pixels)
            first = None if rows is None else _first_rows(data, frame, rows)
            return _decode_jpeg(data) if first is None else first
    with _opened(data) as image:
        _check_pixels(image.height, image.width, max_pixels)
        if image.mode.startswith("I;16"):  # convert() would clip these to white
            pixels = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        elif image.mode in _PIL_MODES:
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        else:
            raise _bad(f"{image.format} in mode {image.mode}, which has no 8-bit RGB form")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: bytes) -> Tensor:
    try:
        # torchvision.io.decode_jpeg, without its deprecation warning at every call
        return torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB, False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2].rpartition(", ")[2]
        raise _bad(f"JPEG of {len(data)} bytes: {reason}") from error


def _check_pixels(height_px: int, width_px: int, max_pixels: int) -> None:
    if height_px * width_px > max_pixels:
        raise BadImageError(
            f"an image has at most {max_pixels} pixels",
            actual=f"{width_px} x {height_px} px by its header, not decoded",
            fix="raise limits.pixels, or leave the image out",
        )


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image by Pillow, its header alone read; what Pillow finds wrong with it becomes a BadImageError."""
    if not data:
        raise _bad("zero bytes: an empty file, one that a truncated tar has lost, or one of more than 1 GiB")
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        start = data[:12].decode("ascii", "backslashreplace")
        raise _bad(f"{len(data)} bytes that start with {start!r}, no known image format") from error
    except _PIL_ERRORS as error:
        raise _bad(f"{len(data)} bytes: {error}") from error


class _Frame(NamedTuple):
    """What the frame header of a JPEG says. `common`: it has 8 bits and is greyscale or in three channels."""

    height_px: int
    width_px: int
    common: bool
    marker: int
    position: int  # of what follows the marker
    channels: int


def _jpeg_header(data: bytes) -> _Frame:
    """The first frame header. Walks segments as libjpeg does, so that both see one frame header.

    Pillow's look would cost 55 us instead of 3.
    """
    try:
        frame = _jpeg_frame(data)
    except (IndexError, struct.error) as error:
        raise _bad(f"JPEG of {len(data)} bytes, cut inside the header") from error
    if frame.height_px < 1 or frame.width_px < 1:
        raise _bad(f"JPEG of {frame.width_px} x {frame.height_px} px")
    return frame


def _jpeg_frame(data: bytes) -> _Frame:
    for marker, position in _segments(data, 2):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, position + 2)
            return _Frame(height, width, bits == 8 and channels in (1, 3), marker, position, channels)
        if marker in (0xD8, 0xD9, 0xDA):
            break
    raise _bad("a JPEG without a frame header")


def _segments(data: bytes, position: int) -> Iterator[tuple[int, int]]:
    """(marker, position of what follows it) of the segments from here on. Stops at no marker by itself."""
    while True:
        while data[position] != 0xFF:
            position += 1
        while data[position] == 0xFF:
            position += 1
        marker, position = data[position], position + 1
        if marker <= 0x01 or 0xD0 <= marker <= 0xD7:
            continue  # stuffed zero, TEM, restarts: markers without a length
        yield marker, position
        (length,) = struct.unpack_from(">H", data, position)
        if length < 2:
            raise _bad("a JPEG with a segment of negative length")
        position += length


def _first_rows(data: bytes, frame: _Frame, rows: int) -> Tensor | None:
    """The first rows of a JPEG and a few more, decoded from a copy whose header says that there are no others.

    A sequential JPEG of one scan holds its rows from top to bottom in rows of blocks (MCUs): a decoder that is told of
    fewer stops there, and only the lowest of what it then gives may differ, since upsampled colours look at the row
    of blocks below. So one more of them is kept. Progressive images hold every row in each scan. None where that cannot
    be had or saves nothing, and without simplejpeg: torchvision's decoder tells stderr of the bytes that are left.

    Both are builds of libjpeg-turbo and give equal pixels; the first few images of each process prove it, and where
    they do not, simplejpeg is not used.
    """
    global _proofs_left
    if simplejpeg is None or _proofs_left is None or frame.marker not in (0xC0, 0xC1):
        return None
    factors = [data[frame.position + 9 + 3 * channel] & 0x0F for channel in range(frame.channels)]
    block_px = 8 * (max(factors) if frame.channels > 1 else 1)
    wanted = (-(-rows // block_px) + 1) * block_px
    if rows < 1 or wanted >= frame.height_px or not _is_one_scan(data, frame):
        return None
    shorter = bytearray(data)
    struct.pack_into(">H", shorter, frame.position + 3, wanted)
    try:
        first = torch.from_numpy(simplejpeg.decode_jpeg(shorter, strict=False)).permute(2, 0, 1)
    except ValueError as error:
        raise _bad(f"JPEG of {len(data)} bytes: {error}") from error
    if _proofs_left:
        _proofs_left -= 1
        whole = _decode_jpeg(data)
        if not torch.equal(first[:, :rows], whole[:, :rows]):
            _proofs_left = None
            _log.warning("simplejpeg gives other pixels here than torchvision: it is not used, which costs time")
            return whole
    return first


def _is_one_scan(data: bytes, frame: _Frame) -> bool:
    """Whether the first scan holds all channels, so that there is no other; a second frame header is none of ours."""
    try:
        (length,) = struct.unpack_from(">H", data, frame.position)
        for marker, position in _segments(data, frame.position + length):
            if marker == 0xDA:
                return data[position + 2] == frame.channels
            if marker in (0xD8, 0xD9) or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                return False
    except (IndexError, struct.error):
        pass
    return False


def _bad(actual: str) -> BadImageError:
    return BadImageError(
        "an image is a whole file of a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM)",
        actual=actual,
        fix="mend the file or leave it out; limits.bad_images bounds how many such images a run takes",
    )
