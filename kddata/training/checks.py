"""Checks: what is refused before the first step, with the reason.

Trade-off: only what can be known without reading a label shard or an image; those are checked as they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch

from kddata import order
from kddata.cards import canonical_json
from kddata.corruption import labels_sha256
from kddata.errors import ConfigError, ResourceError, StoreMismatchError
from kddata.images import open_source
from kddata.losses import Method
from kddata.reader import open_images, order_of
from kddata.replay import choice_of
from kddata.store import LabelStore, require_members
from kddata.store.entries import texts
from kddata.training.job import TrainingJob

_ADDED: tuple[tuple[str, str, object], ...] = (  # that former runs did not have, and what stands for absence
    ("student", "compile", False),
    ("data", "views_per_visit", 1),
    ("data", "views_together", 1),
    ("optimizer", "accumulate", 1),
    ("optimizer", "layer_lr_decay", 1.0),
)


def check_job(
    job: TrainingJob, store: LabelStore, others: Sequence[LabelStore], method: Method, world_size: int
) -> None:
    """Refuses, before anything is built, a job that cannot work on these stores, or whose images are not there."""
    spec = store.spec
    require_members(store, others)
    _check_ensemble(job, [store, *others], method)
    if job.student.num_classes != spec.teacher.num_classes:
        raise StoreMismatchError(
            f"a student has the {spec.teacher.num_classes} classes of the store's teacher",
            actual=f"student.num_classes {job.student.num_classes}",
            where=store.url,
            fix=f"set student.num_classes={spec.teacher.num_classes}",
        )
    _check_cohort(job, method)
    if job.student.compile and (method.needs.of_features or method.needs.boundary):
        raise ConfigError(
            "a compiled student is for methods on logits",
            actual=f"method {method.name}",
            where="student.compile",
            fix="set student.compile=false",
        )
    for each in (store, *others):
        method.check(
            k=each.spec.k,
            num_classes=each.spec.teacher.num_classes,
            temperatures=each.spec.temperatures,
            has_targets=each.info()["labelled"] > 0,
            sampled=each.spec.keep == "sampled",
            mixed=each.spec.plan.has_mix,
            outputs=tuple(output.name for output in each.spec.outputs),
            views=each.views_per_image,
            where=each.url,
        )
    if method.needs.boundary and job.data.size_px != spec.teacher.size_px:
        raise ConfigError(
            f"a student takes boundary samples as they are, of the teacher's {spec.teacher.size_px} px",
            actual=f"data.size_px {job.data.size_px}",
            where=store.url,
            fix=f"set data.size_px={spec.teacher.size_px}, or use another method",
        )
    if method.needs.views > job.data.views_together:
        raise ConfigError(
            f"method {method.name} compares {method.needs.views} views of each image of a step",
            actual=f"data.views_together {job.data.views_together}",
            fix=f"set data.views_together={method.needs.views}",
        )
    if method.needs.one_worker and world_size > 1:
        raise ConfigError(
            f"method {method.name} has one bank of all images, and trains in one worker",
            actual=f"{world_size} workers",
            fix="set cluster.workers=1",
        )
    if job.data.noise is not None and not store.info()["labelled"]:
        raise ConfigError("data.noise is for images with ground truth", actual="none has", where=store.url)
    choice = choice_of(store, job.data.subset, job.data.imbalance)
    num_rows = store.num_rows if choice is None else int(choice.rows_per_unit(store.units()).sum())
    steps = order.num_steps(num_rows, job.data.batch_size)
    ranges = [order.step_range(step, num_rows, job.data.batch_size) for step in (0, steps - 1)]
    fewest = min(stop - start for start, stop in ranges)
    parts = job.optimizer.accumulate
    if fewest < 2 * world_size * parts:
        raise ConfigError(
            "every worker gets two rows or more of each step" + ", for each micro-batch" * (parts > 1),
            actual=f"{world_size} workers" + f", {parts} micro-batches" * (parts > 1) + f" and a step of {fewest} rows",
            fix="use fewer workers or a larger data.batch_size",
        )
    if parts > 1 and not method.of_rows:
        raise ConfigError(
            "micro-batches are for losses of single rows",
            actual=f"method {method.name}, which compares the rows of a batch or learns beside the student",
            where="optimizer.accumulate",
            fix="set optimizer.accumulate=1",
        )
    order_of(
        store,
        seed=0,
        views_per_visit=job.data.views_per_visit,
        views_together=job.data.views_together,
        batch_size=job.data.batch_size,
    )
    open_images(store, job.images)
    if job.evaluate is not None:
        open_source(job.evaluate.images).shard_names()


def _check_cohort(job: TrainingJob, method: Method) -> None:
    """Refuses peers without mutual learning, mutual learning without peers, and what a cohort has not."""
    if (method.needs.cohort == "peers") != bool(job.peers):
        raise ConfigError(
            "method dml is of several students, and others of one",
            actual=f"method {method.name} with {len(job.peers)} peers",
            fix="name the other students under peers" if not job.peers else "set method.name=dml, or leave peers out",
        )
    if not method.needs.cohort:
        return
    students = (job.student, *job.peers)
    unfit = {
        "a teacher in the loop": job.teacher is not None,
        "several stores": bool(job.others),
        "a first stage": job.first_stage is not None,
        "student.compile": any(student.compile for student in students),
        "student.weights, where branches would start alike": method.needs.cohort == "branches"
        and job.student.weights is not None,
        "optimizer.backbone_lr_scale or layer_lr_decay, which would slow one branch alone": (
            method.needs.cohort == "branches"
            and (job.optimizer.backbone_lr_scale, job.optimizer.layer_lr_decay) != (1, 1)
        ),
        "students of different numbers of classes": len({student.num_classes for student in students}) > 1,
        "students of different precision": len({student.precision for student in students}) > 1,
    }
    found = [what for what, there in unfit.items() if there]
    if found:
        raise ConfigError(
            f"method {method.name} trains a cohort as it is", actual=f"with {found[0]}", fix="leave it out"
        )


def _check_ensemble(job: TrainingJob, stores: Sequence[LabelStore], method: Method) -> None:
    if len(stores) == 1:
        return
    if job.teacher is not None or method.needs.of_features:
        raise ConfigError(
            "several stores serve methods on logits, without a teacher in the loop",
            actual="a teacher in the loop" if job.teacher is not None else f"method {method.name}",
            fix="name one store",
        )
    if job.combine == "mixture":
        specs = [store.spec for store in stores]
        short = [
            store
            for store, spec in zip(stores, specs, strict=True)
            if spec.k != spec.teacher.num_classes or spec.keep == "sampled"
        ]
        found = [f"k = {store.spec.k} of {store.spec.teacher.num_classes}, {store.spec.keep}" for store in short]
        if short or sum(weights(job)) <= 0:
            raise ConfigError(
                "a mixture is of stores that keep all classes, with weights that are not all 0",
                actual=found[0] if short else "weights of 0",
                where=short[0].url if short else None,
                fix="use combine: losses, or label with k = all classes",
            )


def weights(job: TrainingJob) -> tuple[float, ...]:
    """Of the stores, in order."""
    return (job.weight, *(member.weight for member in job.others))


def identity(job: TrainingJob, store: LabelStore, others: Sequence[LabelStore] = ()) -> dict[str, Any]:
    """What makes two jobs one run: all but where things lie, how often it is saved, and whether it is exported."""
    fields = dataclasses.asdict(job)
    for name in ("store", "weight", "others", "combine", "run", "images", "cache", "export", "checkpoint_steps"):
        del fields[name]
    for section in ("student", "data", "optimizer"):
        fields[section] = _without_added(section, fields[section])
    if job.evaluate is not None and job.evaluate.patience is None:
        del fields["evaluate"]["metric"], fields["evaluate"]["patience"]
    if job.first_stage is None:
        del fields["first_stage"]
    if job.peers:
        fields["peers"] = [_without_added("student", peer) for peer in fields["peers"]]
    else:
        del fields["peers"]
    if others or job.weight != 1:
        fields["ensemble"] = ensemble_of(job, [store, *others])
    return {**fields, "store": content_sha256(store)}


def _without_added(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """These values without those that are as they were before there was a choice."""
    added = {name: default for where, name, default in _ADDED if where == section}
    return {name: value for name, value in values.items() if name not in added or value != added[name]}


def ensemble_of(job: TrainingJob, stores: Sequence[LabelStore]) -> dict[str, Any]:
    """Which stores are heard, with which weights, and how they are combined: for job.json and card.json."""
    members = [
        {"content_sha256": content_sha256(store), "weight": weight, "teacher": store.spec.to_json()["teacher"]}
        for store, weight in zip(stores, weights(job), strict=True)
    ]
    return {"combine": job.combine, "stores": members}


def content_sha256(store: LabelStore) -> str:
    """Hex SHA-256 of what a store holds, wherever it lies: its spec and the hashes of its label shards."""
    assert store.manifest is not None
    content = [store.spec.fingerprint, texts(store.manifest["units"], "sha256")]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def trained_labels_sha256(job: TrainingJob, store: LabelStore) -> str:
    """The hash of the ground truth that a student is trained on, subset, imbalance and noise included.

    It is what `teacher.labels_sha256` of a label job says, where the student becomes a teacher.
    """
    choice = choice_of(store, job.data.subset, job.data.imbalance)
    bad = set() if choice is not None else {image_id for image_id, _ in store.info()["bad"]}
    num_classes = store.spec.teacher.num_classes

    def of_shard(shard: int) -> Iterator[tuple[str, int]]:
        ids, truth = store.image_ids(shard), store.image_labels(shard)
        here = [image_id not in bad for image_id in ids] if choice is None else choice.chosen[shard].tolist()
        ids, truth = list(compress(ids, here)), truth[np.array(here, dtype=bool)]
        if job.data.noise is not None:
            truth = job.data.noise.labels(ids, truth, num_classes)
        return zip(ids, truth.tolist(), strict=True)

    shards = range(len(store.images))
    return labels_sha256(row for shard in shards for row in of_shard(shard))


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
