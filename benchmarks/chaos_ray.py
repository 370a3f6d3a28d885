"""Kills actors, drivers and nodes of labelling on Ray at random moments, and compares every byte of every store.

    python benchmarks/chaos_ray.py                          # 50 kills, at most 10 minutes
    python benchmarks/chaos_ray.py --kills 10 --minutes 3

A head without CPUs stands all the time, and a node that labels. A driver labels; after a random while it, one of its
actors, or the raylet of the node is killed with SIGKILL; a driver is started again when it was the victim, and another
node when that was. The time in which Ray notices a dead node is measured. A finished store must equal, byte for byte,
the one that a single process makes; then the next store is begun. Every kill is of a process that was seen alive and is
seen gone. Results go to benchmarks/results/chaos_ray.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from results import environment, write_results

from kddata.labelling import LabellingJob, label_store
from kddata.teacher import TeacherArgs
from kddata.testing import chaos, make_images
from kddata.views import ViewPlan

DRIVER = "import pickle, sys; from kddata.cluster.labelling import label; label(pickle.load(open(sys.argv[1], 'rb')))"
NETWORK = """
import time
from kddata.testing import FakeNetwork

class Slow(FakeNetwork):
    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)
"""


def actors(below: int) -> list[int]:
    """Ids of the labelling actors below a process."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, border = [], [below]
    while border:
        border = [pid for pid, parent in parents.items() if parent in border]
        found += [pid for pid in border if b"MapWorker" in titles[pid]]
    return found


def kill(pid: int) -> None:
    """Kills a living process and waits until it is gone."""
    before = Path(f"/proc/{pid}/stat").read_text().split()[21]
    os.kill(pid, signal.SIGKILL)
    path = Path(f"/proc/{pid}/stat")
    while path.exists():
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return
        if fields[0] == "Z" or fields[19] != before:
            return
        time.sleep(0.01)


def kill_node(cluster: Cluster) -> float:
    """Kills the raylet of the node that labels, and returns the seconds until Ray knew; another node is there then."""
    (node,) = cluster.worker_nodes
    (process,) = node.all_processes["raylet"]
    kill(process.process.pid)
    begin = time.monotonic()
    while any(known["NodeID"] == node.node_id and known["Alive"] for known in ray.nodes()):
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    cluster.remove_node(node, allow_graceful=False)  # what else it had started
    cluster.add_node(num_cpus=2)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    chance = random.Random(0)
    kills: Counter[str] = Counter()
    noticed_s: list[float] = []
    finished = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "slow_network.py").write_text(NETWORK)
        sys.path.insert(0, folder)
        os.environ |= {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        teacher = TeacherArgs(
            arch="python:slow_network:Slow", num_classes=10, size_px=16, mean=(0, 0, 0), std=(1, 1, 1)
        )
        job = LabellingJob(
            images="file://" + make_images(root / "images", num_images=64, shards=2),  # several nodes take URLs
            store=f"file://{root}/wanted",
            teacher=teacher,
            plan=ViewPlan(),
            k=3,
            unit_images=2,
            batch_size=1,
        )
        wanted = chaos.contents(label_store(job).store.url)
        health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
        cluster.add_node(num_cpus=2)
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        begin, driver, url = time.monotonic(), None, ""
        try:
            while kills.total() < args.kills and time.monotonic() - begin < 60 * args.minutes:
                if not url:
                    url = f"file://{root}/store-{finished}"
                    (root / "job").write_bytes(pickle.dumps(dataclasses.replace(job, store=url)))
                if driver is None:
                    command = [sys.executable, "-c", DRIVER, str(root / "job")]
                    driver = subprocess.Popen(
                        command, env=env, stdout=subprocess.DEVNULL, stderr=(root / "said").open("wb")
                    )
                until = time.monotonic() + chance.uniform(1, 14)  # a driver takes seconds to start
                while time.monotonic() < until and driver.poll() is None:
                    time.sleep(0.02)
                if driver.poll() is not None:
                    finished += 1
                    if driver.returncode != 0 or chaos.contents(url) != wanted:
                        wrong += 1
                        print(f"\nexit code {driver.returncode}:", (root / "said").read_text()[-3000:])
                    driver, url = None, ""
                elif (draw := chance.random()) < 0.25:
                    noticed_s.append(kill_node(cluster))
                    kills["node"] += 1
                elif draw < 0.65 and (living := actors(os.getpid())):
                    kill(chance.choice(living))
                    kills["actor"] += 1
                else:
                    driver.kill()
                    assert driver.wait() == -signal.SIGKILL
                    driver = None
                    kills["driver"] += 1
                print(f"{kills.total()} kills, {finished} stores finished, {wrong} wrong", end="\r", flush=True)
            if url:  # what the last kill left is finished too
                if driver is not None:
                    driver.wait()
                label_store(dataclasses.replace(job, store=url))
                finished += 1
                wrong += chaos.contents(url) != wanted
        finally:
            if driver is not None:
                driver.kill()
            ray.shutdown()
            cluster.shutdown()
    seconds = time.monotonic() - begin
    print(f"{dict(kills)} in {seconds:.0f} s, {finished} stores finished, {wrong} not as undisturbed")
    results = {
        "environment": environment(),
        "kills": kills,
        "seconds": round(seconds),
        "stores": finished,
        "wrong": wrong,
        "node_death_noticed_s": {"worst": max(noticed_s, default=None), "all": noticed_s},
    }
    print(write_results("chaos_ray", results))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
