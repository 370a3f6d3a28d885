"""Labelling on Ray ends in the very bytes that labelling in one process gives, whatever happens to the actors."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from kddata.cluster.labelling import Standing, label
from kddata.errors import BadImageBudgetError, ResourceError, StoreBusyError, StoreMismatchError, TeacherError
from kddata.labelling import LabellingJob, label_store
from kddata.store import LabelStore, driving
from kddata.teacher import TeacherArgs
from kddata.testing import encode, make_images, write_tar
from kddata.views import ViewPlan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("local_ray")]


def job(root: Path, store: str, *, network: str = "Slow", **values: object) -> LabellingJob:
    """24 images in two shards, two views: 6 units, each of two forward passes."""
    teacher = TeacherArgs(
        arch=f"python:networks_of_tests:{network}", num_classes=10, size_px=16, mean=(0, 0, 0), std=(1, 1, 1)
    )
    fields = {"views_per_image": 2, "k": 3, "unit_images": 4, "batch_size": 4, **values}
    images = make_images(root / "images", num_images=24)
    return LabellingJob(images=images, store=str(root / store), teacher=teacher, plan=ViewPlan(), **fields)


def files(url: str) -> dict[str, bytes]:
    return {str(path.relative_to(url)): path.read_bytes() for path in sorted(Path(url).rglob("*")) if path.is_file()}


def receipts(store: Path) -> list[Path]:
    return sorted((store / "receipts").iterdir())


@pytest.fixture(scope="module")
def expected(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Where the images lie, and the files of the store that one process makes of them."""
    root = tmp_path_factory.mktemp("labelling")
    return root, files(label_store(job(root, "alone")).store.url)


def test_actors_write_the_same_bytes_and_tell_where_they_stand(expected: tuple[Path, dict[str, bytes]]) -> None:
    root, wanted = expected
    told: list[Standing] = []
    done = label(job(root, "actors"), teachers=2, on_standing=told.append, window_units=4)
    assert done.new_units == 6
    assert files(done.store.url) == wanted
    assert [now.views for now in told] == [0, 8, 16, 24, 32, 40, 48]
    assert {now.total_views for now in told} == {48}
    assert (told[-1].labelled, told[-1].bad_images) == (48, 0)
    assert told[-1].correct == done.store.info()["correct"]


def test_a_second_run_does_nothing_and_another_job_is_refused(expected: tuple[Path, dict[str, bytes]]) -> None:
    root, wanted = expected
    told: list[Standing] = []
    again = label(job(root, "alone"), teachers=2, on_standing=told.append)
    assert (again.new_units, told) == (0, [])
    assert files(str(root / "alone")) == wanted
    with pytest.raises(StoreMismatchError, match=r"k: stored 3, asked 4"):
        label(job(root, "alone", k=4), teachers=2)


def test_finished_units_are_skipped(expected: tuple[Path, dict[str, bytes]]) -> None:
    root, wanted = expected
    told: list[Standing] = []

    def stop(now: Standing) -> None:
        if now.views >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(job(root, "stopped"), teachers=1, on_standing=stop)
    shards = root / "stopped" / "labels"
    written = {path.stem: (shards / f"{path.stem}.arrow").stat().st_mtime_ns for path in receipts(root / "stopped")}
    assert len(written) >= 2
    done = label(job(root, "stopped"), teachers=1, on_standing=told.append)
    assert done.new_units <= 6 - len(written)
    assert told[0].views >= 8 * len(written)
    assert files(done.store.url) == wanted
    for name, time_ns in written.items():
        assert (shards / f"{name}.arrow").stat().st_mtime_ns == time_ns, "a finished unit is not written again"


def test_a_killed_actor_is_replaced_and_the_bytes_are_the_same(
    expected: tuple[Path, dict[str, bytes]], kill_worker: Callable[[str], int]
) -> None:
    root, wanted = expected
    killed: list[int] = []

    def kill_once(now: Standing) -> None:
        if now.views and not killed:
            killed.append(kill_worker("MapWorker"))

    done = label(job(root, "killed"), teachers=1, on_standing=kill_once)
    assert len(killed) == 1
    assert done.new_units == 6
    assert files(done.store.url) == wanted


