"""Checks: what is refused before the first step, with the reason.

Trade-off: only what can be known without reading a label shard or an image; those are checked as they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from kddata import order
from kddata.cards import canonical_json
from kddata.errors import ConfigError, ResourceError, StoreMismatchError
from kddata.images import open_source
from kddata.losses import Method
from kddata.reader import open_images
from kddata.store import LabelStore
from kddata.training.job import TrainingJob


def check_job(job: TrainingJob, store: LabelStore, method: Method, world_size: int) -> None:
    """Refuses, before anything is built, a job that cannot work on this store, or whose images are not there."""
    spec = store.spec
    if job.student.num_classes != spec.teacher.num_classes:
        raise StoreMismatchError(
            f"a student has the {spec.teacher.num_classes} classes of the store's teacher",
            actual=f"student.num_classes {job.student.num_classes}",
            where=store.url,
            fix=f"set student.num_classes={spec.teacher.num_classes}",
        )
    method.check(
        k=spec.k,
        num_classes=spec.teacher.num_classes,
        temperatures=spec.temperatures,
        has_targets=store.info()["labelled"] > 0,
        mixed=spec.plan.has_mix,
        outputs=tuple(output.name for output in spec.outputs),
        where=store.url,
    )
    if method.needs.image_ids and world_size > 1:
        raise ConfigError(
            f"method {method.name} has one bank of all images, and trains in one worker",
            actual=f"{world_size} workers",
            fix="set cluster.workers=1",
        )
    steps = order.num_steps(store.num_rows, job.data.batch_size)
    ranges = [order.step_range(step, store.num_rows, job.data.batch_size) for step in (0, steps - 1)]
    fewest = min(stop - start for start, stop in ranges)
    if fewest < 2 * world_size:
        raise ConfigError(
            "every worker gets two rows or more of each step",
            actual=f"{world_size} workers and a step of {fewest} rows",
            fix="use fewer workers or a larger data.batch_size",
        )
    open_images(store, job.images)
    if job.evaluate is not None:
        open_source(job.evaluate.images).shard_names()


def identity(job: TrainingJob, store: LabelStore) -> dict[str, Any]:
    """What makes two jobs one run: all but where things lie and how often it is saved."""
    fields = dataclasses.asdict(job)
    for name in ("store", "run", "images", "checkpoint_steps"):
        del fields[name]
    return {**fields, "store": content_sha256(store)}


def content_sha256(store: LabelStore) -> str:
    """Hex SHA-256 of what a store holds, wherever it lies: its spec and the hashes of its label shards."""
    assert store.manifest is not None
    content = [store.spec.fingerprint, [unit["sha256"] for unit in store.manifest["units"]]]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def require_same_start(step: int, world_size: int, device: str, *, where: str) -> None:
    """Raises ResourceError where ranks found different checkpoints: their folders are not one."""
    if world_size == 1:
        return
    highest = torch.tensor([step, -step], device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    if highest[0] != -highest[1]:
        raise ResourceError(
            "all workers see one run folder",
            actual=f"checkpoints after {-int(highest[1])} and after {int(highest[0])} steps",
            where=where,
            fix="put run on storage that every node shares",
        )
