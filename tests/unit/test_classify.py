"""`kddata predict`: the student of a run says of images what it said when it was judged; no code of a card is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kddata.cli import app
from kddata.errors import ConfigError, StoreMissingError
from kddata.testing import make_images, make_store
from kddata.training import DataArgs, EvaluationArgs, OptimizerArgs, StudentArgs, TrainingJob, classify, train

CLASSES = 4
ARCH = "python:kddata.nets:small_cnn"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """A finished run, the images that it was judged on, and its card."""
    root = tmp_path_factory.mktemp("classify")
    store = make_store(root / "store", num_images=24, num_classes=CLASSES)
    images = make_images(root / "exam", num_images=10, seed=9)
    job = TrainingJob(
        store=store.url,
        run=str(root / "run"),
        student=StudentArgs(arch=ARCH, num_classes=CLASSES),
        method={"name": "hard"},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.05, epochs=3),
        evaluate=EvaluationArgs(images=images),
    )
    return root / "run", images, train(job).card


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], catch_exceptions=False)


def test_a_student_says_what_it_said_when_it_was_judged(run) -> None:
    folder, images, card = run
    found = list(classify(str(folder), images, arch=ARCH, top=2, batch_size=3))
    assert len(found) == 10
    right = sum(one.classes[0] == one.label for one in found) / 10
    assert right == pytest.approx(card["metrics"]["top1"])
    assert all(len(one.classes) == 2 and one.probabilities[0] >= one.probabilities[1] for one in found)


def test_the_command_prints_names_or_json(run, tmp_path: Path) -> None:
    folder, images, card = run
    (tmp_path / "names.txt").write_text("0\tcat\n1\tdog\n2\towl\n3\teel\n")
    text = call(folder, images, "--arch", ARCH, "--top", 1, "--class-names", tmp_path / "names.txt").stdout
    assert text.splitlines()[-1] == f"top-1 {card['metrics']['top1']:.2%} of 10 images with ground truth"
    assert all(re.fullmatch(r"\S+  (cat|dog|owl|eel) \d+\.\d%", line) for line in text.splitlines()[:-1]), text
    lines = call(folder, images, "--arch", ARCH, "--json").stdout.splitlines()
    assert [len(json.loads(line)["classes"]) for line in lines] == [CLASSES] * 10


def test_code_that_a_card_names_is_not_run_and_an_unfinished_run_is_named(run, tmp_path: Path) -> None:
    folder, images, _ = run
    with pytest.raises(ConfigError, match="code that a card names is not run"):
        next(classify(str(folder), images))
    assert call(folder, images).exit_code == 2
    with pytest.raises(StoreMissingError, match="has finished"):
        next(classify(str(tmp_path), images))
    (tmp_path / "card.json").write_text('{"student": {}}')
    with pytest.raises(ConfigError, match="says what its student is"):
        next(classify(str(tmp_path), images))
