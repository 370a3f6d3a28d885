"""Images: where they lie, what they are called, their encoded bytes, and their pixels.

`open_source` turns a location into an `ImageSource` (tar, folder or parquet); `decode` turns bytes into pixels.
"""

from kddata.images.again import image_again
from kddata.images.cache import CachedSource, ImageCache
from kddata.images.decode import decode, image_hash, image_size, image_suffix
from kddata.images.files import in_order
from kddata.images.opening import open_source
from kddata.images.pack import Packed, pack
from kddata.images.source import ImageRef, ImageShard, ImageSource

__all__ = [
    "CachedSource",
    "ImageCache",
    "ImageRef",
    "ImageShard",
    "ImageSource",
    "Packed",
    "decode",
    "image_again",
    "image_hash",
    "image_size",
    "image_suffix",
    "in_order",
    "open_source",
    "pack",
]
