"""Judging a trained student: as it was judged in training, and as faithful as the teacher's own logits say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from kddata.cli import app
from kddata.errors import ConfigError, StoreMismatchError
from kddata.evaluation import score
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.testing import fake_teacher, make_images, make_store
from kddata.training import (
    DataArgs,
    EvaluationArgs,
    OptimizerArgs,
    StudentArgs,
    TrainingJob,
    judge,
    open_student,
    train,
)

CLASSES = 6
ARCH = "python:kddata.nets:small_cnn"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stores that keep all classes, three of them and draws; a finished run, and its test images."""
    root = tmp_path_factory.mktemp("judge")
    store = make_store(root / "all", num_images=24, num_classes=CLASSES, k=CLASSES, size_px=16)
    make_store(root / "three", num_images=24, num_classes=CLASSES, k=3, size_px=16)
    make_store(root / "draws", num_images=24, num_classes=CLASSES, k=3, size_px=16, keep="sampled")
    job = TrainingJob(
        store=store.url,
        run=str(root / "run"),
        student=StudentArgs(arch=ARCH, num_classes=CLASSES),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=2),
        evaluate=EvaluationArgs(images=make_images(root / "exam", num_images=30, num_classes=CLASSES, seed=9)),
    )
    train(job)
    return root


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_a_run_is_judged_as_it_was_in_training(root: Path) -> None:
    found = judge(open_student(str(root / "run"), arch=ARCH), images=str(root / "exam"), batch_size=7)
    card = json.loads((root / "run" / "card.json").read_text())
    assert (found.images, found.labelled, found.fidelity) == (30, 30, None)
    assert found.weights_sha256 == card["weights_sha256"]
    for name in ("top1", "top5", "nll", "brier", "ece", "confidence"):
        assert found.scores[name] == pytest.approx(card["metrics"][name], rel=1e-5), name


def test_fidelity_is_that_of_the_logits_of_the_teacher(root: Path) -> None:
    student = open_student(str(root / "run"), arch=ARCH)
    teacher = fake_teacher(num_classes=CLASSES, size_px=16)
    (batch,) = loader(LabelStore.open(str(root / "all" / "labels")), batch_size=100, size_px=16, teacher_px=16)
    with torch.inference_mode():
        logits = student.network(student.pixels_of(batch.pixels_u8_B3SS))
    wanted = score(logits, None, teacher(batch.teacher_pixels_u8)).summary()
    whole = judge(student, store=str(root / "all" / "labels"), batch_size=5).fidelity
    assert whole is not None
    assert (whole.views, whole.k, whole.num_classes) == (len(batch), CLASSES, CLASSES)
    assert whole.agreement == wanted["agreement"] < 1
    assert whole.kl == pytest.approx(wanted["kl"], rel=2e-3)  # labels are stored in half precision
    three = judge(student, store=str(root / "three" / "labels")).fidelity
    draws = judge(student, store=str(root / "draws" / "labels")).fidelity
    assert three is not None
    assert draws is not None
    assert three.agreement == whole.agreement
    assert 0 < three.kl < whole.kl, "the classes left out are one"
    assert draws.kl is None
    few = judge(student, store=str(root / "all" / "labels"), views=11, batch_size=5).fidelity
    assert few is not None
    assert few.views == 11


def test_the_command_says_it_in_words_and_in_json(root: Path, tmp_path: Path) -> None:
    job = {"run": f"{root}/run", "arch": ARCH, "images": f"{root}/exam", "store": f"{root}/three/labels"}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    found = json.loads(call(tmp_path / "job.yaml", "--json").stdout)
    text = call(tmp_path / "job.yaml").stdout
    assert f"top-1        {found['scores']['top1']:.2%}\n" in text
    assert "ECE, 15 bins" in text
    assert f"{found['fidelity']['agreement']:.2%} of {found['fidelity']['views']} views have the teacher's" in text
    assert re.search(r"KL +\d\.\d{4} nats at T = 1, over 3 classes and one of all others \(teacher to student\)", text)
    student = {"arch": ARCH, "weights": f"{root}/run/model.safetensors", "num_classes": CLASSES, "size_px": 16}
    student |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    (tmp_path / "weights.yaml").write_text(json.dumps({"student": student, "images": f"{root}/exam"}))
    spec = LabelStore.open(str(root / "all" / "labels")).spec.teacher
    assert (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1)), "of what the run was trained with"
    assert json.loads(call(tmp_path / "weights.yaml", "--json").stdout)["scores"] == found["scores"]


def test_what_cannot_be_judged_is_refused(root: Path, tmp_path: Path) -> None:
    student = open_student(str(root / "run"), arch=ARCH)
    with pytest.raises(ConfigError, match="on labelled images, by a store, or both; got neither"):
        judge(student)
    unlabelled = make_images(tmp_path / "unlabelled", num_images=2, labelled=False)
    with pytest.raises(ConfigError, match=r"judged on have labels; got none has .*a folder for each class"):
        judge(student, images=unlabelled)
    other = make_store(tmp_path / "other", num_images=4, num_classes=5)
    with pytest.raises(StoreMismatchError, match="a teacher of its 6 classes; got 5 classes"):
        judge(student, store=other.url)
    (tmp_path / "job.yaml").write_text(f"images: {root}/exam\n")
    done = call(tmp_path / "job.yaml")
    assert done.exit_code == 2
    assert "names run, with arch where that is code, or student; got none of them" in done.stderr
    assert "Next: set what is not meant to null, such as student=null" in done.stderr
    assert "code that a card names is not run" in call(tmp_path / "job.yaml", f"run={root}/run").stderr
