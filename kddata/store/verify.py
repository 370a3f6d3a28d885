"""Verify: reads every file of a committed store once and lists what is not as its manifest says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kddata.errors import StoreDamagedError, StoreVersionError
from kddata.store import manifest, naming
from kddata.store.entries import Entries, numbers, texts
from kddata.store.storage import Storage, open_storage, read_or_none

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

    Files are judged by the newest manifest and its parts, or by their copies where those are damaged. Where both are,
    they are the only problems listed, as nothing else can be judged without them.
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
    try:
        wanted = wanted_files(committed)
    except StoreDamagedError as error:  # neither a part nor its copy
        checked = (_problem(storage, found, part, None, sha256) for part, sha256 in _parts(committed))
        problems += [problem for problem in checked if problem is not None]
        return sorted(problems or [Problem(file=name, reason=str(error))], key=lambda problem: problem.file)
    named = {problem.file for problem in problems}
    problems += [Problem(file=name, reason="extra: no part of the store") for name in found if name not in wanted]
    for name, (num_bytes, sha256) in wanted.items():
        if name not in named and (problem := _problem(storage, found, name, num_bytes, sha256)) is not None:
            problems.append(problem)
    for key in ("rows", "bytes"):
        total, units = committed["totals"][key], int(numbers(committed["units"], key).sum())
        if total != units:
            problems.append(Problem(file=naming.MANIFEST, reason=f"counts {total} {key}, its units {units}"))
    return sorted(problems, key=lambda problem: problem.file)


def _problem(
    storage: Storage, found: dict[str, int], name: str, num_bytes: int | None, sha256: str | None
) -> Problem | None:
    """What is wrong with a file, where that many bytes and that hash were written."""
    if name not in found:
        return Problem(file=name, reason="missing")
    if num_bytes is not None and found[name] != num_bytes:
        return Problem(file=name, reason=f"has {found[name]} bytes instead of {num_bytes}")
    try:
        if sha256 is None or _sha256(storage, name) == sha256:
            return None
    except OSError as error:  # gone meanwhile, a folder of that name, or not to be read
        return Problem(file=name, reason=f"cannot be read: {error}")
    return Problem(file=name, reason="its bytes differ from those that were written (SHA-256)")


def _parts(committed: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of the parts of a manifest and of their copies."""
    for key in ("image_shards", "units"):
        if isinstance(committed[key], Entries):
            for part in committed[key].parts:
                yield part.file, part.sha256
                yield naming.twin(part.file), part.sha256


def wanted_files(committed: dict[str, Any]) -> dict[str, tuple[int | None, str | None]]:
    """(bytes, SHA-256) of every file of a store, by name, where its newest manifest knows them.

    Raises StoreDamagedError for parts of it that are damaged.
    """
    name = naming.manifest_name(committed["generation"])
    wanted: dict[str, tuple[int | None, str | None]] = {name: (None, None)}
    for older, sha256 in committed["files"].items():
        wanted[older] = (None, sha256)
        if older.startswith("manifest-"):
            wanted[naming.twin(older)] = (None, sha256)
    wanted[naming.twin(name)] = (None, None)
    wanted |= {part: (None, sha256) for part, sha256 in _parts(committed)}
    for number, sha256 in enumerate(texts(committed["image_shards"], "sha256")):
        wanted[naming.index_name(number)] = (None, sha256)
    for unit in committed["units"]:
        wanted[unit["file"]] = (unit["bytes"], unit["sha256"])
    return wanted


def _newest(storage: Storage, found: dict[str, int]) -> str:
    """The name of the newest manifest that there is or should be. Raises StoreMissingError."""
    generations = sorted({int(match[1]) for name in found if (match := _MANIFEST.match(name))})
    if generations:
        name = naming.manifest_name(generations[-1])
        under_way = naming.extension_name(generations[-1]) in found or any(x.startswith("receipts/") for x in found)
        if name in found or not under_way:
            return name
        if generations[-1] > 1:  # a commit that died between the copy and the manifest
            return naming.manifest_name(generations[-1] - 1)
    manifest.load(storage)
    return naming.MANIFEST


def _authority(storage: Storage, name: str, found: dict[str, int]) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The content of a manifest, out of it or its copy, and what is wrong with these two."""
    committed, judge, problems = None, b"", []
    for one in (name, naming.twin(name)):
        data = read_or_none(storage, one)
        if data is None:
            problems.append(Problem(file=one, reason="missing"))
            continue
        try:
            content = manifest.parse(storage, data, name=one, salvage=True)
        except StoreDamagedError as error:
            problems.append(Problem(file=one, reason=str(error)))
            continue
        if committed is None:
            committed, judge = content, data
        elif data != judge:
            problems.append(Problem(file=one, reason=f"is no copy of {name}"))
    return committed, problems


def _sha256(storage: Storage, name: str) -> str:
    digest = hashlib.sha256()
    for data in storage.chunks(name):
        digest.update(data)
    return digest.hexdigest()
