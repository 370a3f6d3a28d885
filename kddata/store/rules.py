"""Rules: what a manifest holds, checked before anything in it is used.

A seal tells accidents from what was written, not what an attacker wrote from what this library writes. After this
check, every name is one that this library gives to a file of a store, every number is a small whole one, and every
hash is a hash; what files hold is checked when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kddata.cards import StoreSpec
from kddata.errors import StoreDamagedError

_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = 1 << 53
_MOST_VIEWS = 1 << 20
_NUMBERS = ("rows", "bytes", "images", "number", "shard", "piece", "start", "stop", "view_start", "view_stop")


def check(content: dict[str, Any], *, records: set[str], labels_name: Callable[[int, str], str], where: str) -> None:
    """Raises StoreDamagedError, naming the entry, for what no manifest of this library holds.

    Args:
        records: names of the records that a manifest of this generation may fold in.
        labels_name: of the label shard of a unit, by number and format.
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
        "units": list,
        "image_shards": list,
        "bad": list,
        "views_per_image": int,
        "first_view": int,
    }
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
    for name, sha256 in content["files"].items():
        require(name in records, "files are records of the store", name)
        require(_is_hash(sha256), "a file has a SHA-256", sha256)
    for pair in content["bad"]:
        texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        require(texts, "bad images have an id and a reason", pair)
    for shard in content["image_shards"]:
        _check_shard(shard, require)
    for number, unit in enumerate(content["units"]):
        _check_unit(unit, number, labels_name(number, format), len(content["image_shards"]), require)


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
    keys = {"file", "sha256", *_NUMBERS}
    require(isinstance(unit, dict) and unit.keys() == keys, f"a unit has {sorted(keys)}", unit)
    numbers = all(_is_number(unit[name]) for name in _NUMBERS)
    require(numbers and unit["number"] == number, f"unit {number} stands in its place, with whole numbers", unit)
    require(unit["file"] == file, "a unit's file has the unit's name", unit["file"])
    require(_is_hash(unit["sha256"]), "a unit has a SHA-256", unit["sha256"])
    ranges = unit["start"] <= unit["stop"] and unit["view_start"] < unit["view_stop"] <= _MOST_VIEWS
    require(ranges and unit["shard"] < num_shards, "a unit is a stretch of an image shard and of views", unit)


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
