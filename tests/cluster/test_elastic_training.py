"""Runs on Ray whose driver or ranks are killed or stopped train on exactly the rows that remain, in any number.

Everything shares one Ray, which drivers in processes of their own join too. Rows are written down by the student.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.train
import torch
import yaml
from safetensors.torch import load, load_file

from kddata import commands, training
from kddata.cluster.training import train
from kddata.config import TrainFile, train_job
from kddata.config import load as load_config
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.testing import make_store
from kddata.testing.consumed import FOLDER, attempts, consumed, strike, wanted

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
JOB = Path(__file__).parents[2] / "jobs" / "train.py"
STEPS = 12  # of two epochs: 24 images x 2 views in steps of 8 rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where students write down what they learn from."""
    return tmp_path_factory.mktemp("consumed")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of a Ray with room for three workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "1")  # how long Ray waits for what a stopped rank says
        ray.init("local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("store"), num_images=24, views_per_image=2, num_classes=5)


@pytest.fixture(scope="module")
def rows(store: LabelStore) -> dict[int, list[str]]:
    """Hashes of the rows of each step."""
    pixels_of = training.normaliser(store.spec.teacher.mean, store.spec.teacher.std, "cpu")
    found = wanted(loader(store, batch_size=8, size_px=16, seed=3, epochs=2), pixels_of)
    for epoch in (0, 1):
        of_epoch = [row for step in range(6 * epoch, 6 * epoch + 6) for row in found[step]]
        assert len(set(of_epoch)) == len(of_epoch) == store.num_rows
    return found


@pytest.fixture(scope="module")
def file(store: LabelStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train job file, with a checkpoint after each step."""
    root = tmp_path_factory.mktemp("runs")
    job = {
        "store": store.url,
        "student": {"arch": "python:kddata.testing.consumed:RecordingStudent", "num_classes": 5},
        "method": {"name": "kd", "temperature": 1},
        "data": {"batch_size": 8, "size_px": 16, "seed": 3},
        "optimizer": {"lr": 0.1, "epochs": 2},
        "run": {"name": "undisturbed", "storage": str(root), "checkpoint_steps": 1},
    }
    (root / "train.yaml").write_text(yaml.safe_dump(job))
    return root / "train.yaml"


@pytest.fixture(scope="module")
def undisturbed(file: Path, folder: Path) -> dict[str, bytes]:
    """The files of the run that nothing happened to, in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        return files(trained_here(file, "undisturbed"))


@pytest.fixture(autouse=True)
def clean(folder: Path, undisturbed: None, address: str) -> None:
    for path in folder.iterdir():
        path.unlink()


def job_of(file: Path, name: str) -> training.TrainingJob:
    return train_job(load_config(TrainFile, file, [f"run.name={name}"]))


def trained_here(file: Path, name: str) -> Path:
    job = job_of(file, name)
    training.train(job)
    return Path(job.run)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def overrides(name: str) -> list[str]:
    return [f"run.name={name}", "cluster.workers=1"]


def test_a_killed_driver_and_the_same_command_again_end_in_the_same_bits(
    file: Path, address: str, folder: Path, rows: dict[int, list[str]], undisturbed: dict[str, bytes]
) -> None:
    """The driver is a process of its own, which joins the Ray of the tests; a rank kills it."""
    driver = subprocess.Popen(
        [sys.executable, JOB, file, *overrides("driver")],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    strike(folder, step=7, pid=driver.pid)
    assert driver.wait(240) == -signal.SIGKILL
    assert not (file.parent / "driver" / "card.json").exists()
    commands.train(str(file), overrides("driver"))  # which is all that the command does
    assert consumed(folder) == rows
    assert sum(attempts(folder).values()) <= STEPS + 2, "steps before the last checkpoint are not taken again"
    assert files(file.parent / "driver")["model.safetensors"] == undisturbed["model.safetensors"]


def test_a_loader_process_that_is_killed_takes_its_rank_to_the_last_checkpoint(
    file: Path, address: str, folder: Path, rows: dict[int, list[str]], undisturbed: dict[str, bytes]
) -> None:
    """It reads and decodes for a rank, which is held at a step meanwhile. Each step has a checkpoint."""
    killed: list[int] = []
    strike(folder, step=5, number=signal.SIGSTOP)

    def kill() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            for rank in (int(path.stem) for path in folder.glob("*.jsonl")):
                if state(rank) == "T":
                    loaders = [
                        pid for pid in children(rank) if Path(f"/proc/{pid}/comm").read_text() == "pt_data_worker\n"
                    ]
                    for pid in loaders:
                        os.kill(pid, signal.SIGKILL)
                    killed.extend(loaders)
                    os.kill(rank, signal.SIGCONT)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    job = job_of(file, "loader")
    train(job, workers=1, loader_processes=1, max_failures=1)
    thread.join()
    assert len(killed) == 1
    assert consumed(folder) == rows
    assert len(list(folder.glob("*.jsonl"))) == 2, (
        "the rank failed when it wanted a step that nobody read, and was replaced"
    )
    assert sum(attempts(folder).values()) <= STEPS + 1, "it goes on from its last checkpoint"
    assert files(Path(job.run))["model.safetensors"] == undisturbed["model.safetensors"]


def state(pid: int) -> str:
    """The letter of a process: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_ranks_that_die_or_stop_take_a_run_to_its_last_checkpoint_also_where_their_number_changes(
    file: Path,
    address: str,
    folder: Path,
    rows: dict[int, list[str]],
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two ranks one is killed, which is replaced, then the other, which ends the run; it goes on with 1 and 3."""
    two, three, one = (dataclasses.replace(job_of(file, name), checkpoint_steps=2) for name in ("two", "three", "one"))
    strike(folder, step=2, rank=1)
    strike(folder, step=5, rank=0)
    with pytest.raises(ray.train.TrainingFailedError):
        train(two, workers=2, max_failures=1)
    begun = attempts(folder)
    assert begun.pop(2) in (1, 2), "rank 0 may have been ended before it wrote down that it took it up"
    assert begun == {0: 1, 1: 1, 3: 1, 4: 1, 5: 1}
    for again in (three, one):
        shutil.copytree(two.run, again.run)
    monkeypatch.setenv(FOLDER, str(shutil.copytree(folder, file.parent / "consumed by one")))

    strike(folder, step=8, rank=2, number=signal.SIGSTOP)
    told: list[training.Progress] = []
    result = train(three, workers=3, rank_timeout_s=8, on_progress=told.append)
    assert consumed(folder) == rows
    again = attempts(folder)
    assert again[8] > 1, "it was stopped"
    assert sum(again.values()) <= STEPS + 2 + 2, "each end repeats the steps since a checkpoint, here at most two"
    assert told[-1].step == STEPS == len(result.loss_S)
    np.testing.assert_allclose(result.loss_S, json.loads(undisturbed["metrics.json"])["loss_S"], rtol=1e-4)
    for path in folder.glob("*.jsonl"):
        until = time.monotonic() + 30
        while Path("/proc", path.stem).exists():
            assert time.monotonic() < until, "a stopped rank is ended, too"
            time.sleep(0.1)

    training.train(one)  # what a single rank does
    assert consumed(file.parent / "consumed by one") == rows
    for run in (three.run, one.run):
        for name, values in load_file(f"{run}/model.safetensors").items():
            torch.testing.assert_close(values, load(undisturbed["model.safetensors"])[name], rtol=1e-4, atol=1e-6)
