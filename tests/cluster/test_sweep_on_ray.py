"""A sweep on Ray: killed and started again, with a trial that fails, and nothing trained twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kddata import commands, training
from kddata.cluster.sweep import Standing, Trial, _train, sweep
from kddata.errors import ConfigError, ResourceError, StoreBusyError, StoreMismatchError, TrialsFailedError
from kddata.labelling import LabellingJob, label_store
from kddata.testing import fake_teacher_args, make_images
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob
from kddata.views import ViewPlan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]
SCRIPT = Path(__file__).parents[2] / "jobs/sweep.py"


@pytest.fixture(scope="module")
def work(networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stores over the same views, and a sweep file."""
    root = tmp_path_factory.mktemp("sweep")
    images = make_images(root / "images", num_images=24)
    for name in ("a", "b"):
        label_store(
            LabellingJob(
                images=images,
                store=str(root / name),
                teacher=fake_teacher_args(),
                plan=ViewPlan(),
                k=10,
                temperatures=(1.0, 2.0, 4.0),
            )
        )
    job: dict[str, Any] = {
        "store": [{"url": str(root / "a")}, {"url": str(root / "b")}],
        "student": {"arch": "python:networks_of_tests:SlowLinear", "num_classes": 10},
        "method": {"name": "kd", "temperature": 1},
        "trackers": [],
        "data": {"batch_size": 8, "size_px": 16},
        "optimizer": {"lr": 0.1, "epochs": 3, "schedule": "constant"},
        "evaluate": {"images": str(root / "images"), "every_epochs": 3},
    }
    grid = {
        "store.1.weight": [0.2, 0.8],
        "method.temperature": [2, 4],
        "optimizer.lr": [0.1],
        "student.arch": ["python:networks_of_tests:SlowLinear"],
    }
    file = {"job": job, "grid": grid, "run": {"name": "first", "storage": str(root / "runs")}}
    (root / "sweep.yaml").write_text(yaml.safe_dump(file))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_sweep_goes_on_and_a_failed_trial_sinks_no_other(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One learning rate makes every loss overflow. The driver is killed after the first student has finished."""
    stores = contents(work / "a"), contents(work / "b")
    path, folder = str(work / "sweep.yaml"), work / "runs/first"
    arguments = [path, "grid.optimizer.lr=[0.1, 1e38]", "grid.store.1.weight=[0.2]"]
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stderr=subprocess.DEVNULL, start_new_session=True
    )
    while first.poll() is None and not list(folder.glob("*/card.json")):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)  # the driver; Ray's processes end by themselves
    first.wait()
    finished = {card: card.stat().st_mtime_ns for card in folder.glob("*/card.json")}
    assert finished

    with pytest.raises(TrialsFailedError, match=r"2 of 4 failed: .*results.json, with the errors"):
        commands.sweep(path, arguments[1:])
    assert {card: card.stat().st_mtime_ns for card in finished} == finished
    text = capsys.readouterr().out
    assert text.count("the loss is finite") == 2
    results = json.loads((folder / "results.json").read_text())
    assert results["metric"] == "top1"
    assert [trial["error"] is None for trial in results["trials"]] == [True, True, False, False]
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "plot.html",
        "results.csv",
        "results.json",
    ]
    assert not (folder / ".tune").exists()

    commands.sweep(path, ["grid.method.temperature=[2]"], as_json=True)  # and another weight: one student is new
    after = json.loads(capsys.readouterr().out)
    assert {card: card.stat().st_mtime_ns for card in finished} == finished
    assert len({trial["metrics"]["loss"] for trial in after["trials"]}) == len(after["trials"]) == 2
    assert (contents(work / "a"), contents(work / "b")) == stores


def job(work: Path, name: str, *, classes: int = 10) -> TrainingJob:
    return TrainingJob(
        store=str(work / "a"),
        run=str(work / "runs/second" / name),
        student=StudentArgs(arch="python:networks_of_tests:linear", num_classes=classes),
        method={"name": "kd", "temperature": 2},
        data=DataArgs(batch_size=8, size_px=16),
        optimizer=OptimizerArgs(lr=0.1, epochs=1),
    )


def test_what_cannot_work_is_refused_before_any_trial_begins(work: Path) -> None:
    folder = str(work / "runs/second")
    with pytest.raises(StoreMismatchError, match=r"10 classes of the store's teacher; .*\(in trial y: "):
        sweep([Trial(name="x", job=job(work, "x")), Trial(name="y", job=job(work, "y", classes=7))], folder=folder)
    with pytest.raises(ResourceError, match=r"room for all trials .*cluster, of trial x"):
        sweep([Trial(name="x", job=job(work, "x"), threads=1000)], folder=folder)
    assert not Path(folder).exists()


def test_of_two_sweeps_in_a_folder_the_second_is_refused(work: Path) -> None:
    folder, told = str(work / "runs/second"), []
    trials = [Trial(name="only", job=job(work, "only"))]

    def again(standing: Standing) -> None:
        if standing.epochs and not told:
            with pytest.raises(StoreBusyError) as caught:
                sweep(trials, folder=folder)
            told.append(str(caught.value))

    (outcome,) = sweep(trials, folder=folder, on_standing=again)
    assert outcome.card is not None
    assert f"a sweep has one driver; got process {os.getpid()} on " in told[0]
    assert not list(Path(folder).rglob("lock-*"))


def test_a_trial_waits_for_the_process_of_a_killed_sweep_that_still_has_its_run(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr("kddata.cluster.sweep.tune.report", reported.append)
    trial, held, over = Trial(name="held", job=job(work, "held")), threading.Event(), threading.Event()

    def hold() -> None:
        with training.driving_run(trial.job.run):
            held.set()
            over.wait(60)

    orphan = threading.Thread(target=hold)
    orphan.start()
    assert held.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr("kddata.cluster.sweep._ORPHAN_S", 0)
        _train(trial)
    assert f"a run has one driver; got process {os.getpid()} on " in reported[0]["error"]
    threading.Timer(2, over.set).start()
    _train(trial)
    assert reported[1:] == [{"epochs": 1}]
    orphan.join()


def test_a_finished_sweep_starts_no_ray(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.train(job(work, "done"))
    left = Path(job(work, "done").run, "checkpoints/000000001.pt")
    left.parent.mkdir()
    left.touch()
    monkeypatch.setattr("kddata.cluster.sweep.connected", None)
    (outcome,) = sweep([Trial(name="done", job=job(work, "done"))], folder=str(work / "runs/second"))
    assert outcome.card is not None
    assert not left.exists()


def test_a_sweep_that_names_no_such_key_is_refused(work: Path) -> None:
    with pytest.raises(ConfigError, match="no such key"):
        commands.sweep(str(work / "sweep.yaml"), ["grid.optimizer.rate=[1]"])
