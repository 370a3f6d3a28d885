"""Labelling on Ray: units are the rows of a Ray Dataset, and a pool of actors, each with its teacher, labels them.

An actor reads, cuts, asks and publishes a unit on its own and gives back a receipt, so that no pixel travels through
Ray. Ray schedules, replaces dead actors (the unit in hand is done again) and grows nothing in the driver: units go in
by windows. Deliberately not used: Ray Data's file sinks and checkpoints; what is done is what has a receipt in the
store. Trade-off: decoding shares a node with the teacher it feeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray.data
import ray.exceptions
import torch
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning
from torch import Tensor

from kddata import labelling
from kddata.builders import is_published
from kddata.cards import TeacherCard
from kddata.cluster.resources import require_room, require_shared
from kddata.cluster.session import connected
from kddata.errors import KddataError, ResourceError
from kddata.images import open_source
from kddata.labelling import Labelled, LabellingJob
from kddata.store import LabelStore, Receipt, Unit, driving, require_free
from kddata.teacher import Answers

WINDOW_UNITS = 4096
RETRIES = (
    5  # of a unit whose process died: enough for a bad day, not for an image that kills each process that reads it
)
_TIMED_OUT = 70  # exit code of a process whose unit took too long


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a labelling run stands, earlier runs included.

    Attributes:
        views, total_views: labelled, and to be labelled; the views of bad images count as labelled.
        bad_images: images that could not be used.
        correct: views whose most probable class is the ground truth, of the `labelled` ones that have one.
    """

    views: int
    total_views: int
    bad_images: int
    correct: int
    labelled: int


def label(
    job: LabellingJob,
    *,
    teachers: int = 1,
    gpus_per_teacher: float = 0,
    extend: bool = False,
    on_standing: Callable[[Standing], None] = lambda standing: None,
    window_units: int = WINDOW_UNITS,
    unit_timeout_s: float | None = None,
    retries: int = RETRIES,
) -> Labelled:
    """The finished store of a job, labelled by `teachers` processes; units that are finished already are kept.

    Each process reserves `job.threads` CPUs and `gpus_per_teacher` GPUs; with any, its teacher is on a GPU. With
    `extend`, what the job has and its finished store has not is added; see `labelling.prepare`. A process that dies, or
    whose unit takes longer than `unit_timeout_s`, is replaced, and its unit is done again, at most `retries` times.

    Raises ResourceError where the cluster has no room or a unit has killed every process that took it, ConfigError
    where its nodes would not see one store or source, and what `labelling.label_store` raises. Whatever ends it, the
    same call goes on from there.
    """
    if not extend and labelling.is_tidy(job.store):  # Ray need not start to see whether it is the one that is asked for
        return Labelled(store=labelling.prepare(job), new_units=0)
    require_free(job.store)  # and not to see that another driver is at work
    with connected():
        weights = job.teacher.weights
        on_file = None if weights is None or is_published(weights) else weights
        require_shared({"images": job.images, "store": job.store, "teacher.weights": on_file})
        require_room("teachers", teachers, cpus=job.threads, gpus=gpus_per_teacher, key="cluster.teachers")
        with driving(job.store) as driver, labelling.alone_on(job.store, driver):
            store = labelling.prepare(job, extend=extend)
            if store.manifest is not None:
                store.commit()  # an earlier driver may have died while it tidied up
                return Labelled(store=store, new_units=0)
            missing, tally, new_units = labelling.each_missing_unit(store), _Tally(store), 0
            labelling.check_bad_images(store, tally.bad, limit=job.bad_images)
            on_standing(tally.standing())
            while window := list(islice(missing, window_units)):
                for receipt in _label_units(
                    job,
                    store,
                    window,
                    teachers=teachers,
                    gpus=gpus_per_teacher,
                    timeout_s=unit_timeout_s,
                    retries=retries,
                ):
                    tally.add(receipt)
                    new_units += 1
                    on_standing(tally.standing())
                    labelling.check_bad_images(store, tally.bad, limit=job.bad_images)
                    driver.check()
            labelling.finish(store, limit=job.bad_images, bad=tally.bad)
    return Labelled(store=store, new_units=new_units)


