"""Extending and merging are struck at every single step; given again, they end in the same bytes."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from kddata.care import merge
from kddata.errors import StoreMissingError
from kddata.labelling import LabellingJob, label_store
from kddata.store import LabelStore, verify_store
from kddata.testing import chaos, fake_teacher_args, make_images
from kddata.views import ViewPlan

MODES: tuple[chaos.Mode, ...] = ("kill before", "raise", "lose")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> LabellingJob:
    """One view of each of two images in two shards."""
    images = make_images(tmp_path_factory.mktemp("images"), num_images=2, shards=2)
    return LabellingJob(images=images, store="", teacher=fake_teacher_args(), plan=ViewPlan(), k=2, batch_size=2)


def complaints(run: Callable[[str], object]) -> list[str]:
    """What is wrong after a fault at each step, one mode at a time, of a run in memory."""
    root = f"memory://{uuid.uuid4().hex}"
    wanted = chaos.contents(chaos.undisturbed(run, f"{root}/wanted"))
    steps = chaos.count_steps(run, f"{root}/counted")
    found = []
    for fault in chaos.faults_at(len(steps), MODES):
        complaint = chaos.survives(run, f"{root}/{fault.at}-{fault.mode}", [fault], wanted, fork=False)
        if complaint is not None:
            found.append(f"{fault} {steps[fault.at]}: {complaint}")
    return found


def test_an_extension_struck_at_every_step(job: LabellingJob) -> None:
    first = job.images.replace("{00000..00001}", "00000")  # type: ignore[union-attr]

    def label_and_extend(url: str) -> None:
        try:
            LabelStore.open(url)
        except StoreMissingError:
            label_store(dataclasses.replace(job, store=url, images=first))
        label_store(dataclasses.replace(job, store=url, views_per_image=2), extend=True)

    assert complaints(label_and_extend) == []
    url = chaos.undisturbed(label_and_extend, f"memory://{uuid.uuid4().hex}")
    assert (verify_store(url), LabelStore.open(url).num_rows) == ([], 4)


def test_a_merge_struck_at_every_step(job: LabellingJob, tmp_path: Path) -> None:
    parts = [str(tmp_path / name) for name in ("a", "b")]
    for first, part in enumerate(parts):
        label_store(dataclasses.replace(job, store=part, first_view=first))
    assert complaints(lambda url: merge(url, parts)) == []
