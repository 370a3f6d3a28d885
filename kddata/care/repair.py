"""Repair: the damaged and missing files of a finished store, made again byte for byte.

A label shard is labelled again, an index is scanned again, a record comes out of the manifest; each replaces what is
there only if it has the hash that the manifest names. Deliberately not here: extra files, which `care.garbage` removes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kddata.errors import StoreDamagedError, StoreMismatchError
from kddata.images import ImageSource, open_source
from kddata.labelling import LabellingJob, job_spec, label_unit, load_job_teacher
from kddata.store import LabelStore, Problem, Unit, driving, manifest, naming, open_storage, verify_store
from kddata.store.entries import Entries
from kddata.store.lock import LOCK
from kddata.store.sealing import seal
from kddata.store.storage import Storage, read_or_none
from kddata.teacher import Answers

_COPIED = re.compile(r"(?:manifest|images|units)-\d{6}(?:\.copy)?\.(?:json|arrow)$")


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a repair did: files made again, how many of them were labelled again, and what is left to other means."""

    url: str
    files: tuple[str, ...]
    units: int
    left: tuple[Problem, ...]


def repair(job: LabellingJob, *, on_file: Callable[[str], None] = lambda file: None) -> Repaired:
    """Mends the store of a job; files that are sound are not touched.

    The job is the one that the store was labelled by; its images may have moved. `left` lists what is no damage to a
    file of the store: extra files.

    Args:
        on_file: called with each file that was made again.

    Raises StoreMismatchError, naming the field, for another teacher, plan or images than the store's, and for a file
    that would come out with other bytes than it had: nothing is replaced then. StoreDamagedError where no sound copy of
    a manifest is left, StoreMissingError where there is no finished store, StoreBusyError where someone writes to it.
    """
    storage = open_storage(job.store)
    if not any(name.startswith("manifest-") for name in storage.sizes()):
        manifest.load(storage)  # raises, before a lock is laid where there is no store
    with driving(job.store):
        return _repair(job, on_file)


def _repair(job: LabellingJob, on_file: Callable[[str], None]) -> Repaired:
    storage, problems = open_storage(job.store), _problems(job.store)
    restored: list[str] = []
    damaged = {problem.file for problem in problems if not problem.reason.startswith("extra")}
    manifests = [name for name in sorted(damaged, key=_manifest_first) if _COPIED.match(name)]
    for name in manifests:
        _restore_manifest(storage, name)
        on_file(name)
        restored.append(name)
    if manifests:
        problems = _problems(job.store)  # a damaged manifest may have hidden other damage
    damaged = {problem.file for problem in problems if not problem.reason.startswith("extra")}
    store = LabelStore.open(job.store)
    committed = manifest.load(storage)
    for name in sorted(damaged & {naming.HEADER, naming.IMAGES}):
        _restore_record(storage, name, committed["files"][name])
        on_file(name)
        restored.append(name)
    indexes = [i for i in range(len(store.images)) if naming.index_name(i) in damaged]
    units = [unit for unit, entry in zip(store.units(), committed["units"], strict=True) if entry["file"] in damaged]
    if indexes or units:
        teacher = load_job_teacher(job)
        source = open_source(job.images)
        _require_same(store, committed, job, teacher, source)
        for number in indexes:
            _restore_index(store, number, source)
            on_file(naming.index_name(number))
            restored.append(naming.index_name(number))
        for number in sorted({unit.shard for unit in units} - set(indexes)):
            _require_same_images(store, number, source)
        for unit in units:
            label_unit(store, unit, source, teacher, max_pixels=job.max_pixels, restore=True)
            on_file(committed["units"][unit.number]["file"])
            restored.append(committed["units"][unit.number]["file"])
    left = tuple(problem for problem in problems if problem.file not in restored)
    return Repaired(url=store.url, files=tuple(restored), units=len(units), left=left)


def _manifest_first(name: str) -> tuple[bool, str]:
    return not name.startswith("manifest-"), name  # it says what its parts are


def _problems(url: str) -> list[Problem]:
    return [problem for problem in verify_store(url) if not LOCK.search(problem.file)]


