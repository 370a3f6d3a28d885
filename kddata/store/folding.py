"""Folding: the receipts of finished units become the next manifest.

They pass by one after the other, in the order of units; none is held beyond what the manifest keeps of it, and where
that lies in parts, no more than a few thousand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from kddata.store import entries, naming
from kddata.store.entries import IMAGE_SHARDS, UNITS, Entries, Kind, Part
from kddata.store.manifest import IndexedShard, Receipt
from kddata.store.storage import Storage
from kddata.store.units import Unit

_SUMS = ("bytes", "correct", "entropy_sum", "labelled", "rows", "tail_sum")
_NOTHING: dict[str, Any] = {"bad": [], "files": {}, "generation": 0, "image_shards": [], "totals": {}, "units": []}


def fold(
    storage: Storage,
    head: dict[str, Any],
    shards: Sequence[IndexedShard],
    units: Sequence[Unit],
    receipts: Iterable[Receipt],
    *,
    files: dict[str, str],
    base: dict[str, Any] | None = None,
    before_publishing: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The content of a manifest: of generation 1, or of the one after `base`, which it holds all of. Writes its parts.

    Args:
        shards: all image shards.
        units, receipts: what this generation adds, both by number.
        files: the SHA-256s of the records that it folds in.
        before_publishing: called before a part is published; raises where it came too late.
    """
    before = base or _NOTHING
    bad: dict[str, str] = {}
    sums = dict.fromkeys(_SUMS, 0)

    def added() -> Iterator[dict[str, Any]]:
        for unit, receipt in zip(units, receipts, strict=True):
            bad.update(reversed(receipt.bad))
            for name in sums:
                sums[name] += getattr(receipt, name)
            yield {
                "file": naming.labels_name(unit.number, head["spec"]["format"]),
                **{name: getattr(receipt, name) for name in ("rows", "bytes", "sha256", "images")},
                **dataclasses.asdict(unit),
            }

    num_units = len(before["units"]) + len(units)
    new = {
        IMAGE_SHARDS: (dataclasses.asdict(shard) for shard in shards[len(before["image_shards"]) :]),
        UNITS: added(),
    }
    if max(num_units, len(shards)) <= entries.INLINE_MOST:
        listed: dict[str, Any] = {kind.key: [*before[kind.key], *some] for kind, some in new.items()}
    else:
        about = {"fingerprint": head["fingerprint"]}
        parts = {
            kind.key: _parts(storage, kind, before, some, about=about, before_publishing=before_publishing)
            for kind, some in new.items()
        }
        listed = {
            "format_version": entries.PARTS_VERSION,
            "parts": {key: [dataclasses.asdict(part) for part in some] for key, some in parts.items()},
        }
    bad |= dict(before["bad"])
    totals = {
        **{name: before["totals"].get(name, 0) + sums[name] for name in sums},
        "bad_images": len(bad),
        "images": sum(shard.num_images for shard in shards) - len(bad),
        "units": num_units,
    }
    return {
        **head,
        "bad": sorted(bad.items()),
        "files": {**before["files"], **files},
        "generation": before["generation"] + 1,
        "totals": totals,
        **listed,
    }


def _parts(
    storage: Storage,
    kind: Kind,
    before: dict[str, Any],
    added: Iterator[dict[str, Any]],
    *,
    about: dict[str, Any],
    before_publishing: Callable[[], None],
) -> list[Part]:
    """The parts of a generation: those of the one before, and one of what is in none yet, unless there is nothing."""
    former = before[kind.key]
    kept, listed = (former.parts, []) if isinstance(former, Entries) else ((), former)
    first = next(added, None)
    if first is None and not listed:
        return list(kept)
    rest = () if first is None else (first,)
    part = entries.write_part(
        storage,
        kind,
        (entry for some in (listed, rest, added) for entry in some),
        generation=before["generation"] + 1,
        about=about,
        before_publishing=before_publishing,
    )
    return [*kept, part]