def _label_units(
    job: LabellingJob,
    store: LabelStore,
    units: list[Unit],
    *,
    teachers: int,
    gpus: float,
    timeout_s: float | None,
    retries: int,
) -> Iterator[Receipt]:
    """The receipts of these units, as they are finished."""
    device = "cuda" if gpus else "cpu"
    rows = [{"unit": i} for i in range(len(units))]
    with warnings.catch_warnings():  # restarts and retries have no other name in Ray Data yet
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Labeller,
            fn_constructor_kwargs={
                "job": dataclasses.replace(job, device=device),
                "store": store,
                "units": units,
                "timeout_s": timeout_s,
            },
            batch_size=1,
            num_cpus=job.threads,
            num_gpus=gpus or None,
            compute=ActorPoolStrategy(
                size=min(teachers, len(units)),
                max_concurrent_calls_per_actor=2,  # the next unit is read while this one is being published
                enable_true_multi_threading=True,
                max_tasks_in_flight_per_actor=4,
            ),
            max_restarts=-1,
            max_task_retries=retries,
        )
    dataset.context.enable_progress_bars = False  # ours is fed by receipts
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    left = {unit.number: unit for unit in units}
    try:
        for row in dataset.iter_rows():
            outcome = row["outcome"]
            if isinstance(outcome, KddataError):
                raise outcome
            del left[outcome.unit]
            yield outcome
    except ray.exceptions.RayActorError as error:
        suspects = list(left.values())[: 4 * teachers]
        raise ResourceError(
            "a unit is labelled by a process that lives",
            actual=f"one of the units {', '.join(str(unit.number) for unit in suspects)} ended each of the "
            f"{retries + 1} processes that took it",
            where=f"image shards {', '.join(sorted({store.images[unit.shard].name for unit in suspects}))}",
            fix="look for what ends it: an image, too little memory, a driver of the GPU, or cluster.unit_timeout_s; "
            "finished units are kept",
        ) from error


class Labeller:
    """One actor: a teacher, and the units that are given to it."""

    def __init__(self, job: LabellingJob, store: LabelStore, units: list[Unit], timeout_s: float | None = None) -> None:
        torch.set_num_threads(job.threads)
        self._job, self._store, self._units, self._timeout_s = job, store, units, timeout_s
        self._source = open_source(job.images)
        self._teacher: Answers | None = None
        self._loading = threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The receipt of a unit; or the error for a user, as a value: raised, it would lose its parts inside Ray's."""
        (i,) = batch["unit"]
        outcome = np.empty(1, dtype=object)
        try:
            with self._loading:  # not in __init__, where an error would have Ray try again and again
                if self._teacher is None:
                    self._teacher = _OneAtATime(labelling.load_job_teacher(self._job))
            unit, pixels = self._units[i], self._job.max_pixels
            with _ended_after(self._timeout_s):
                outcome[0] = labelling.label_unit(self._store, unit, self._source, self._teacher, max_pixels=pixels)
        except KddataError as error:
            outcome[0] = error
        return {"outcome": outcome}


@contextlib.contextmanager
def _ended_after(seconds: float | None) -> Iterator[None]:
    """A block that ends this process when it takes longer: what hangs in a dead link or a driver cannot be interrupted.

    Ray replaces the process; units are published whole, so that the next one finds nothing half-done.
    """
    timer = threading.Timer(seconds or 0, os._exit, [_TIMED_OUT])
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _OneAtATime:
    """A teacher that two threads share."""

    def __init__(self, teacher: Answers) -> None:
        self._teacher, self._lock = teacher, threading.Lock()

    @property
    def card(self) -> TeacherCard:
        return self._teacher.card

    def __call__(self, pixels_u8_B3SS: Tensor) -> Tensor:
        with self._lock:
            return self._teacher(pixels_u8_B3SS)

    def answer(self, pixels_u8_B3SS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self._lock:
            return self._teacher.answer(pixels_u8_B3SS)

    def boundary(self, pixels_u8_B3SS: Tensor, attack_class_B: Tensor) -> tuple[Tensor, Tensor]:
        with self._lock:
            return self._teacher.boundary(pixels_u8_B3SS, attack_class_B)


def _views(unit: Unit) -> int:
    return (unit.stop - unit.start) * unit.num_views


class _Tally:
    """Sums over the receipts of a store: those that were there, and those that come."""

    def __init__(self, store: LabelStore) -> None:
        self._units = store.units()
        self._first = self._units[0].number if len(self._units) else 0
        self._total_views = sum(map(_views, self._units))
        self._views = self._correct = self._labelled = 0
        self.bad: dict[str, str] = {}
        for receipt in store.receipts():
            self.add(receipt)

    def add(self, receipt: Receipt) -> None:
        self._views += _views(self._units[receipt.unit - self._first])
        self._correct += receipt.correct
        self._labelled += receipt.labelled
        self.bad.update(receipt.bad)

    def standing(self) -> Standing:
        return Standing(
            views=self._views,
            total_views=self._total_views,
            bad_images=len(self.bad),
            correct=self._correct,
            labelled=self._labelled,
        )
