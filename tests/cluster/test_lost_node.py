"""A whole node dies while it labels: its units go to the next one, and the bytes are those of an undisturbed run.

So they are when actors, nodes and drivers die in turn; benchmarks/chaos_ray.py is the long form.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from kddata.cluster.labelling import Standing, label
from kddata.labelling import LabellingJob, label_store
from kddata.teacher import TeacherArgs
from kddata.testing import chaos, make_images
from kddata.views import ViewPlan

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
DRIVER = "import pickle, sys; from kddata.cluster.labelling import label; label(pickle.load(open(sys.argv[1], 'rb')))"


@pytest.fixture
def cluster(networks: Path) -> Iterator[Cluster]:
    """A head that has no CPUs, and one node that labels. A node that is silent for 3 s counts as dead."""
    health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
    try:
        found.add_node(num_cpus=1)
        ray.init(found.address, logging_level="ERROR", log_to_driver=False)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def job(root: Path, *, num_images: int, batch_size: int) -> LabellingJob:
    """Units of four images; 0.05 s a batch."""
    return LabellingJob(
        images="file://" + make_images(root / "images", num_images=num_images),  # several nodes take URLs
        store=f"file://{root}/labels",
        teacher=TeacherArgs(
            arch="python:networks_of_tests:Slow", num_classes=10, size_px=16, mean=(0, 0, 0), std=(1, 1, 1)
        ),
        plan=ViewPlan(),
        k=3,
        unit_images=4,
        batch_size=batch_size,
    )


def undisturbed(job: LabellingJob) -> dict[str, bytes]:
    """The files that one process makes, in a place beside the job's."""
    return chaos.contents(label_store(dataclasses.replace(job, store=f"{job.store}-alone")).store.url)


def kill_node(cluster: Cluster) -> str:
    """Kills the raylet of the node that labels, and all else of it; adds another, and returns the id of the dead."""
    (node,) = cluster.worker_nodes
    (raylet,) = node.all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)  # what else it had started
    cluster.add_node(num_cpus=1)
    return str(node.node_id)


def dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def test_a_node_that_is_killed_costs_its_unit_alone(cluster: Cluster, tmp_path: Path) -> None:
    lost = job(tmp_path, num_images=24, batch_size=4)
    wanted = undisturbed(lost)
    killed: list[str] = []

    def kill_once(now: Standing) -> None:
        if now.views and not killed:
            killed.append(kill_node(cluster))

    done = label(lost, teachers=1, on_standing=kill_once)
    assert len(killed) == 1
    assert dead_nodes() >= set(killed)
    assert done.new_units == 6
    assert chaos.contents(lost.store) == wanted


def test_an_actor_a_node_and_a_driver_killed_at_random_moments_leave_no_trace(
    cluster: Cluster, kill_worker: Callable[[str], int], tmp_path: Path
) -> None:
    """In any order, each when a unit has been finished since the last kill and up to 0.6 s later: three units."""
    chased = job(tmp_path, num_images=64, batch_size=1)
    wanted = undisturbed(chased)
    seed = secrets.randbits(32)
    logging.warning("seed %d", seed)  # shown where it fails
    chance = random.Random(seed)
    (tmp_path / "job").write_bytes(pickle.dumps(chased))
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "job")]
    drivers: list[subprocess.Popen[bytes]] = []
    store, dead = tmp_path / "labels", []

    def finished() -> int:
        return len(list(store.glob("receipts/*.json")))

    try:
        for victim in chance.sample(["actor", "node", "driver"], 3):
            logging.warning("%s, after %d units", victim, finished())
            if not drivers or drivers[-1].poll() is not None:
                drivers.append(subprocess.Popen(command, env=env, stderr=(tmp_path / "said").open("wb")))
            before = finished()
            while finished() == before:
                assert drivers[-1].poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.6))
            if victim == "actor":
                dead.append(kill_worker("MapWorker"))
            elif victim == "node":
                dead.append(kill_node(cluster))
            else:
                drivers[-1].kill()
                assert drivers[-1].wait() == -signal.SIGKILL
                dead.append(drivers[-1].pid)
            assert not (store / "manifest-000001.json").exists(), "it was killed while it labelled"
        if drivers[-1].poll() is not None:
            drivers.append(subprocess.Popen(command, env=env, stderr=(tmp_path / "said").open("wb")))
        assert drivers[-1].wait(120) == 0, (tmp_path / "said").read_text()
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    assert len(dead) == 3
    assert len(drivers) == 2
    assert dead_nodes() & {str(one) for one in dead}
    assert chaos.contents(chased.store) == wanted
