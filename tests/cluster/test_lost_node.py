"""A whole node dies while it labels: its units go to the next one, and the bytes are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
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


def test_a_node_that_is_killed_costs_its_unit_alone(cluster: Cluster, tmp_path: Path) -> None:
    def job(store: str) -> LabellingJob:
        return LabellingJob(
            images=f"file://{images}",  # several nodes take URLs
            store=f"file://{tmp_path}/{store}",
            teacher=TeacherArgs(
                arch="python:networks_of_tests:Slow", num_classes=10, size_px=16, mean=(0, 0, 0), std=(1, 1, 1)
            ),
            plan=ViewPlan(),
            k=3,
            unit_images=4,
            batch_size=4,
        )

    images = make_images(tmp_path / "images", num_images=24)
    wanted = chaos.contents(label_store(job("alone")).store.url)
    killed: list[str] = []

    def kill_once(now: Standing) -> None:
        if now.views and not killed:
            (node,) = cluster.worker_nodes
            (raylet,) = node.all_processes["raylet"]
            killed.append(node.node_id)
            os.kill(raylet.process.pid, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)  # what else it had started
            cluster.add_node(num_cpus=1)

    done = label(job("lost"), teachers=1, on_standing=kill_once)
    assert len(killed) == 1
    assert {node["NodeID"] for node in ray.nodes() if not node["Alive"]} >= set(killed)
    assert done.new_units == 6
    assert chaos.contents(f"file://{tmp_path}/lost") == wanted