def _require_same(
    store: LabelStore, committed: dict[str, Any], job: LabellingJob, teacher: Answers, source: ImageSource
) -> None:
    """Raises StoreMismatchError naming the fields in which the job is not the one that the store was labelled by."""
    asked = manifest.header(
        job_spec(job, teacher),
        location=store.location,  # images may have moved
        kind=source.kind,
        views_per_image=job.views_per_image,
        first_view=job.first_view,
    )
    manifest.require_same(committed, asked, where=store.url)
    names = source.shard_names()
    for number, shard in enumerate(store.images):
        if number >= len(names) or names[number] != shard.name:
            raise StoreMismatchError(
                "a store is repaired from the images that were labelled",
                actual=f"images: shard number {number} is {names[number] if number < len(names) else None!r}, "
                f"stored {shard.name!r}",
                where=store.url,
                fix="name the place where these images lie",
            )


def _require_same_images(store: LabelStore, number: int, source: ImageSource) -> None:
    """Raises StoreMismatchError for an image shard that is no longer what was indexed."""
    shard = store.images[number]
    scanned, refs = source.scan(shard.name)
    whole = Unit(number=0, shard=number, piece=0, start=0, stop=shard.num_images, view_start=0, view_stop=0)
    stored = list(zip(*store.read_index(whole), strict=True))
    found = [(ref.image_id, ref.label, ref.offset, ref.length) for ref in refs]
    if shard.size_bytes not in (None, scanned.size_bytes):
        actual = f"size_bytes of {shard.name}: stored {shard.size_bytes}, found {scanned.size_bytes}"
    elif stored != found:
        i = next((i for i, pair in enumerate(zip(stored, found, strict=False)) if pair[0] != pair[1]), len(stored))
        there, here = (str(index[i]) if i < len(index) else "none" for index in (stored, found))
        actual = f"(id, label, offset, length) of image {i} of {shard.name}: stored {there}, found {here}"
    else:
        return
    raise StoreMismatchError(
        "a store is repaired from the images that were labelled",
        actual=f"images: {actual}",
        where=store.url,
        fix="bring the former images back",
    )


def _restore_index(store: LabelStore, number: int, source: ImageSource) -> None:
    stored = store.images[number]
    shard, refs = source.scan(stored.name)
    store.write_index(
        number,
        name=stored.name,
        size_bytes=shard.size_bytes,
        ids=[ref.image_id for ref in refs],
        labels=[ref.label for ref in refs],
        offsets=[ref.offset for ref in refs],
        lengths=[ref.length for ref in refs],
    )


def _restore_record(storage: Storage, name: str, sha256: str) -> None:
    """store.json or images.json, whose content the first manifest holds too."""
    first = manifest.parse(storage, storage.read(naming.MANIFEST), name=naming.MANIFEST)
    if name == naming.HEADER:
        head = {key: first[key] for key in manifest.HEADER_KEYS}
        data = seal({**head, "format_version": first["spec"]["format_version"]})
    else:
        data = seal({"shards": list(first["image_shards"])})
    assert hashlib.sha256(data).hexdigest() == sha256, f"{name} is not what the manifest was made from"
    _replace(storage, name, data)


def _restore_manifest(storage: Storage, name: str) -> None:
    """A manifest or a part of one from its copy, or the other way round: whichever is still as it was written."""
    twin = naming.twin(name)
    data = read_or_none(storage, twin)
    try:
        if data is None:
            raise StoreDamagedError("a manifest has a copy", actual="none", where=f"{storage.url}/{twin}")
        if name.endswith(".json"):
            manifest.parse(storage, data, name=twin)
        elif hashlib.sha256(data).hexdigest() != _part_sha256(storage, name):
            raise StoreDamagedError("a copy has the SHA-256 of its part", where=f"{storage.url}/{twin}")
    except StoreDamagedError as error:
        raise StoreDamagedError(
            "a manifest or its copy is sound",
            actual=str(error),
            where=f"{storage.url}/{name}",
            fix="restore one of the two from a backup; without them nothing says which labels are right",
        ) from error
    _replace(storage, name, data)


def _part_sha256(storage: Storage, name: str) -> str | None:
    """What the newest manifest says of a part or its copy."""
    committed = manifest.load(storage)
    parts = [part for key in ("image_shards", "units") if isinstance(x := committed[key], Entries) for part in x.parts]
    return next((part.sha256 for part in parts if name in (part.file, naming.twin(part.file))), None)


def _replace(storage: Storage, name: str, data: bytes) -> None:
    with storage.replacing(name) as out:
        out.write(data)
