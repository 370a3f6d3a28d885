"""What a source of images is: the values that it gives, its protocol, and the rules that every kind of source keeps.

A source names encoded images and reads their bytes; it never decodes one. Trade-off: a scan walks a whole image shard
before its first image is read, so that every image has a recorded place, and reading needs no scan ever again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kddata.errors import SourceError

SourceKind = Literal["tar", "folder", "parquet"]

# What Pillow and torchvision read that people keep image sets in; anything else beside the images is left alone.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
MAX_IMAGE_BYTES = 1 << 30  # of an encoded image; a larger one is recorded with no bytes, and so is a bad image
NO_LABEL = -1  # how image sets write "none" where a number must stand
_MAX_LABEL = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ImageShard:
    """One shard of a source.

    Attributes:
        name: unique in the source and stable when the source moves; a folder is one shard named ".".
        size_bytes: of the file, of all images of a folder, or None where the storage does not say.
        num_images: in it, unreadable ones among them.
    """

    name: str
    size_bytes: int | None
    num_images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """One image and its place in its shard.

    Attributes:
        image_id: unique in the source.
        label: class index, or None.
        offset: tar: first byte of the encoded image in the file; folder: 0; parquet: row number in the file.
        length: bytes of the encoded image; parquet: 0, since finding it out would cost reading every image.
    """

    image_id: str
    label: int | None
    offset: int
    length: int


class ImageSource(Protocol):
    """Encoded images in shards. Immutable, cheap to make and to pickle; safe to use from several threads."""

    @property
    def kind(self) -> SourceKind: ...

    @property
    def location(self) -> str | tuple[str, ...]:
        """What `open_source` was given, local paths made absolute."""

    def shard_names(self) -> list[str]:
        """Names of the shards in a fixed order. Raises SourceError naming what is missing."""

    def scan(self, shard_name: str) -> tuple[ImageShard, list[ImageRef]]:
        """Walks one shard: every image in it, in a fixed order, without decoding any.

        Unreadable images are among them; reading or decoding them raises. Raises SourceError for a shard that is
        empty or damaged, for an image id that comes twice, and for a label that is not a class index.
        """

    def stream(self, shard_name: str, refs: Sequence[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        """The encoded images of these references, in this order; a reference may be repeated.

        Sequential and with large reads where the references rise by offset. Raises SourceError where the shard is gone
        or no longer holds so many bytes there.
        """

    def fetch(self, shard_name: str, ref: ImageRef) -> bytes:
        """One encoded image by its recorded place. Raises like `stream`."""


def check_image_id(image_id: str, where: str) -> str:
    """The id itself, if it can be stored, printed and joined to a path. Raises SourceError."""
    if any(ord(char) < 32 or 0xD800 <= ord(char) <= 0xDFFF for char in image_id) or not image_id:
        raise SourceError(
            "image names are UTF-8 text without control characters",
            actual=ascii(image_id),
            where=where,
            fix="rename this image",
        )
    if image_id.startswith("/") or ".." in image_id.split("/"):
        raise SourceError(
            "image names are relative and stay inside their source (no leading /, no ..)",
            actual=repr(image_id),
            where=where,
            fix="do not unpack this file; make it again with relative names",
        )
    return image_id


def check_label(label: int, image_id: str, where: str) -> int | None:
    """The class index itself, or None for -1. Raises SourceError."""
    if not NO_LABEL <= label <= _MAX_LABEL:
        raise SourceError(
            "labels are class indices from 0, or -1 for none", actual=f"{label} for {image_id!r}", where=where
        )
    return None if label == NO_LABEL else label


def check_unique(refs: Sequence[ImageRef], where: str) -> None:
    """Raises SourceError naming an image id that comes twice, or where there is no image at all."""
    if not refs:
        raise SourceError(
            "an image shard holds at least one image",
            actual="none",
            where=where,
            fix=f"leave it out of `images`; images are files ending in {', '.join(IMAGE_SUFFIXES)}",
        )
    seen: set[str] = set()
    for ref in refs:
        if ref.image_id in seen:
            raise SourceError(
                "image ids are unique in a source",
                actual=f"{ref.image_id!r} twice",
                where=where,
                fix="rename one of them, or leave it out",
            )
        seen.add(ref.image_id)


def is_image_suffix(suffix: str) -> bool:
    """Whether a file name ending (no dot) is an image's."""
    return suffix.lower() in IMAGE_SUFFIXES
