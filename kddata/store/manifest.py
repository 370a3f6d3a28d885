"""The records of a store, as values and as sealed JSON: its header, units, receipts and manifest."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kddata.cards import StoreSpec, differences
from kddata.errors import StoreDamagedError, StoreMismatchError, StoreMissingError
from kddata.store import naming, rules
from kddata.store.entries import IMAGE_SHARDS, UNITS, Entries, Part
from kddata.store.naming import HEADER, MANIFEST
from kddata.store.sealing import seal, unseal
from kddata.store.storage import Storage, read_or_none
from kddata.store.units import PlannedUnits

HEADER_KEYS = ("fingerprint", "first_view", "format_version", "images", "libraries", "spec", "views_per_image")
_LIBRARIES = ("kddata", "numpy", "pillow", "pyarrow", "torch", "torchvision")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedShard:
    """One image shard as the store knows it, and the hash of its index.

    `name` is relative to the store's image location; `size_bytes` is None where it is not known.
    """

    name: str
    size_bytes: int | None
    num_images: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What is known of one finished unit.

    Attributes:
        unit: its number.
        fingerprint: of the spec it was labelled by.
        rows, bytes, sha256: of its label shard.
        images: how many images it holds; `bad` lists the others as (image id, reason).
        correct: rows whose most probable class is the ground truth, of the `labelled` ones that have one.
        entropy_sum: over rows, of the entropy in nats at temperature 1 of the kept classes and the tail as one more.
        tail_sum: over rows, of the tail mass at temperature 1.
    """

    unit: int
    fingerprint: str
    rows: int
    bytes: int
    sha256: str
    images: int
    bad: tuple[tuple[str, str], ...]
    correct: int
    labelled: int
    entropy_sum: float
    tail_sum: float


def plan_units(
    num_images: Sequence[int],
    *,
    views: tuple[int, int],
    unit_images: int,
    unit_views: int | None,
    base: dict[str, Any] | None = None,
) -> PlannedUnits:
    """All units over views `views[0]` to `views[1]`.

    Args:
        base: the manifest of the generation before, whose units are left out; numbers go on from its last one.
    """
    first, stop = views
    known, there = (0, 0) if base is None else (len(base["image_shards"]), base["views_per_image"])
    return PlannedUnits(
        num_images,
        views=[(first + there if shard < known else first, stop) for shard in range(len(num_images))],
        unit_images=unit_images,
        unit_views=unit_views,
        first_number=0 if base is None else len(base["units"]),
    )


