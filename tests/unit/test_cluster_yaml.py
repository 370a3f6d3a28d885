"""cluster.yaml, checked offline: by Ray's own validators, and for what these let through."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NODE_KEYS = {"min_workers", "max_workers", "resources", "node_config"}
ADDED_BY_RAY = {"MinCount": 1, "MaxCount": 1, "ImageId": "ami-0"}  # at launch


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def faults(cluster: dict[str, Any]) -> list[str]:
    """What Ray's validator would accept and a launch would stumble over."""
    import botocore.session
    from botocore.validate import ParamValidator

    found = []
    launch = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in cluster["available_node_types"].items():
        report = ParamValidator().validate({**node["node_config"], **ADDED_BY_RAY}, launch)
        if report.has_errors():
            found.append(f"{name}.node_config: {report.generate_report()}")
        found += [f"{name}: no {key}" for key in sorted(NODE_KEYS - node.keys())]
        if "CPU" not in node["resources"]:
            found.append(f"{name}.resources: no CPU")
        odd = node["resources"].keys() - {"CPU", "GPU"}
        found += [f"{name}.resources: {key}" for key in sorted(odd)]
        found += [f"{name}: unknown key {key}" for key in sorted(node.keys() - NODE_KEYS)]
        if node.get("min_workers", 0) > node.get("max_workers", 0):
            found.append(f"{name}: more min_workers than max_workers")
    return found


def test_rays_validators_accept_it(cluster: dict[str, Any]) -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(cluster, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    workers = {name: node for name, node in prepared["available_node_types"].items() if name != "head"}
    assert sum(node["max_workers"] for node in workers.values()) <= prepared["max_workers"]
    assert all(node["min_workers"] >= 1 and node["resources"]["GPU"] >= 1 for node in workers.values())


def test_what_rays_validators_miss_is_right_too(cluster: dict[str, Any]) -> None:
    assert faults(cluster) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("node_config", "InstanceTyp"), "g5.xlarge", "InstanceTyp"),
        (("node_config", "InstanceMarketOptions"), {"MarketTyp": "spot"}, "MarketTyp"),
        (("resources", "GPUs"), 1, "GPUs"),
        (("min_worker",), 1, "min_worker"),
        (("min_workers",), None, "no min_workers"),
    ],
)
def test_the_check_finds_planted_faults(
    cluster: dict[str, Any], path: tuple[str, ...], value: Any, expected: str
) -> None:
    broken = copy.deepcopy(cluster)
    section = broken["available_node_types"]["labelling"]
    for part in path[:-1]:
        section = section[part]
    if value is None:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    assert expected in "\n".join(faults(broken))


def test_every_ray_setting_is_one_that_ray_knows(cluster: dict[str, Any]) -> None:
    import ray

    known = (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()
    settings = re.findall(r"-e (RAY_\w+)=(\S+)", "\n".join(cluster["docker"]["run_options"]))
    assert ("RAY_AUTH_MODE", "token") in settings
    for name, value in settings:
        assert name.removeprefix("RAY_").encode() in known, f"{name} is no setting of this Ray"
        assert value == "token" or int(value) > 0
    assert len(settings) == 9


def test_nodes_get_the_wheel_the_token_and_a_ray_that_kddata_supports(cluster: dict[str, Any]) -> None:
    oldest = re.search(r"ray\[[^]]*\]>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        version = re.fullmatch(r"rayproject/ray:(\d+)\.(\d+)\.\d+-py31[1-9]-(cpu|gpu)", image)
        assert version is not None, image
        assert (int(version[1]), int(version[2])) >= (int(oldest[1]), int(oldest[2]))
    assert "/home/ray/dist/kddata-*.whl" in cluster["setup_commands"][0]
    assert cluster["file_mounts"].keys() == {"/home/ray/dist", "/home/ray/.ray"}
    starts = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert "0.0.0.0" not in starts, "the job server runs anyone's code: loopback only"
