"""The student as a torch.export program answers as the student does; a failure to make it is a line of the card."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from kddata.store import LabelStore
from kddata.teacher import build_network
from kddata.testing import make_store
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob, train


def net(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    )


class Branching(nn.Module):
    """Branches on its pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = net(num_classes)

    def forward(self, x):
        return self.network(x if x.mean() > 0 else -x)


class Noisy(Branching):
    """Never answers twice alike."""

    def forward(self, x):
        return self.network(x) + torch.randn_like(x[:, :1, 0, 0])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("program"), num_images=16, num_classes=5)


def job_of(store: LabelStore, run: Path, network: str) -> TrainingJob:
    return TrainingJob(
        store=store.url,
        run=str(run),
        student=StudentArgs(arch=f"python:{__name__}:{network}", num_classes=5),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.1, epochs=1),
        export=True,
    )


def test_the_program_answers_any_number_of_rows_as_the_student_does(store: LabelStore, tmp_path: Path) -> None:
    job = job_of(store, tmp_path / "run", "net")
    result = train(job)
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert card == result.card
    assert card["program"]["file"] == "model.pt2"
    assert card["program"]["input"] == ["batch", 3, 16, 16]
    assert 0 <= card["program"]["largest_difference"] < 1e-4
    student = build_network(job.student.arch, num_classes=5, weights=f"{job.run}/model.safetensors").eval()
    program = torch.export.load(f"{job.run}/model.pt2").module()
    for rows in (1, 7):
        pixels = torch.randn(rows, 3, 16, 16)
        with torch.inference_mode():
            torch.testing.assert_close(program(pixels), student(pixels), rtol=1e-4, atol=1e-5)
    with zipfile.ZipFile(f"{job.run}/model.pt2") as archive:
        for name in archive.namelist():
            assert b".py" not in archive.read(name).replace(b"python", b""), "no place in somebody's code"
            assert not archive.read(name).startswith((b"PK", b"\x80")), "no pickle"
    assert train(dataclasses.replace(job, export=False)) == result, "it is no part of what a run is"


@pytest.mark.parametrize(
    ("network", "reason"), [("Branching", "data-dependent"), ("Noisy", "its logits differ from the student's by")]
)
def test_a_student_that_cannot_be_exported_finishes_and_its_card_says_why(
    network: str, reason: str, store: LabelStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(job_of(store, tmp_path / "run", network))
    assert result.card["program"]["file"] is None
    assert reason in result.card["program"]["reason"]
    assert "could not be exported" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "card.json",
        "job.json",
        "metrics.json",
        "model.safetensors",
    ]


def test_nothing_is_exported_unless_it_was_asked_for(store: LabelStore, tmp_path: Path) -> None:
    result = train(dataclasses.replace(job_of(store, tmp_path / "run", "net"), export=False))
    assert "program" not in result.card
    assert not (tmp_path / "run" / "model.pt2").exists()
