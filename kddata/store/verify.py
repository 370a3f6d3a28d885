"""Verify: reads every file of a committed store once and lists what is not as its manifest says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kddata.errors import StoreDamagedError, StoreVersionError
from kddata.store import manifest
from kddata.store.storage import Storage, open_storage


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A file of a store that is not as it should be. `file` is relative to the store."""

    file: str
    reason: str


def verify_store(url: str) -> list[Problem]:
    """All problems of the store at a URL, even of one that cannot be opened; see `find_problems`."""
    return find_problems(open_storage(url))


def find_problems(storage: Storage) -> list[Problem]:
    """All problems of a store, by file; an empty list says that every byte is the one that was written.

    A damaged manifest is the only problem listed, as nothing else can be judged without it.
    Raises StoreMissingError where there is no committed store.
    """
    try:
        committed = manifest.load(storage)
    except (StoreDamagedError, StoreVersionError) as error:
        return [Problem(file=manifest.MANIFEST, reason=str(error))]
    wanted = _wanted(committed)
    found = storage.sizes()
    problems = [Problem(file=name, reason="extra: no part of the store") for name in found if name not in wanted]
    for name, (num_bytes, sha256) in wanted.items():
        if name not in found:
            problems.append(Problem(file=name, reason="missing"))
        elif num_bytes is not None and found[name] != num_bytes:
            problems.append(Problem(file=name, reason=f"has {found[name]} bytes instead of {num_bytes}"))
        elif sha256 is not None and _sha256(storage, name) != sha256:
            problems.append(Problem(file=name, reason="its bytes differ from those that were written (SHA-256)"))
    for key in ("rows", "bytes"):
        total, units = committed["totals"][key], sum(unit[key] for unit in committed["units"])
        if total != units:
            problems.append(Problem(file=manifest.MANIFEST, reason=f"counts {total} {key}, its units {units}"))
    return sorted(problems, key=lambda problem: problem.file)


def _wanted(committed: dict[str, Any]) -> dict[str, tuple[int | None, str | None]]:
    """(bytes, SHA-256) of every file of the store, where the manifest knows them."""
    wanted: dict[str, tuple[int | None, str | None]] = {manifest.MANIFEST: (None, None)}
    wanted |= {name: (None, sha256) for name, sha256 in committed["files"].items()}
    for number, shard in enumerate(committed["image_shards"]):
        wanted[manifest.index_name(number)] = (None, shard["sha256"])
    for unit in committed["units"]:
        wanted[unit["file"]] = (unit["bytes"], unit["sha256"])
    return wanted


def _sha256(storage: Storage, name: str) -> str:
    digest = hashlib.sha256()
    for data in storage.chunks(name):
        digest.update(data)
    return digest.hexdigest()
