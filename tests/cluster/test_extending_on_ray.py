"""Extending on Ray ends in the very bytes that extending in one process gives."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from kddata.cluster.labelling import label
from kddata.labelling import LabellingJob, label_store
from kddata.store import verify_store
from kddata.testing import fake_teacher_args, make_images
from kddata.views import ViewPlan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("local_ray")]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_actors_extend_a_store_by_views_and_images_to_the_same_bytes(tmp_path: Path) -> None:
    make_images(tmp_path / "images", num_images=12, shards=3)
    job = LabellingJob(
        images=f"{tmp_path}/images/{{00000..00001}}.tar",
        store=str(tmp_path / "alone"),
        teacher=fake_teacher_args(),
        plan=ViewPlan(),
        k=3,
        unit_images=2,
    )
    label_store(job)
    before = files(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "actors")
    larger = dataclasses.replace(job, images=f"{tmp_path}/images/{{00000..00002}}.tar", views_per_image=3)
    wanted = label_store(larger, extend=True)
    done = label(dataclasses.replace(larger, store=str(tmp_path / "actors")), teachers=2, extend=True)
    assert done.new_units == wanted.new_units == 4 + 2
    assert files(tmp_path / "actors") == files(tmp_path / "alone")
    assert {name: files(tmp_path / "actors")[name] for name in before} == before
    assert verify_store(done.store.url) == []
