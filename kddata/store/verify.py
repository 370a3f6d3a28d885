"""Verify: reads every file of a committed store once and lists what is not as its manifest says."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from kddata.errors import StoreDamagedError, StoreVersionError
from kddata.store import manifest
from kddata.store.sealing import seal
from kddata.store.storage import Storage, open_storage

_MANIFEST = re.compile(r"manifest-(\d{6})(?:\.copy)?\.json$")


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

    Files are judged by the newest manifest, or by its copy where that is damaged. Where both are, they are the only
    problems listed, as nothing else can be judged without them.
    Raises StoreMissingError where there is no committed store.
    """
    found = storage.sizes()
    name = _newest(storage, found)
    try:
        committed, problems = _authority(storage, name, found)
    except StoreVersionError as error:
        return [Problem(file=name, reason=str(error))]
    if committed is None:
        return problems
    wanted = wanted_files(committed)
    named = {problem.file for problem in problems}
    problems += [Problem(file=name, reason="extra: no part of the store") for name in found if name not in wanted]
    for name, (num_bytes, sha256) in wanted.items():
        if name in named:
            continue
        if name not in found:
            problems.append(Problem(file=name, reason="missing"))
        elif num_bytes is not None and found[name] != num_bytes:
            problems.append(Problem(file=name, reason=f"has {found[name]} bytes instead of {num_bytes}"))
        else:
            try:
                other = sha256 is not None and _sha256(storage, name) != sha256
            except OSError as error:  # gone meanwhile, a folder of that name, or not to be read
                problems.append(Problem(file=name, reason=f"cannot be read: {error}"))
            else:
                if other:
                    reason = "its bytes differ from those that were written (SHA-256)"
                    problems.append(Problem(file=name, reason=reason))
    for key in ("rows", "bytes"):
        total, units = committed["totals"][key], sum(unit[key] for unit in committed["units"])
        if total != units:
            problems.append(Problem(file=manifest.MANIFEST, reason=f"counts {total} {key}, its units {units}"))
    return sorted(problems, key=lambda problem: problem.file)


def wanted_files(committed: dict[str, Any]) -> dict[str, tuple[int | None, str | None]]:
    """(bytes, SHA-256) of every file of a store, by name, where its newest manifest knows them."""
    name = manifest.manifest_name(committed["generation"])
    wanted: dict[str, tuple[int | None, str | None]] = {name: (None, None)}
    for older, sha256 in committed["files"].items():
        wanted[older] = (None, sha256)
        if older.startswith("manifest-"):
            wanted[manifest.twin(older)] = (None, sha256)
    wanted[manifest.twin(name)] = (None, hashlib.sha256(seal(committed)).hexdigest())
    for number, shard in enumerate(committed["image_shards"]):
        wanted[manifest.index_name(number)] = (None, shard["sha256"])
    for unit in committed["units"]:
        wanted[unit["file"]] = (unit["bytes"], unit["sha256"])
    return wanted


def _newest(storage: Storage, found: dict[str, int]) -> str:
    """The name of the newest manifest that there is or should be. Raises StoreMissingError."""
    generations = sorted({int(match[1]) for name in found if (match := _MANIFEST.match(name))})
    if generations:
        name = manifest.manifest_name(generations[-1])
        under_way = manifest.extension_name(generations[-1]) in found or any(x.startswith("receipts/") for x in found)
        if name in found or not under_way:
            return name
        if generations[-1] > 1:  # a commit that died between the copy and the manifest
            return manifest.manifest_name(generations[-1] - 1)
    manifest.load(storage)
    return manifest.MANIFEST


def _authority(storage: Storage, name: str, found: dict[str, int]) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The content of a manifest, out of it or its copy, and what is wrong with these two."""
    committed, problems = None, []
    for one in (name, manifest.twin(name)):
        data = manifest.read_or_none(storage, one)
        if data is None:
            problems.append(Problem(file=one, reason="missing"))
            continue
        try:
            content = manifest.parse(data, name=one, where=f"{storage.url}/{one}")
        except StoreDamagedError as error:
            problems.append(Problem(file=one, reason=str(error)))
            continue
        committed = committed or content
    return committed, problems


def _sha256(storage: Storage, name: str) -> str:
    digest = hashlib.sha256()
    for data in storage.chunks(name):
        digest.update(data)
    return digest.hexdigest()
