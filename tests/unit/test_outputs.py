"""Tensors of the teacher beside its labels: asked for, labelled, stored, converted, and handed to training."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn
from typer.testing import CliRunner

import kddata
from kddata.cards import Output
from kddata.care import audit, convert, export_parquet, merge, repair
from kddata.cli import app, audit_lines, summary
from kddata.errors import ConfigError, StoreMismatchError, TeacherError
from kddata.labelling import LabellingJob, label_store, load_job_teacher, prepare
from kddata.store import LabelStore
from kddata.teacher import TeacherArgs
from kddata.testing import make_images
from kddata.views import ViewPlan

OUTPUTS = ("embedding", "attention:stages.1", "features:stages.2", "fsp:stages.0:stages.1")


class Tiny(nn.Module):
    """Three stages and a linear layer; its features grow with `scale`."""

    def __init__(self, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        widths = (3, 4, 6, 5)
        self.stages = nn.Sequential(*(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)))
        self.fc = nn.Linear(5, num_classes)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.stages(x * self.scale).mean((2, 3)))


def tiny(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def loud(num_classes: int) -> nn.Module:
    return Tiny(num_classes, scale=1e7)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_images(tmp_path_factory.mktemp("images") / "shards", num_images=12)


JOB = f"""
images: nowhere
store: nowhere
teacher: {{arch: "python:{__name__}:tiny", num_classes: 10, size_px: 24}}
labels: {{k: 3, outputs: {list(OUTPUTS)}}}
"""


def job(images: str, store: Path, builder: str = "tiny", **more: object) -> LabellingJob:
    values = {
        "images": images,
        "store": str(store),
        "teacher": TeacherArgs(arch=f"python:{__name__}:{builder}", num_classes=10, size_px=24),
        "plan": ViewPlan(),
        "views_per_image": 3,
        "k": 3,
        "outputs": OUTPUTS,
        "batch_size": 4,
    }
    return LabellingJob(**(values | more))


@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_batches_hold_what_the_teacher_would_answer_now(images: str, tmp_path: Path, codec: str) -> None:
    made = job(images, tmp_path / "store", codec=codec, plan=ViewPlan(mix="cutmix"))
    store = label_store(made).store
    assert store.spec.outputs[1] == Output(name="attention:stages.1", shape=(6, 6))
    assert [output.name for output in store.spec.outputs] == list(OUTPUTS)
    teacher, rows = load_job_teacher(made), 0
    for batch in kddata.loader(store, batch_size=8, size_px=24, outputs=OUTPUTS):
        _, outputs = teacher.answer(batch.pixels_u8_B3SS)
        for name in OUTPUTS:
            torch.testing.assert_close(batch.outputs[name], outputs[name].half(), rtol=0, atol=0)
        rows += len(batch)
    assert rows == store.num_rows == 36


def test_only_outputs_that_are_asked_for_are_held(images: str, tmp_path: Path) -> None:
    store = label_store(job(images, tmp_path / "store")).store
    assert all(not batch.outputs for batch in kddata.loader(store, batch_size=8, size_px=24))
    batch = next(iter(kddata.loader(store, batch_size=8, size_px=24, outputs=["embedding"])))
    assert list(batch.outputs) == ["embedding"]
    assert set(store.read(0).outputs) == set(OUTPUTS)
    with pytest.raises(ConfigError, match=r"without features:stages.0; it holds embedding, .*fsp:stages.0:stages.1"):
        kddata.loader(store, batch_size=8, size_px=24, outputs=["features:stages.0"])


def test_a_store_without_outputs_says_so_and_keeps_its_fingerprint(images: str, tmp_path: Path) -> None:
    store = label_store(job(images, tmp_path / "store", outputs=())).store
    assert "outputs" not in store.spec.to_json()
    with pytest.raises(ConfigError, match="it holds none"):
        kddata.loader(store, batch_size=8, size_px=24, outputs=["embedding"])
    with pytest.raises(StoreMismatchError, match="outputs"):
        label_store(job(images, tmp_path / "store"))


def test_an_opened_store_knows_its_outputs_and_shows_them(images: str, tmp_path: Path) -> None:
    store = label_store(job(images, tmp_path / "store")).store
    opened = LabelStore.open(store.url)
    assert opened.spec == store.spec
    assert opened.spec.fingerprint == store.spec.fingerprint
    text = dict(summary(opened.info()))["outputs"]
    assert "embedding [5], attention:stages.1 [6, 6]" in text
    table = pa.ipc.open_file(str(tmp_path / "store" / "labels" / "000000.arrow")).read_all()
    assert table.schema.field("output.features:stages.2").metadata == {b"shape": b"[5, 3, 3]"}


def test_values_that_float16_cannot_hold_are_refused(images: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"float16, up to 65504.*features:stages.2"):
        label_store(job(images, tmp_path / "store", "loud", outputs=("features:stages.2",)))
    assert not list((tmp_path / "store" / "labels").glob("*.arrow"))


def test_an_unknown_node_is_refused_before_a_store_is_begun(images: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"perhaps stages\.1 was meant"):
        label_store(job(images, tmp_path / "store", outputs=("features:stage.1",)))
    assert not (tmp_path / "store").exists()


def test_outputs_are_converted_extended_and_exported(images: str, tmp_path: Path) -> None:
    made = job(images, tmp_path / "arrow")
    store = label_store(made).store
    there = convert(store, str(tmp_path / "tar"), format="tar")
    back = convert(there, str(tmp_path / "back"), format="arrow")
    for name in store.storage.sizes("labels"):
        assert back.storage.read(name) == store.storage.read(name)
    before = {name: store.storage.read(name) for name in store.storage.sizes("labels")}
    more = label_store(dataclasses.replace(made, views_per_image=5), extend=True).store
    assert all(more.storage.read(name) == data for name, data in before.items())
    assert more.num_rows == 60
    export_parquet(store, str(tmp_path / "labels.parquet"))
    table = parquet.read_table(tmp_path / "labels.parquet")
    stored = np.concatenate([store.read(unit.number).outputs["embedding"] for unit in store.units()])
    np.testing.assert_array_equal(np.array(table["output.embedding"].to_pylist()), stored.astype(np.float32))


@pytest.mark.parametrize("format", ["arrow", "tar"])
def test_outputs_are_merged_and_repaired_to_the_same_bytes(images: str, tmp_path: Path, format: str) -> None:
    whole = label_store(job(images, tmp_path / "whole", format=format, unit_views=1)).store
    parts = [
        label_store(
            job(images, tmp_path / f"from {first}", format=format, unit_views=1, views_per_image=n, first_view=first)
        ).store
        for first, n in ((0, 1), (1, 2))
    ]
    merged = merge(str(tmp_path / "merged"), [part.url for part in parts])
    for unit in merged.units():
        (same,) = [x for x in whole.units() if (x.shard, x.view_start) == (unit.shard, unit.view_start)]
        found, wanted = merged.read(unit.number), whole.read(same.number)
        for name in OUTPUTS:
            np.testing.assert_array_equal(found.outputs[name], wanted.outputs[name])
    name = sorted(whole.storage.sizes("labels"))[1]
    path = tmp_path / "whole" / name
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2] + bytes([sound[len(sound) // 2] ^ 1]) + sound[len(sound) // 2 + 1 :])
    assert [problem.file for problem in whole.verify()] == [name]
    assert repair(job(images, tmp_path / "whole", format=format, unit_views=1)).files == (name,)
    assert path.read_bytes() == sound
    assert whole.verify() == []


def test_an_audit_makes_outputs_again_and_notices_those_of_other_views(images: str, tmp_path: Path) -> None:
    """The second store has right hashes, right labels, and the embeddings of other rows."""
    made = job(images, tmp_path / "right")
    store, teacher = label_store(made).store, load_job_teacher(made)
    found = audit(store, teacher, views=30)
    assert found.faults == ()
    assert found.output_errors.keys() == set(OUTPUTS)
    assert all(0 < error < 2**-11 for error in found.output_errors.values()), "the rounding of float16"
    assert found.max_output_errors.keys() == set(OUTPUTS)
    assert all(found.output_errors[name] <= found.max_output_errors[name] < 2**-10 for name in OUTPUTS)
    assert re.fullmatch(
        r"0\.0\d\d% of its norm from the stored, mean; largest 0\.0\d\d%", dict(audit_lines(found))["embedding"]
    )
    wrong = prepare(dataclasses.replace(made, store=str(tmp_path / "wrong")))
    for unit in wrong.units():
        rows = store.read(unit.number)
        outputs = {**rows.outputs, "embedding": rows.outputs["embedding"][::-1]}
        wrong.write_unit(unit, [dataclasses.replace(rows, outputs=outputs)])
    wrong.commit()
    assert wrong.verify() == []
    (fault,) = audit(wrong, teacher, views=30).faults
    assert fault.startswith("embedding differs by ")
    assert audit(wrong, teacher, views=30, max_output_error=100.0).faults == ()
    without = load_job_teacher(dataclasses.replace(made, outputs=OUTPUTS[1:]))
    assert audit(store, without).faults == ("output embedding is stored, and the teacher was not asked for it",)


def test_an_audit_notices_one_wrong_row_of_many(tmp_path: Path) -> None:
    """Its embedding is off by half: 0.4% in the mean over 120 views, which alone would pass."""
    made = job(make_images(tmp_path / "images", num_images=40), tmp_path / "right")
    store, teacher = label_store(made).store, load_job_teacher(made)
    wrong = prepare(dataclasses.replace(made, store=str(tmp_path / "wrong")))
    for unit in wrong.units():
        rows = store.read(unit.number)
        embedding = rows.outputs["embedding"].copy()
        if unit.number == 0:
            embedding[2] *= 1.5
            where = f"view {rows.view[2]} of {rows.image_id[2]}"
        wrong.write_unit(unit, [dataclasses.replace(rows, outputs={**rows.outputs, "embedding": embedding})])
    wrong.commit()
    found = audit(wrong, teacher)
    assert found.views == 120
    assert found.output_errors["embedding"] < 0.01
    assert found.max_output_errors["embedding"] == pytest.approx(0.5, abs=0.001)
    assert found.faults == (
        f"embedding differs by {found.max_output_errors['embedding']:.2%} of its norm in {where}, more than 10.00%",
    )
    assert audit(wrong, teacher, max_output_error=0.051).faults == ()
    assert audit(store, teacher).faults == ()

    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    for url, code, more in ((store.url, 0, ()), (wrong.url, 5, ()), (wrong.url, 0, ("--max-output-error", "0.051"))):
        called = CliRunner().invoke(app, ["audit", url, "--job", str(file), *more], catch_exceptions=False)
        assert called.exit_code == code
        assert ("of its norm in view" in called.stderr) is (code == 5)
    assert re.search(
        r"^embedding +0\.4\d\d% of its norm from the stored, mean; largest (49\.9|50\.0)\d\d%$", called.stdout, re.M
    )
    said = json.loads(CliRunner().invoke(app, ["audit", wrong.url, "--job", str(file), "--json"]).stdout)
    assert said["max_output_errors"]["embedding"] == found.max_output_errors["embedding"]
    assert said["sampled"] is False
