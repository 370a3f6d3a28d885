"""A label job: prepared once, labelled unit by unit, finished when no unit is missing.

Every step may be repeated after a crash, and units may be labelled in any order by any process. Trade-off: preparing
walks every image shard once, so that labelling and replay never search.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from kddata import boundary
from kddata.cards import Codec, Format, Keep, MemoryFormat, Output, StoreSpec
from kddata.errors import BadImageBudgetError, SourceError, StoreBusyError, StoreError, StoreMissingError
from kddata.images import ImageSource, in_order, open_source
from kddata.labelling.attacks import boundary_shapes
from kddata.labelling.unit import label_unit
from kddata.store import Driver, LabelStore, Receipt, Unit, driving
from kddata.teacher import Answers, Teacher, TeacherArgs, load_teacher
from kddata.views import ViewPlan

_NAMED = 5
_SCANS_AHEAD = 7  # image shards; what scanning waits for is the storage
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabellingJob:
    """What a label job file says, as plain values.

    Attributes:
        images: location of the images, as `open_source` takes it.
        store: URL of the store.
        teacher: whom to ask.
        plan: how views are drawn.
        views_per_image: V.
        first_view: index of the first of them, for stores that are labelled apart and merged.
        k, keep, temperatures, codec: what is kept of an answer.
        outputs: names of the tensors inside the teacher that are kept too; see `kddata.features`.
        format: of the label files.
        unit_images, unit_views: most images, and views, of a unit.
        bad_images: share of all images that may be bad; past it the job fails.
        max_pixels: most pixels of an image, also where a view brings the whole image to another size.
        batch_size, threads, memory_format, compile: of the teacher's forward pass.
        device: of the teacher. It is not part of the store's spec.
    """

    images: str | tuple[str, ...]
    store: str
    teacher: TeacherArgs
    plan: ViewPlan
    views_per_image: int = 1
    first_view: int = 0
    k: int
    keep: Keep = "top"
    temperatures: tuple[float, ...] = (1.0,)
    codec: Codec = "exact"
    format: Format = "arrow"
    outputs: tuple[str, ...] = ()
    unit_images: int = 1024
    unit_views: int | None = None
    bad_images: float = 0.001
    max_pixels: int = 100_000_000
    batch_size: int = 16
    threads: int = 1
    memory_format: MemoryFormat = "channels_last"
    compile: bool = False
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A finished store, and how many of its units this call labelled: 0 where there was nothing to do."""

    store: LabelStore
    new_units: int


def label_store(
    job: LabellingJob, *, extend: bool = False, on_receipt: Callable[[Receipt], None] | None = None
) -> Labelled:
    """The finished store of a job, labelled in this process; units that are finished already are kept.

    Equals: prepare, label_unit for each of missing_units, finish.

    Args:
        extend: add the views and image shards that the job has and its finished store has not; see `prepare`.
        on_receipt: called with the receipt of each unit that is labelled now, for progress.

    Raises all that these raise, and StoreBusyError where another driver is at work on the store. Whatever ends it, the
    same call goes on from there.
    """
    teacher = load_job_teacher(job)
    if not extend and is_tidy(job.store):
        _log.info("%s is finished: nothing to do", job.store)
        return Labelled(store=prepare(job, teacher=teacher), new_units=0)
    with driving(job.store) as driver, alone_on(job.store, driver):
        store = prepare(job, teacher=teacher, extend=extend)
        if store.manifest is not None:
            store.commit()  # an earlier driver may have died while it tidied up
            return Labelled(store=store, new_units=0)
        source = open_source(job.images)
        bad = dict(pair for receipt in store.receipts() for pair in receipt.bad)
        check_bad_images(store, bad, limit=job.bad_images)
        units = missing_units(store)
        for unit in units:
            receipt = label_unit(store, unit, source, teacher, max_pixels=job.max_pixels)
            if on_receipt is not None:
                on_receipt(receipt)
            bad.update(receipt.bad)
            check_bad_images(store, bad, limit=job.bad_images)
            driver.check()
        finish(store, limit=job.bad_images, bad=bad)
    return Labelled(store=store, new_units=len(units))


def is_tidy(url: str) -> bool:
    """Whether a finished store lies at a URL, with nothing left behind by a driver that died at its very end."""
    try:
        return not LabelStore.open(url).leftovers()
    except StoreMissingError:
        return False


@contextmanager
def alone_on(url: str, driver: Driver) -> Iterator[None]:
    """A block of a store's driver that ends in StoreBusyError, where another has taken over, or finished, meanwhile.

    A driver that was stopped for long, was taken for dead and wakes finds what it had half-written gone. What it met
    is told too: a store that is finished says not by whom. Errors of disks and networks stay as they are.
    """
    before = _generation(url)
    try:
        yield
    except Exception as error:
        if isinstance(error, (StoreBusyError, OSError)) and not isinstance(error, FileNotFoundError):
            raise
        after = before
        with suppress(OSError, StoreError):  # the first error is what counts
            after = _generation(url)
        try:
            if after != before:
                raise StoreBusyError(
                    "a store has one driver",
                    actual=f"another driver has finished it meanwhile, and here: {error}",
                    where=url,
                    fix="nothing is lost; the same command says that it is finished",
                )
            driver.check()
        except StoreBusyError as busy:
            raise busy from error
        raise


def _generation(url: str) -> int:
    """Of the last manifest of a store; 0 where there is none."""
    try:
        manifest = LabelStore.open(url).manifest
    except StoreMissingError:
        return 0
    assert manifest is not None
    return int(manifest["generation"])


