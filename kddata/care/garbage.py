"""Garbage: files in a store's folder that belong to nothing: temporary files of writers that died, records that a
commit outlived, shards that no manifest names.

What an extension under way has finished is kept. Locks of drivers that died go with the lock that is taken here.
Trade-off: temporary files do not say whose they are, so a store that someone writes to is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kddata.errors import StoreMissingError
from kddata.store import driving, manifest, naming
from kddata.store.lock import LOCK
from kddata.store.sealing import unseal
from kddata.store.storage import TEMPORARY, Storage, open_storage
from kddata.store.verify import wanted_files


@dataclass(frozen=True, kw_only=True)
class Stray:
    """A file that is no part of its store. `file` is relative to the store."""

    file: str
    num_bytes: int
    reason: str


def collect_garbage(url: str, *, dry_run: bool = False) -> list[Stray]:
    """The strays of a store, by name; they are removed, unless it is a dry run.

    A store that is not finished has temporary files alone as strays: all else is what labelling goes on from.

    Raises StoreMissingError where there is no store, StoreBusyError where someone writes to it, StoreDamagedError for a
    damaged manifest, which would make strays of all that it names.
    """
    storage = open_storage(url)
    if dry_run:
        return _strays(storage)
    strays = _strays(storage)  # before a lock is laid into what is no store
    with driving(url):
        for stray in strays:
            storage.remove(stray.file)
    return strays


def _strays(storage: Storage) -> list[Stray]:
    committed, sizes = manifest.find(storage), storage.sizes()
    if committed is None:
        if naming.HEADER not in sizes:
            raise StoreMissingError("there is a store to clean", actual="none", where=storage.url, fix="check the path")
        kept = {name for name in sizes if not TEMPORARY.search(name)}
    else:
        kept = set(wanted_files(committed)) | _of_extension(storage, committed, set(sizes))
    return [
        Stray(file=name, num_bytes=num_bytes, reason=_reason(name))
        for name, num_bytes in sizes.items()
        if name not in kept and not LOCK.search(name)
    ]


def _of_extension(storage: Storage, committed: dict[str, Any], sizes: set[str]) -> set[str]:
    """What an extension of this generation, under way, has written."""
    name = naming.extension_name(committed["generation"] + 1)
    if name not in sizes:
        return set()
    record = unseal(storage.read(name), where=f"{storage.url}/{name}")
    units = manifest.plan_units(
        [shard["num_images"] for shard in record["shards"]],
        views=(record["first_view"], record["first_view"] + record["views_per_image"]),
        unit_images=record["spec"]["unit_images"],
        unit_views=record["spec"]["unit_views"],
        base=committed,
    )
    indexes = {naming.index_name(number) for number in range(len(record["shards"]))}
    labels = {naming.labels_name(unit.number, record["spec"]["format"]) for unit in units}
    return {name} | indexes | labels | {naming.receipt_name(unit.number) for unit in units}


def _reason(name: str) -> str:
    if TEMPORARY.search(name):
        return "a temporary file"
    if name.startswith(("receipts/", "extension-")):
        return "a record that a commit outlived"
    return "no manifest names it"
