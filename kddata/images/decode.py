"""Encoded images to pixels, by their header: JPEG and plain PNG by torchvision, everything else by Pillow.

The header is read first, and an image over the pixel limit is refused before anything is allocated. Which decoder
reads an image depends on its header alone, never on another decoder's failure, so that equal bytes give equal pixels.
EXIF orientation is not applied, alpha is dropped, and of several frames the first counts: what training sets are
commonly read as. Trade-off: an own look at JPEG and PNG headers (5 us) instead of Pillow's (55 us).

Shapes: H, W image height and width in pixels.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.io  # noqa: F401  # registers the operators that are called below
from PIL import Image
from torch import Tensor

from kddata.errors import BadImageError

_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_PIL_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # convert() keeps 8 bits
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm"}
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


@dataclass(frozen=True, kw_only=True)
class _Header:
    format: str
    height_px: int
    width_px: int
    plain: bool  # for torchvision: 8 bits, greyscale or RGB


def image_size(data: bytes) -> tuple[int, int]:
    """(height_px, width_px), from the header alone. Raises BadImageError for what is no image."""
    header = _header(data)
    return header.height_px, header.width_px


def image_suffix(data: bytes) -> str | None:
    """The usual file name ending of these bytes, such as "jpg", from their header; None for what is no image."""
    try:
        return _SUFFIXES.get(_header(data).format)
    except BadImageError:
        return None


def image_hash(data: bytes) -> int:
    """A 64-bit BLAKE2b hash of an encoded image."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def decode(data: bytes, *, max_pixels: int) -> Tensor:
    """The pixels of an encoded image, uint8 [3, H, W], RGB, with the channels innermost in memory.

    Greyscale fills three channels; palettes, CMYK and alpha become RGB; 16-bit channels keep their high byte.

    Raises BadImageError for no image, for one that is cut or damaged, and for one of more than max_pixels pixels.
    """
    header = _header(data)
    if header.height_px * header.width_px > max_pixels:
        raise BadImageError(
            f"an image has at most {max_pixels} pixels",
            actual=f"{header.width_px} x {header.height_px} px by its header, not decoded",
            fix="raise limits.pixels, or leave the image out",
        )
    if not header.plain:
        return _decode_pillow(data)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        if header.format == "JPEG":
            # torchvision.io.decode_jpeg without its deprecation warning at every call
            return torch.ops.image.decode_jpeg(encoded, _RGB, False)
        return torch.ops.image.decode_png(encoded, _RGB, False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2].rpartition(", ")[2]
        raise _bad(f"{header.format} of {len(data)} bytes: {reason}") from error


def _decode_pillow(data: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            if image.mode.startswith("I;16"):  # convert() would clip these to white
                pixels = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            elif image.mode in _PIL_MODES:
                pixels = np.array(image.convert("RGB"))
            else:
                raise _bad(f"{image.format} in mode {image.mode}, which has no 8-bit RGB form")
    except _PIL_ERRORS as error:
        raise _bad(f"{len(data)} bytes: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _header(data: bytes) -> _Header:
    if not data:
        raise _bad("zero bytes")
    try:
        if data[:3] == b"\xff\xd8\xff":
            header = _jpeg_header(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
            header = _Header(format="PNG", height_px=height, width_px=width, plain=bits == 8 and color in (0, 2))
        else:
            with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
                assert image.format is not None
                header = _Header(format=image.format, height_px=image.height, width_px=image.width, plain=False)
    except (IndexError, struct.error) as error:
        raise _bad(f"{len(data)} bytes, cut inside the header") from error
    except _PIL_ERRORS as error:
        start = data[:12].decode("ascii", "backslashreplace")
        raise _bad(f"{len(data)} bytes that start with {start!r}, no known image format") from error
    if header.height_px < 1 or header.width_px < 1:
        raise _bad(f"{header.format} of {header.width_px} x {header.height_px} px")
    return header


def _jpeg_header(data: bytes) -> _Header:
    """Walks segments as libjpeg does, up to the frame header. Raises IndexError or struct.error where bytes end."""
    position = 2
    while True:
        while data[position] != 0xFF:
            position += 1
        while data[position] == 0xFF:
            position += 1
        marker, position = data[position], position + 1
        if marker <= 0x01 or 0xD0 <= marker <= 0xD7:
            continue  # stuffed zero, TEM, restarts: markers without a length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, position + 2)
            return _Header(format="JPEG", height_px=height, width_px=width, plain=bits == 8 and channels in (1, 3))
        if marker in (0xD8, 0xD9, 0xDA):
            raise _bad("a JPEG without a frame header")
        (length,) = struct.unpack_from(">H", data, position)
        if length < 2:
            raise _bad("a JPEG with a segment of negative length")
        position += length


def _bad(actual: str) -> BadImageError:
    return BadImageError(
        "an image is a whole file of a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM)",
        actual=actual,
        fix="mend the file or leave it out; limits.bad_images bounds how many such images a run takes",
    )
