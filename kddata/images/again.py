"""Images again: the encoded image of a place that was recorded, checked against the hash of what was there."""

from __future__ import annotations

from collections.abc import Callable

from kddata.errors import SourceError
from kddata.images.decode import image_hash as hash_of
from kddata.images.decode import image_suffix
from kddata.images.source import ImageRef, ImageSource


def image_again(source: ImageSource, shard_name: str) -> Callable[..., tuple[str, bytes]]:
    """A function of (image_id, *, offset, length, image_hash) that gives (file name ending, bytes) of an image.

    It raises SourceError for an image whose bytes are no longer those that were labelled.
    """

    def fetch(image_id: str, *, offset: int, length: int, image_hash: int) -> tuple[str, bytes]:
        ref = ImageRef(image_id=image_id, label=None, offset=offset, length=length)
        data = source.fetch(shard_name, ref)
        if hash_of(data) != image_hash:
            raise SourceError(
                "an image is the one that was labelled",
                actual=f"other bytes under {image_id!r}",
                where=shard_name,
                fix="point `images` at the images that were labelled",
            )
        return image_suffix(data) or "jpg", data

    return fetch
