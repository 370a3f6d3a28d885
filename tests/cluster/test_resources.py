"""Whether there is room, whether every node sees the same files, and errors inside errors; no Ray is started."""

from __future__ import annotations

import pytest
import ray
import ray.train
from hypothesis import given
from hypothesis import strategies as st

from kddata.cluster import resources
from kddata.cluster.session import original
from kddata.errors import ConfigError, StoreDamagedError


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "fit"),
    [
        ([{"CPU": 4}], 1, 0, 4),
        ([{"CPU": 4}], 3, 0, 1),
        ([{"CPU": 2}, {"CPU": 2}], 3, 0, 0),  # four CPUs in all, but none for a process of three
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8}], 1, 1, 1),
        ([{"CPU": 8, "GPU": 2}], 1, 0.25, 8),
        ([{"CPU": 1, "GPU": 1}], 0.1, 0.1, 10),  # 1 / 0.1 is a hair below 10 in floats of some libraries
        ([{}], 1, 0, 0),
        ([], 1, 0, 0),
    ],
)
def test_room_counts_whole_processes_on_single_nodes(
    nodes: list[dict[str, float]], cpus: float, gpus: float, fit: int
) -> None:
    assert resources.room(nodes, cpus=cpus, gpus=gpus) == fit


@given(nodes=st.lists(st.integers(0, 16), max_size=5), cpus=st.integers(1, 8))
def test_room_is_what_placing_one_by_one_finds(nodes: list[int], cpus: int) -> None:
    free, placed = list(nodes), 0
    while any(one >= cpus for one in free):
        free[next(i for i, one in enumerate(free) if one >= cpus)] -= cpus
        placed += 1
    assert resources.room([{"CPU": one} for one in nodes], cpus=cpus, gpus=0) == placed


def nodes(alive: int, dead: int = 0) -> list[dict[str, object]]:
    return [{"Alive": i < alive, "Resources": {"CPU": 2.0}} for i in range(alive + dead)]


def test_on_several_nodes_a_plain_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes(2))
    shared = {"store": "s3://bucket/labels", "images": ("file:///mnt/a.tar", "gs://b/c.tar"), "run": None}
    resources.require_shared(shared)
    with pytest.raises(ConfigError, match=r"every location is a URL .* got /data/b\.tar \(in images\)\. Next: name an"):
        resources.require_shared({**shared, "images": ("s3://bucket/a.tar", "/data/b.tar")})


def test_on_one_node_a_plain_path_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes(1, dead=1))
    resources.require_shared({"store": "/data/labels"})


def test_the_error_inside_errors_of_ray_is_found() -> None:
    inner = StoreDamagedError("a rule", where="file")
    outer = ray.exceptions.RayTaskError("function", "traceback", inner)
    assert original(outer) is inner
    assert original(outer.as_instanceof_cause()) is inner
    failed = ray.train.WorkerGroupError("failed", {0: RuntimeError("collateral"), 1: outer})
    assert original(failed) is inner
    bug = KeyError("a bug")
    assert original(bug) is bug
    chained = RuntimeError("outer")
    chained.__cause__ = chained
    assert original(chained) is chained
