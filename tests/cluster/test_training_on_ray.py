"""Training on Ray takes the steps that training in one process takes, on any number of ranks, whatever happens to them.

All runs share one Ray, one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kddata import training
from kddata.cluster.training import train
from kddata.errors import ConfigError, ResourceError, StoreBusyError, TeacherError
from kddata.labelling import LabellingJob, label_store
from kddata.testing import fake_teacher_args, make_images
from kddata.training import DataArgs, EvaluationArgs, OptimizerArgs, Progress, StudentArgs, TrainingJob
from kddata.views import ViewPlan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def root(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of 48 views, of images with ground truth."""
    folder = tmp_path_factory.mktemp("training")
    label_store(
        LabellingJob(
            images=make_images(folder / "images", num_images=24),
            store=str(folder / "store"),
            teacher=fake_teacher_args(),
            plan=ViewPlan(),
            views_per_image=2,
            k=10,
        )
    )
    return folder


def job(root: Path, name: str, *, network: str = "linear", epochs: int = 3) -> TrainingJob:
    """Six steps an epoch. The student is without BatchNorm, whose statistics are of a rank's own rows."""
    return TrainingJob(
        store=str(root / "store"),
        run=str(root / "runs" / name),
        student=StudentArgs(arch=f"python:networks_of_tests:{network}", num_classes=10),
        method={"name": "kd", "temperature": 2, "alpha": 0.5},
        data=DataArgs(batch_size=8, size_px=16),
        optimizer=OptimizerArgs(lr=0.1, epochs=epochs),
        evaluate=EvaluationArgs(images=str(root / "images")),
    )


def files(run: str) -> set[str]:
    return {str(path.relative_to(run)) for path in Path(run).rglob("*") if path.is_file() and path.name[0] != "."}


def refusals(taken: TrainingJob) -> list[str]:
    """What another that would train a run is told, on Ray and without, where this process drives it."""
    told = []
    for command in (train, training.train):
        try:
            command(taken)
        except StoreBusyError as error:
            told.append(str(error))
    return [text for text in told if f"a run has one driver; got process {os.getpid()} on " in text]


def test_two_ranks_take_the_steps_of_one_process(root: Path) -> None:
    told: list[Progress] = []
    alone = training.train(job(root, "alone"))
    result = train(job(root, "ranks"), workers=2, trackers=["tensorboard"], on_progress=told.append)
    np.testing.assert_allclose(result.loss_S, alone.loss_S, rtol=1e-4)
    assert result.card["metrics"]["top1"] == alone.card["metrics"]["top1"]
    assert told[-1].step == told[-1].num_steps == len(result.loss_S) == 18
    assert told[-1].epoch_record is not None
    run = root / "runs" / "ranks"
    (events,) = (run / "tensorboard").iterdir()  # of rank 0 alone
    left = {"job.json", "model.safetensors", "metrics.json", "card.json", "trackers.json"}
    assert files(str(run)) == left | {f"tensorboard/{events.name}"}
    assert json.loads((run / "card.json").read_text()) == result.card
    for name, values in load_file(root / "runs" / "alone" / "model.safetensors").items():
        np.testing.assert_allclose(load_file(run / "model.safetensors")[name], values, rtol=1e-3, atol=1e-5)


def test_peers_of_two_ranks_learn_as_in_one_process_though_a_rank_dies_in_the_middle_of_a_step(
    root: Path, networks: Path
) -> None:
    """The second peer ends the process, when the first has learned from that step already."""
    peer = StudentArgs(arch="python:networks_of_tests:dies_once", num_classes=10)
    method = {"name": "dml", "teacher": True}
    jobs = [
        dataclasses.replace(job(root, name, epochs=1), method=method, peers=(peer,), checkpoint_steps=2)
        for name in ("peers", "peers alone")
    ]
    (networks / "died").unlink(missing_ok=True)
    refused: list[str] = []
    both = train(jobs[0], workers=2, max_failures=1, on_progress=lambda _: refused.extend(refusals(jobs[0])))
    assert (networks / "died").exists()
    assert len(refused) >= 2, "the driver holds the run's lock, also while its ranks are restarted"
    assert not list(Path(jobs[0].run).glob("lock-*"))
    np.testing.assert_allclose(both.loss_S, training.train(jobs[1]).loss_S, rtol=1e-4)
    for name in ("model.safetensors", "peer-1.safetensors"):
        a, b = (load_file(Path(each.run, name)) for each in jobs)
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_branches_whose_worker_dies_end_in_the_same_bits(root: Path, networks: Path) -> None:
    method = {"name": "one", "node": "2", "branches": 2}
    died, lived = (
        dataclasses.replace(job(root, name, network="dies_once", epochs=1), method=method, checkpoint_steps=2)
        for name in ("died", "lived")
    )
    (networks / "died").unlink(missing_ok=True)
    result = train(died, max_failures=1)
    assert (networks / "died").exists()
    assert result.loss_S == training.train(lived).loss_S
    a, b = (Path(each.run, "model.safetensors").read_bytes() for each in (died, lived))
    assert a == b


def test_a_finished_run_is_read_back_and_another_job_of_its_name_is_refused(root: Path) -> None:
    told: list[Progress] = []
    finished = job(root, "finished", epochs=1)
    first = training.train(finished)
    Path(finished.run, "progress.json").touch()  # of a driver that was killed at the very end
    assert train(finished, workers=2, on_progress=told.append) == first
    assert "progress.json" not in files(finished.run)
    assert told == []
    with pytest.raises(ConfigError, match=r"optimizer\.epochs: begun with 1, now 2"):
        train(job(root, "finished", epochs=2))


def test_an_error_for_users_comes_out_of_a_rank_as_it_was_and_is_not_tried_again(root: Path) -> None:
    with pytest.raises(TeacherError) as caught:
        train(job(root, "wide", network="too_wide"), max_failures=1000)
    assert type(caught.value) is TeacherError
    assert "got (1, 11) (in python:networks_of_tests:too_wide). Next: set student.num_classes" in str(caught.value)


def test_too_few_cpus_are_said_at_once(root: Path) -> None:
    with pytest.raises(ResourceError, match=r"3 workers of 1 CPUs each, and room for 2: .*\(in cluster\.workers\)"):
        train(job(root, "large"), workers=3)
    with pytest.raises(ResourceError, match=r"1 workers of 1 CPUs and 1 GPUs each, and room for 0: 2 CPUs and 0 GPUs"):
        train(job(root, "large"), gpus_per_worker=1)
    with pytest.raises(ResourceError, match=r"2 workers of 2 CPUs each, and room for 1"):
        train(job(root, "large"), workers=2, loader_processes=1)
