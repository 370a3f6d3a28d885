"""Rules: what a manifest holds, checked before anything in it is used.

A seal tells accidents from what was written, not what an attacker wrote from what this library writes. After this
check, every name is one that this library gives to a file of a store, every number is a small whole one, and every
hash is a hash; what files hold is checked when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kddata.cards import StoreSpec
from kddata.errors import StoreDamagedError
from kddata.store import naming

_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = 1 << 53
_MOST_VIEWS = 1 << 20
UNIT_NUMBERS = ("rows", "bytes", "images", "number", "shard", "piece", "start", "stop", "view_start", "view_stop")


def check(content: dict[str, Any], *, where: str) -> None:
    """Raises StoreDamagedError, naming the entry, for what no manifest of this library holds.

    Units and image shards that lie in parts are checked when these are read.
    """

    def require(holds: bool, rule: str, actual: object) -> None:
        if not holds:
            raise StoreDamagedError(rule, actual=repr(actual)[:200], where=where)

    kinds: dict[str, type | tuple[type, ...]] = {
        "spec": dict,
        "images": dict,
        "libraries": dict,
        "files": dict,
        "totals": dict,
        "bad": list,
        "generation": int,
        "views_per_image": int,
        "first_view": int,
    }
    inline = "parts" not in content
    kinds |= {"units": list, "image_shards": list} if inline else {"parts": dict}
    for key, kind in kinds.items():
        require(isinstance(content.get(key), kind), f"a manifest has {key}", content.get(key))
    for key in ("views_per_image", "first_view"):
        require(0 <= content[key] < _MOST_VIEWS, f"{key} is below {_MOST_VIEWS}", content[key])
    try:
        format = StoreSpec.from_json(content["spec"]).format
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreDamagedError("a manifest has the spec of its store", actual=repr(error), where=where) from error
    location, kind = content["images"].get("location"), content["images"].get("kind")
    require(isinstance(location, (str, list)) and isinstance(kind, str), "images have a location", content["images"])
    for key in ("bytes", "correct", "labelled", "rows", "bad_images", "images", "units"):
        require(_is_number(content["totals"].get(key)), f"totals count {key}", content["totals"].get(key))
    records = {naming.HEADER, naming.IMAGES, *(naming.manifest_name(i) for i in range(1, content["generation"]))}
    for name, sha256 in content["files"].items():
        require(name in records, "files are records of the store", name)
        require(_is_hash(sha256), "a file has a SHA-256", sha256)
    for pair in content["bad"]:
        texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        require(texts, "bad images have an id and a reason", pair)
    if not inline:
        _check_parts(content, require)
        return
    for shard in content["image_shards"]:
        _check_shard(shard, require)
    for number, unit in enumerate(content["units"]):
        _check_unit(unit, number, naming.labels_name(number, format), len(content["image_shards"]), require)


def check_unit_columns(columns: dict[str, Any], num_shards: int, *, where: str) -> None:
    """The same for units as columns, int64 [N] each but for hashes. Raises StoreDamagedError, naming the unit."""
    number = columns["number"]
    holds = (number == np.arange(len(number))) & (columns["shard"] < num_shards)
    holds &= (columns["start"] <= columns["stop"]) & (columns["view_start"] < columns["view_stop"])
    holds &= columns["view_stop"] <= _MOST_VIEWS
    for name in UNIT_NUMBERS:
        holds &= (columns[name] >= 0) & (columns[name] < _MOST)
    if not holds.all():
        first = int(np.flatnonzero(~holds)[0])
        raise StoreDamagedError(
            "a unit stands in its place, and is a stretch of an image shard and of views",
            actual=f"unit {first}: { {name: int(columns[name][first]) for name in UNIT_NUMBERS} }",
            where=where,
        )


def check_shard_columns(columns: dict[str, Any], *, where: str) -> None:
    """The same for image shards as columns."""
    holds = (columns["num_images"] >= 0) & (columns["num_images"] < _MOST)
    holds &= (columns["size_bytes"] >= -1) & (columns["size_bytes"] < _MOST)
    if not holds.all():
        first = int(np.flatnonzero(~holds)[0])
        raise StoreDamagedError("an image shard is described", actual=f"image shard {first}", where=where)


def _check_parts(content: dict[str, Any], require: Callable[[bool, str, object], None]) -> None:
    parts = content["parts"]
    require(parts.keys() == {"image_shards", "units"}, "parts are of image shards and units", sorted(parts))
    for key, stem in (("image_shards", "images"), ("units", "units")):
        names = [naming.part_name(stem, i + 1) for i in range(content["generation"])]
        require(isinstance(parts[key], list), "parts are listed", parts[key])
        for part in parts[key]:
            keys = {"file", "sha256", "entries"}
            require(isinstance(part, dict) and part.keys() == keys, f"a part has {sorted(keys)}", part)
            require(part["file"] in names, "a part has the name of its generation", part["file"])
            described = _is_hash(part["sha256"]) and _is_number(part["entries"])
            require(described, "a part has a SHA-256 and a number of entries", part)
        there = [part["file"] for part in parts[key]]
        require(there == sorted(set(there)), "parts are listed once, by generation", there)


def _check_shard(shard: Any, require: Callable[[bool, str, object], None]) -> None:
    keys = {"name", "num_images", "sha256", "size_bytes"}
    require(isinstance(shard, dict) and shard.keys() == keys, f"an image shard has {sorted(keys)}", shard)
    size = shard["size_bytes"]
    sizes = _is_number(shard["num_images"]) and (size is None or _is_number(size))
    require(
        isinstance(shard["name"], str) and sizes and _is_hash(shard["sha256"]), "an image shard is described", shard
    )


def _check_unit(
    unit: Any, number: int, file: str, num_shards: int, require: Callable[[bool, str, object], None]
) -> None:
    keys = {"file", "sha256", *UNIT_NUMBERS}
    require(isinstance(unit, dict) and unit.keys() == keys, f"a unit has {sorted(keys)}", unit)
    numbers = all(_is_number(unit[name]) for name in UNIT_NUMBERS)
    require(numbers and unit["number"] == number, f"unit {number} stands in its place, with whole numbers", unit)
    require(unit["file"] == file, "a unit's file has the unit's name", unit["file"])
    require(_is_hash(unit["sha256"]), "a unit has a SHA-256", unit["sha256"])
    ranges = unit["start"] <= unit["stop"] and unit["view_start"] < unit["view_stop"] <= _MOST_VIEWS
    require(ranges and unit["shard"] < num_shards, "a unit is a stretch of an image shard and of views", unit)


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