def load_job_teacher(job: LabellingJob) -> Teacher:
    """The teacher of a job. Raises what `load_teacher` raises."""
    return load_teacher(
        job.teacher,
        device=job.device,
        batch_size=job.batch_size,
        threads=job.threads,
        memory_format=job.memory_format,
        compile=job.compile,
        outputs=job.outputs,
    )


def prepare(job: LabellingJob, *, teacher: Teacher | None = None, extend: bool = False) -> LabelStore:
    """The store of a job with all its images indexed, ready to be labelled or finished already.

    Args:
        teacher: the job's. Without it, it is loaded on the CPU to know what it is, and dropped.
        extend: the store is finished, and the job has more views an image, or image shards after those it had, which
            become its next generation. Its `units` are the new ones; what is there stays byte for byte.

    Raises SourceError for no images or an id that occurs twice, StoreMismatchError for a store that was begun with
    other values, ConfigError for values that no store can have, TeacherError for a teacher that cannot be loaded.
    """
    spec = job_spec(job, teacher or load_job_teacher(dataclasses.replace(job, device="cpu", compile=False)))
    source = open_source(job.images)
    names = source.shard_names()  # before a store is begun: a slip in the images' path should not claim its name
    views: dict[str, Any] = {"views_per_image": job.views_per_image, "first_view": job.first_view}
    if extend:
        store = LabelStore.extend(
            job.store, spec=spec, location=source.location, kind=source.kind, names=names, **views
        )
    else:
        store = LabelStore.begin(job.store, spec=spec, location=source.location, kind=source.kind, **views)
    if store.manifest is None:
        _index(store, source, names)
    return store


def job_spec(job: LabellingJob, teacher: Answers) -> StoreSpec:
    """The spec of the store of a job with its teacher, which is asked about a black view where it has outputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    if job.outputs:
        _, outputs = teacher.answer(torch.zeros(1, 3, job.teacher.size_px, job.teacher.size_px, dtype=torch.uint8))
        shapes = {name: tuple(x.shape[1:]) for name, x in outputs.items()}
    if any(name in boundary.NAMES for name in job.outputs):
        shapes |= boundary_shapes(job.teacher.num_classes, job.teacher.size_px)
    return StoreSpec(
        plan=job.plan,
        teacher=teacher.card,
        k=job.k,
        keep=job.keep,
        temperatures=job.temperatures,
        codec=job.codec,
        format=job.format,
        outputs=tuple(Output(name=name, shape=shapes[name]) for name in job.outputs),
        unit_images=job.unit_images,
        unit_views=job.unit_views,
        batch_size=job.batch_size,
        threads=job.threads,
        memory_format=job.memory_format,
        compile=job.compile,
    )


def missing_units(store: LabelStore) -> list[Unit]:
    """The units that have no receipt yet, by number."""
    return list(each_missing_unit(store))


def each_missing_unit(store: LabelStore) -> Iterator[Unit]:
    """The same, one after the other, of those that are missing now: none is held."""
    return (unit for unit, done in zip(store.units(), store.finished_units(), strict=True) if not done)


def check_bad_images(store: LabelStore, bad: dict[str, str], *, limit: float) -> None:
    """Raises BadImageBudgetError where more than this share of a store's images is bad.

    Args:
        bad: reason by image id, gathered from receipts so far.
    """
    num_images = sum(shard.num_images for shard in store.images)
    if len(bad) > limit * num_images:
        some = "; ".join(f"{image_id}: {reason}" for image_id, reason in islice(sorted(bad.items()), _NAMED))
        raise BadImageBudgetError(
            f"at most {limit:g} of {num_images} images may be bad (limits.bad_images)",
            actual=f"{len(bad)} so far, such as {some}",
            where=store.url,
            fix="mend the images and name a new store, or raise the limit and run this again; finished units are kept",
        )


def finish(store: LabelStore, *, limit: float, bad: dict[str, str] | None = None) -> None:
    """Commits a store whose units are all finished. Raises BadImageBudgetError, or StoreMissingError.

    Args:
        bad: reason by image id, where it is known already; None to gather it from the receipts.
    """
    if bad is None:
        bad = dict(pair for receipt in store.receipts() for pair in receipt.bad)
    check_bad_images(store, bad, limit=limit)
    store.commit()


def _index(store: LabelStore, source: ImageSource, names: list[str]) -> None:
    """Indexes the image shards that have no index yet, several scanned at once, and seals the list."""
    indexed = store.indexed_shards()
    missing = [number for number in range(len(names)) if number not in indexed]
    scans = in_order(lambda number: source.scan(names[number]), missing, ahead=_SCANS_AHEAD)
    for number, (shard, refs) in zip(missing, scans, strict=True):
        store.write_index(
            number,
            name=shard.name,
            size_bytes=shard.size_bytes,
            ids=[ref.image_id for ref in refs],
            labels=[ref.label for ref in refs],
            offsets=[ref.offset for ref in refs],
            lengths=[ref.length for ref in refs],
        )
    store.finish_index(names)
    require_distinct(store)


def require_distinct(store: LabelStore) -> None:
    """Raises SourceError for an id in two image shards. Hashes first: 8 bytes an image, however many there are."""

    def pieces() -> Iterator[tuple[str, list[str]]]:
        for number, shard in enumerate(store.images):
            yield shard.name, store.image_ids(number)

    hashes = np.sort(np.concatenate([np.fromiter(map(hash, ids), np.int64) for _, ids in pieces()]))
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not twice:
        return
    seen: dict[str, str] = {}
    for shard, ids in pieces():
        for image_id in (image_id for image_id in ids if hash(image_id) in twice):
            if image_id in seen:
                raise SourceError(
                    "an image id occurs once",
                    actual=f"{image_id!r} in {seen[image_id]} and {shard}",
                    where=store.location,
                    fix="rename one, or leave one image shard out, and name a new store",
                )
            seen[image_id] = shard
