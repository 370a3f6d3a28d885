"""for_methods of a label job: what a method needs and the store would not hold is named before a teacher is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from kddata.config import LabelFile, label_job, load
from kddata.errors import ConfigError
from kddata.labelling import LabellingJob
from kddata.losses.methods import METHODS

NODES = {"teacher_nodes": ["t1"], "student_nodes": ["s1"]}
PAIRS = {"teacher_pairs": [["t1", "t2"]], "student_pairs": [["s1", "s2"]]}
EVERYTHING = ["embedding", "features:t1", "attention:t1", "fsp:t1:t2", "boundary", "boundary_logits"]


def job(folder: Path, methods: list[Any], **labels: Any) -> LabellingJob:
    """A label job whose teacher has a classifier, in a file, and no other weights."""
    views = labels.pop("per_image", 1)
    save_file({"fc.weight": torch.randn(10, 16), "fc.bias": torch.zeros(10)}, folder / "teacher.safetensors")
    data = {
        "images": "images",
        "store": "out",
        "teacher": {
            "arch": "torchvision:resnet18",
            "weights": labels.pop("weights", str(folder / "teacher.safetensors")),
            "num_classes": 10,
            "size_px": 32,
        },
        "views": {"per_image": views},
        "labels": {"k": 3, **labels},
        "for_methods": methods,
    }
    (folder / "label.yaml").write_text(yaml.safe_dump(data))
    return label_job(load(LabelFile, folder / "label.yaml"))


def test_a_store_that_keeps_everything_serves_every_method_by_its_name(tmp_path: Path) -> None:
    job(tmp_path, list(METHODS), k=10, outputs=EVERYTHING, per_image=2)


def test_a_mapping_is_held_to_its_arguments(tmp_path: Path) -> None:
    methods = [
        {"name": "kd", "temperature": 4},
        {"name": "dkd", "tail": "uniform", "temperature": 4},
        {"name": "at", **NODES},
        {"name": "sum", "terms": [{"name": "kd", "temperature": 2}, {"name": "fsp", **PAIRS}, {"name": "srrl"}]},
    ]
    job(tmp_path, methods, temperatures=[2, 4], outputs=EVERYTHING)


@pytest.mark.parametrize(
    ("method", "labels", "message"),
    [
        ("fsp", {}, r"method fsp needs stored outputs fsp:NODE:NODE; got none .*labels.outputs=\[fsp:NODE:NODE\]"),
        ("at", {"outputs": ["embedding"]}, r"attention:NODE; got embedding .*=\[embedding, attention:NODE\]"),
        (
            "rkd",
            {},
            r"stored output embedding; got none \(in for_methods\). Next: set labels.outputs=\[embedding\]",
        ),
        ({"name": "at", **NODES}, {"outputs": ["attention:t9"]}, r"set labels.outputs=\[attention:t9, attention:t1\]"),
        ({"name": "kd", "temperature": 4}, {}, r"tail mass at temperature 4; .*set labels.temperatures=\[1, 4\]"),
        ("dkd", {}, r"method dkd needs all classes; got k = 3 of 10 .*set labels.k=10 \(or set method.tail"),
        ("mlkd", {"k": 10}, r"2 views of each image; got 1 .*set views.per_image=2"),
        ({"name": "kd", "temperature": 1}, {"keep": "sampled"}, r"needs top classes; .*set labels.keep=top"),
        ({"name": "sum", "terms": [{"name": "hard"}, {"name": "sp"}]}, {}, r"method sp needs the stored output"),
        ({"name": "srrl", "classifier_layer": "head"}, {"outputs": ["embedding"]}, "linear layers fc"),
        (
            "srrl",
            {"weights": "ResNet18_Weights.IMAGENET1K_V1"},
            "read from a safetensors file; got teacher.weights Res",
        ),
        ("fspp", {}, "perhaps fsp was meant"),
        ({"nam": "kd"}, {}, "a method has a name"),
        ({"name": "kd", "temprature": 1}, {}, "perhaps temperature"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, method: Any, labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        job(tmp_path, ["hard", method], **labels)


def test_the_job_and_so_its_store_do_not_depend_on_it(tmp_path: Path) -> None:
    """A plain job has no such field: whatever is made of it, a spec among it, is the same."""
    assert job(tmp_path, ["hard", "kd"]) == job(tmp_path, [])