def header(
    spec: StoreSpec,
    *,
    location: str | tuple[str, ...],
    kind: str,
    views_per_image: int,
    first_view: int = 0,
    made_with: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The content of store.json. `made_with`: versions of the libraries that made the pixels; None for those here."""
    return {
        "first_view": first_view,
        "fingerprint": spec.fingerprint,
        "format_version": spec.format_version,
        "images": {"kind": kind, "location": location if isinstance(location, str) else list(location)},
        "libraries": made_with or libraries(),
        "spec": spec.to_json(),
        "views_per_image": views_per_image,
    }


def require_same(stored: dict[str, Any], wanted: dict[str, Any], *, where: str) -> None:
    """Raises StoreMismatchError naming every field in which two headers differ; library versions may."""

    def flat(value: dict[str, Any]) -> dict[str, Any]:
        views = {key: value[key] for key in ("first_view", "views_per_image")}
        return {**value["spec"], "images": value["images"], **views}

    found = differences(flat(stored), flat(wanted))
    if found:
        raise StoreMismatchError(
            "a store keeps what it was begun with",
            actual="; ".join(f"{key}: stored {mine!r}, asked {theirs!r}" for key, mine, theirs in found),
            where=where,
            fix="name another store, or go back to the stored values (nothing was changed); `kddata extend` adds "
            "views and images to a finished store",
        )


def receipt_bytes(receipt: Receipt) -> bytes:
    return seal(dataclasses.asdict(receipt))


def parse_receipt(data: bytes, *, unit: int, fingerprint: str, where: str) -> Receipt:
    """A receipt, which must be of this unit and this spec."""
    value = unseal(data, where=where)
    value["bad"] = tuple((str(image_id), str(reason)) for image_id, reason in value["bad"])
    receipt = Receipt(**value)
    if (receipt.unit, receipt.fingerprint) != (unit, fingerprint):
        raise StoreMismatchError(
            f"a receipt is of its unit, {unit}, and its store's spec",
            actual=f"unit {receipt.unit} of spec {receipt.fingerprint}",
            where=where,
        )
    return receipt


def newest(storage: Storage) -> tuple[str, bytes] | None:
    """Name and bytes of the newest manifest; None where there is none. Generations are tried from 1 on: no listing."""
    found, generation = None, 1
    while (data := read_or_none(storage, naming.manifest_name(generation))) is not None:
        found, generation = (naming.manifest_name(generation), data), generation + 1
    return found


def publish(storage: Storage, content: dict[str, Any]) -> None:
    """Publishes a manifest, its copy first, unless there is one of its generation."""
    name, data = naming.manifest_name(content["generation"]), seal(content)
    with storage.replacing(naming.twin(name)) as out:
        out.write(data)
    storage.create(name, data)


def parse(storage: Storage, data: bytes, *, name: str, salvage: bool = False) -> dict[str, Any]:
    """The content of the manifest, or the copy of one, that lies under this name. Raises like `unseal`.

    Its `units` and `image_shards` are sequences of dicts; those in parts are read at the first use, with `salvage` from
    the copies of parts that are damaged.
    """
    where = f"{storage.url}/{name}"
    content = unseal(data, where=where)
    generation = content.get("generation")
    if not (type(generation) is int and 0 < generation < 1_000_000) or not name.startswith(
        naming.manifest_name(generation).removesuffix(".json")
    ):
        raise StoreDamagedError(
            "a manifest is of the generation that it is named by", actual=f"generation {generation}", where=where
        )
    rules.check(content, where=where)
    if "parts" in content:
        parts = {key: [Part(**part) for part in parts] for key, parts in content.pop("parts").items()}
        num_shards, format = sum(part.entries for part in parts["image_shards"]), content["spec"]["format"]
        for kind in (IMAGE_SHARDS, UNITS):
            content[kind.key] = Entries(
                storage, kind, parts[kind.key], format=format, num_shards=num_shards, salvage=salvage
            )
    return content


def find(storage: Storage) -> dict[str, Any] | None:
    """The content of the newest manifest; None where there is none."""
    found = newest(storage)
    return None if found is None else parse(storage, found[1], name=found[0])


def load(storage: Storage) -> dict[str, Any]:
    """The content of the newest manifest. Raises StoreMissingError, saying whether there is an unfinished store."""
    committed = find(storage)
    if committed is not None:
        return committed
    if read_or_none(storage, HEADER) is None:
        raise StoreMissingError(f"a label store is a folder with a {MANIFEST}", where=storage.url, fix="check the path")
    names = storage.sizes()
    committed = find(storage)  # it may have been published, and its receipts removed, since the first look
    if committed is not None:
        return committed
    manifests = [name for name in names if name.startswith("manifest-")]
    if manifests and not any(name.startswith("receipts/") for name in names):
        raise StoreDamagedError(
            "every manifest stays in its store",
            actual=f"{', '.join(manifests)} and no {MANIFEST}",
            where=storage.url,
            fix="`kddata repair` restores it from its copy",
        )
    raise StoreMissingError(
        "a store is read when its labelling has finished",
        actual=f"{len(storage.sizes('receipts'))} finished units and no manifest",
        where=storage.url,
        fix="run the same label command again; finished units are kept",
    )


@functools.cache
def libraries() -> dict[str, str]:
    """Public versions of the libraries that pixels, labels and bytes depend on."""
    return {name: importlib.metadata.version(name).split("+")[0] for name in _LIBRARIES}


def warn_of_libraries(stored: dict[str, str], *, where: str) -> None:
    """Logs a warning where this process has other library versions than the store was made with."""
    found = differences(stored, libraries())
    if found:
        _log.warning(
            "%s was made with other library versions, so views may not replay to the very pixels: %s",
            where,
            "; ".join(f"{name} {mine} then, {theirs} now" for name, mine, theirs in found),
        )