def test_drivers_and_actors_killed_again_and_again_leave_no_trace(
    expected: tuple[Path, dict[str, bytes]], kill_worker: Callable[[str], int], tmp_path: Path
) -> None:
    """Each driver is killed a little later than the one before; the next takes over its lock and its units."""
    root, wanted = expected
    chased = job(root, "chased")
    (tmp_path / "job").write_bytes(pickle.dumps(chased))
    code = "import pickle, sys; from kddata.cluster.labelling import label; label(pickle.load(open(sys.argv[1], 'rb')))"
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    store = Path(chased.store)
    killed = []
    for victim, done in (("actor", 1), ("driver", 2)):
        driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job")], env=env, stderr=subprocess.PIPE)
        try:
            while driver.poll() is None and len(list(store.glob("receipts/*.json"))) < done:
                time.sleep(0.02)
            if victim == "actor":
                killed.append(kill_worker("MapWorker"))
        finally:
            driver.kill()
            _, err = driver.communicate()
        assert driver.returncode == -signal.SIGKILL, err.decode()
        killed.append(driver.pid)
        assert not (store / "manifest-000001.json").exists()
    assert len(killed) == 3
    assert list(store.glob("lock-*.json")), "the last driver left its lock"
    done = label(chased, teachers=1)
    assert done.new_units <= 4
    assert files(chased.store) == wanted


def test_a_second_driver_is_told_before_ray_is_asked(expected: tuple[Path, dict[str, bytes]]) -> None:
    root, _ = expected
    taken = job(root, "taken")
    with driving(taken.store), pytest.raises(StoreBusyError, match=f"got process {os.getpid()} on "):
        label(taken)


def test_an_error_for_users_comes_out_of_an_actor_as_it_was(expected: tuple[Path, dict[str, bytes]]) -> None:
    root, _ = expected
    with pytest.raises(TeacherError) as caught:
        label(job(root, "nan", network="NotANumber"), teachers=1)
    assert type(caught.value) is TeacherError
    assert "NaN or infinity for image-000" in str(caught.value)
    assert "Next: check its weights, mean and std." in str(caught.value)


def test_past_the_budget_of_bad_images_the_job_fails_and_finished_units_stay(tmp_path: Path) -> None:
    spoiled = job(tmp_path, "bad", network="FakeNetwork", bad_images=0.0)
    write_tar(tmp_path / "images" / "00002.tar", [("z.jpg", b"no image"), ("z.cls", b"0")])
    spoiled = dataclasses.replace(spoiled, images=str(tmp_path / "images"))
    with pytest.raises(BadImageBudgetError, match=r"at most 0 of 25 images may be bad .* got 1 so far, such as z: "):
        label(spoiled, teachers=1)
    kept = len(receipts(tmp_path / "bad"))
    assert kept >= 1
    done = label(dataclasses.replace(spoiled, bad_images=0.1), teachers=1)
    assert done.new_units == 7 - kept
    assert LabelStore.open(done.store.url).info()["bad_images"] == 1


def test_too_few_cpus_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"got 3 teachers of 1 CPUs each, and room for 2: 2 CPUs and 0 GPUs on 1 node"
    ):
        label(job(tmp_path, "large"), teachers=3)
    with pytest.raises(ResourceError, match=r"and room for 0: .*cluster\.teachers.*ask for less for each"):
        label(job(tmp_path, "large", threads=3), teachers=1)
    with pytest.raises(ResourceError, match=r"1 teachers of 1 CPUs and 1 GPUs each, and room for 0"):
        label(job(tmp_path, "large"), teachers=1, gpus_per_teacher=1)
    assert not (tmp_path / "large").exists(), "nothing was begun"


def test_a_unit_that_hangs_is_given_to_another_process(expected: tuple[Path, dict[str, bytes]]) -> None:
    root, wanted = expected
    done = label(job(root, "hangs", network="HangsOnce"), unit_timeout_s=3)
    assert done.new_units == 6
    assert set(files(done.store.url)) == set(wanted)


def test_an_image_that_ends_every_process_ends_the_job_and_is_narrowed_down(
    expected: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    white = encode(np.full((32, 32, 3), 255, np.uint8), "png")
    root, _ = expected
    deadly = job(root, "unused", network="Deadly")
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "images" / "a.tar", [("white.png", white)])
    with pytest.raises(ResourceError, match=r"one of the units 0 ended each of the 2 processes.*a\.tar"):
        label(dataclasses.replace(deadly, images=str(tmp_path / "images"), store=str(tmp_path / "store")), retries=1)


def test_outputs_of_the_teacher_are_the_same_bytes_too(tmp_path: Path) -> None:
    """Convolutions, whose last bits depend on batch, threads and memory format: actors keep what the spec says."""
    kept = ("embedding", "attention:7", "features:11", "fsp:1:2", "boundary", "boundary_logits")
    teacher = TeacherArgs(arch="python:kddata.nets:small_cnn", num_classes=10, size_px=16)
    alone = dataclasses.replace(job(tmp_path, "alone"), teacher=teacher, outputs=kept, codec="compact")
    wanted = label_store(alone).store
    done = label(dataclasses.replace(alone, store=str(tmp_path / "actors")), teachers=2)
    assert done.new_units == 6
    assert files(done.store.url) == files(wanted.url)
    rows = done.store.read(0)
    assert set(rows.outputs) == set(kept)
    assert all(len(values) == len(rows) and values.any() for values in rows.outputs.values())
