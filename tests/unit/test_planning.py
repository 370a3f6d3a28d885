"""`kddata plan`: what it says of a job is what the job then makes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kddata.cli import app
from kddata.commands import estimate_lines
from kddata.errors import ConfigError
from kddata.labelling import LabellingJob, estimate, label_store
from kddata.testing import fake_teacher_args, make_images
from kddata.views import ViewPlan


@pytest.fixture
def job(tmp_path: Path) -> LabellingJob:
    make_images(tmp_path / "images", num_images=14)
    return LabellingJob(
        images=str(tmp_path / "images"),
        store=str(tmp_path / "store"),
        teacher=fake_teacher_args(),
        plan=ViewPlan(),
        views_per_image=6,
        k=3,
        unit_images=3,
        unit_views=4,
    )


def test_an_estimate_counts_what_labelling_then_makes(job: LabellingJob) -> None:
    found = estimate(job, teachers=2, passes=3)
    assert not Path(job.store).exists()
    store = label_store(job).store
    info = store.info()
    assert (found.images, found.views, found.units) == (14, info["rows"], info["units"])
    assert found.files == len(store.storage.sizes())
    assert found.counted_shards == found.image_shards == info["images"]["shards"]
    assert found.hours == pytest.approx(found.views / found.views_per_s / 2 / 3600)
    assert found.students == max(1, math.ceil(found.teacher_views_per_s / (found.views_per_s * 3)))


def test_bytes_are_those_of_a_unit_of_the_probe(job: LabellingJob) -> None:
    """A job of one unit that the probe covers whole: the estimate is exact."""
    shard = sorted(Path(str(job.images)).glob("*.tar"))[0]
    job = dataclasses.replace(job, images=str(shard), unit_images=1024, unit_views=None)
    found = estimate(job)
    assert found.bytes == label_store(job).store.info()["bytes"]


def test_a_unit_keeps_one_teacher_busy(job: LabellingJob) -> None:
    """Eight teachers for 14 images in two shards of seven: two units, so that six teachers have nothing to do."""
    job = dataclasses.replace(job, unit_images=1024, unit_views=None)
    found = estimate(job, teachers=8)
    assert found.hours == pytest.approx(7 * 6 / found.views_per_s / 3600)
    (time,) = (text for name, text in estimate_lines(found, asks_gpu=False) if name == "time")
    assert time.endswith("with 8 such teachers; 2 units can keep no more than 2 busy: lower units.images")
    (time,) = (text for name, text in estimate_lines(estimate(job, teachers=2), asks_gpu=False) if name == "time")
    assert time.endswith("with 2 such teachers")


def test_sampled_labels_are_planned_as_sampled(job: LabellingJob, tmp_path: Path) -> None:
    """By the command; a unit that the probe covers whole, so that its bytes are exact, and those of no top classes."""
    shard = sorted(Path(str(job.images)).glob("*.tar"))[0]
    top = dataclasses.replace(job, images=str(shard), unit_images=1024, unit_views=None)
    sampled = dataclasses.replace(top, store=f"{job.store}-sampled", keep="sampled")
    args, file = job.teacher, tmp_path / "label.yaml"
    fields = ("arch", "num_classes", "size_px", "mean", "std")
    known = {field: getattr(args, field) for field in fields}
    values = {"teacher": known, "views": {"per_image": 6}, "labels": {"k": 3, "keep": "sampled", "temperatures": [1]}}
    file.write_text(json.dumps({"images": str(shard), "store": sampled.store, **values}))
    done = CliRunner().invoke(app, ["plan", str(file), "--json"], catch_exceptions=False)
    assert not Path(sampled.store).exists()
    store = label_store(sampled).store
    found, info = json.loads(done.stdout), store.info()
    assert (found["views"], found["units"], found["bytes"]) == (info["rows"], info["units"], info["bytes"])
    assert found["bytes"] != label_store(top).store.info()["bytes"]
    assert found["files"] == len(store.storage.sizes())
    refused = CliRunner().invoke(app, ["plan", str(file), "labels.temperatures=[1, 2]"])
    assert refused.exit_code == ConfigError.exit_code
    assert "sampled labels are of temperature 1" in refused.output


def test_shards_beyond_the_first_few_are_taken_to_be_like_those_counted(job: LabellingJob) -> None:
    whole = estimate(job)
    found = estimate(job, counted_shards=1)
    assert (found.counted_shards, found.image_shards) == (1, whole.image_shards)
    assert abs(found.images - whole.images) <= whole.image_shards


def test_values_below_one_are_refused(job: LabellingJob) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        estimate(job, passes=0)


def test_the_command_prints_lines_or_json_and_leaves_no_store(job: LabellingJob, tmp_path: Path) -> None:
    file = tmp_path / "label.yaml"
    args = job.teacher
    teacher = f"{{arch: '{args.arch}', num_classes: {args.num_classes}, size_px: {args.size_px}}}"
    file.write_text(
        f"images: {job.images}\nstore: {job.store}\nteacher: {teacher}\nviews: {{per_image: 6}}\nlabels: {{k: 3}}\n"
    )
    text = CliRunner().invoke(app, ["plan", str(file)], catch_exceptions=False).stdout
    assert "images       14 in" in text
    assert "views        84\n" in text
    assert "pays         from " in text
    done = CliRunner().invoke(app, ["plan", str(file), "--passes", "2", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["passes"] == 2
    assert not Path(job.store).exists()
