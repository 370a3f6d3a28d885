"""Planning: what a label job will cost, from counting its images and a short probe of its teacher.

The probe labels a few images into a folder of its own, by the very code that labels, and removes it; the job's store
is neither made nor touched. Trade-off: a probe of seconds on this machine stands for hours on another, so it is as good
as this machine and its first images are typical; what was extrapolated is said.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass

import torch

from kddata.errors import ConfigError
from kddata.images import ImageRef, ImageSource, open_source
from kddata.labelling.job import LabellingJob, job_spec, load_job_teacher
from kddata.labelling.unit import label_unit
from kddata.store import LabelStore, plan_units
from kddata.teacher import Teacher

PROBE_VIEWS = 512
_PROBE_VIEWS_AN_IMAGE = 32
_TEACHER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job would make, and what that would take.

    Attributes:
        images: in all `image_shards`, of which `counted_shards` were counted; the others are taken to be like them.
        views: of all images.
        units, files: of the store.
        bytes_per_view: of a label shard, measured on the `probed_views` of the probe.
        bytes: of all label shards.
        views_per_s: labelled by one teacher process on this machine: read, decoded, cut, asked and written.
        teacher_views_per_s: of the teacher's forward pass alone.
        hours: for all views, with `teachers` processes like the one of the probe; one unit is labelled by one of them.
        students: the least number of students for which labelling once is cheaper than the teacher in the loop, where
            each of them sees every view `passes` times.
    """

    images: int
    image_shards: int
    counted_shards: int
    views: int
    units: int
    files: int
    bytes_per_view: float
    bytes: int
    views_per_s: float
    teacher_views_per_s: float
    teachers: int
    hours: float
    passes: int
    students: int
    probed_views: int
    device: str


def estimate(
    job: LabellingJob,
    *,
    teachers: int = 1,
    passes: int = 1,
    probe_views: int = PROBE_VIEWS,
    counted_shards: int = 16,
) -> Estimate:
    """The cost of a job whose store need not exist. Writes nothing but a temporary folder.

    With `r` views labelled a second and `f` teacher answers a second, labelling a view takes 1/r, and a student with
    the teacher in the loop pays 1/f more for each view that it sees: `students = ceil(f / (r passes))`.

    Args:
        counted_shards: at most so many image shards, evenly spaced, are counted.

    Raises what labelling raises: SourceError for images, TeacherError for the teacher, ConfigError for the rest.
    """
    if min(teachers, passes, probe_views) < 1:
        raise ConfigError(
            "teachers, passes and views of the probe are at least 1", actual=(teachers, passes, probe_views)
        )
    source = open_source(job.images)
    names = source.shard_names()
    step = max(1, -(-len(names) // counted_shards))
    scanned = {i: source.scan(names[i])[1] for i in range(0, len(names), step)}
    mean = sum(map(len, scanned.values())) / len(scanned)
    counts = [len(scanned[i]) if i in scanned else round(mean) for i in range(len(names))]
    views = sum(counts) * job.views_per_image
    units = plan_units(
        counts,
        views=(job.first_view, job.first_view + job.views_per_image),
        unit_images=job.unit_images,
        unit_views=job.unit_views,
    )
    largest = max(((unit.stop - unit.start) * unit.num_views for unit in units), default=0)
    teacher = load_job_teacher(job)
    bytes_per_view, views_per_s, probed = _probe(job, teacher, source, names[0], scanned[0], probe_views)
    forward = _teacher_views_per_s(job, teacher)
    return Estimate(
        images=sum(counts),
        image_shards=len(names),
        counted_shards=len(scanned),
        views=views,
        units=len(units),
        files=len(units) + len(names) + 4,  # labels, indexes; store.json, images.json, the manifest and its copy
        bytes_per_view=bytes_per_view,
        bytes=round(bytes_per_view * views),
        views_per_s=views_per_s,
        teacher_views_per_s=forward,
        teachers=teachers,
        hours=max(views / teachers, largest) / views_per_s / 3600,
        passes=passes,
        students=max(1, math.ceil(forward / (views_per_s * passes))),
        probed_views=probed,
        device=job.device,
    )


def _probe(
    job: LabellingJob, teacher: Teacher, source: ImageSource, name: str, refs: list[ImageRef], probe_views: int
) -> tuple[float, float, int]:
    """(bytes a view, views a second, views) of one small unit, labelled in a folder of its own."""
    in_unit = min(job.views_per_image, job.unit_views or job.views_per_image, _PROBE_VIEWS_AN_IMAGE)
    refs = refs[: max(1, min(job.unit_images, probe_views // in_unit))]
    spec = dataclasses.replace(job_spec(job, teacher), unit_images=len(refs), unit_views=in_unit)
    with tempfile.TemporaryDirectory(prefix="kddata-probe-") as folder:
        store = LabelStore.begin(folder, spec=spec, location=source.location, kind=source.kind, views_per_image=in_unit)
        store.write_index(
            0,
            name=name,
            size_bytes=None,
            ids=[ref.image_id for ref in refs],
            labels=[ref.label for ref in refs],
            offsets=[ref.offset for ref in refs],
            lengths=[ref.length for ref in refs],
        )
        store.finish_index()
        teacher(torch.zeros(1, 3, job.teacher.size_px, job.teacher.size_px, dtype=torch.uint8))  # warms up
        begin = time.perf_counter()
        receipt = label_unit(store, store.units()[0], source, teacher, max_pixels=job.max_pixels)
        seconds = time.perf_counter() - begin
    if not receipt.rows:
        raise ConfigError(
            "the first images can be labelled", actual=f"none of {len(refs)}: {receipt.bad[0][1]}", where=name
        )
    return receipt.bytes / receipt.rows, receipt.rows / seconds, receipt.rows


def _teacher_views_per_s(job: LabellingJob, teacher: Teacher) -> float:
    """How many views a second the teacher answers that has nothing else to do."""
    size_px, answered = job.teacher.size_px, 0
    batch = torch.zeros(job.batch_size, 3, size_px, size_px, dtype=torch.uint8)
    teacher(batch)
    begin = time.perf_counter()
    while (seconds := time.perf_counter() - begin) < _TEACHER_S:
        teacher(batch)
        answered += job.batch_size
    return answered / seconds
