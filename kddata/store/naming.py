"""Naming: what the files of a store are called. Numbers are padded so that names sort as their numbers do."""

from __future__ import annotations

HEADER = "store.json"
IMAGES = "images.json"
MANIFEST = "manifest-000001.json"


def manifest_name(generation: int) -> str:
    return f"manifest-{generation:06d}.json"


def part_name(stem: str, generation: int) -> str:
    """Of the units ("units") or image shards ("images") that a manifest of this generation keeps beside it."""
    return f"{stem}-{generation:06d}.arrow"


def twin(name: str) -> str:
    """The copy of a manifest or a part of it, written just before it, or what a copy is of: each mends the other."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem.removesuffix('.copy')}.{suffix}" if stem.endswith(".copy") else f"{stem}.copy.{suffix}"


def extension_name(generation: int) -> str:
    """Of the record of an extension that is under way to this generation; it is removed when that is committed."""
    return f"extension-{generation:06d}.json"


def index_name(shard: int) -> str:
    return f"index/{shard:05d}.arrow"


def labels_name(unit: int, format: str = "arrow") -> str:
    return f"labels/{unit:06d}.{format.partition('+')[0]}"


def receipt_name(unit: int) -> str:
    return f"receipts/{unit:06d}.json"
