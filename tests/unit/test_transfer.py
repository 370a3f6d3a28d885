"""TL+KD on real images: a teacher fine-tuned on the target classes labels them, and four arms of one job file train.

Source and target are classes of CIFAR-10 that they do not share, six and four of them.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from kddata import nets
from kddata.config import LabelFile, TeachFile, TrainFile, label_job, load, teaching_job, train_job
from kddata.errors import ConfigError, SourceError, TeacherError
from kddata.labelling import label_store
from kddata.teacher import build_network
from kddata.testing import make_images
from kddata.training import classify, train
from kddata.training.teach import teach

CIFAR = (
    Path(os.environ.get("KDDATA_DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "cifar10_jpeg_train.npz"
)
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
TEXT = (CONFIGS / "transfer.yaml").read_text()
COMMANDS = [shlex.split(line[1:]) for line in TEXT.splitlines() if line.startswith("#   kddata ")]
ARMS = {next(word for word in words if word.startswith("run.name="))[9:]: words[3:] for words in COMMANDS[2:]}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def teacher_net(num_classes: int) -> nn.Module:
    return nets.small_resnet(num_classes, depth=2, stem_stride=2)


def student_net(num_classes: int) -> nn.Module:
    return nets.small_resnet(num_classes, stem_stride=2)


def write(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def write_images(folder: Path, classes: range, *, skip: int, most: int) -> str:
    """A folder of images of some classes, numbered from 0."""
    with np.load(CIFAR) as data:
        jpeg, offset, label = data["jpeg"], data["offset"], data["label"]
    for i in np.flatnonzero(np.isin(label, classes))[skip : skip + most].tolist():
        path = folder / f"{label[i] - classes.start}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg[offset[i] : offset[i + 1]].tobytes())
    return str(folder)


def teach_file(images: str, runs: Path, name: str, net: str, classes: int, **more: Any) -> dict[str, Any]:
    return {
        "images": images,
        "teacher": {
            "arch": f"python:{__name__}:{net}",
            "num_classes": classes,
            "size_px": 32,
            **HALVES,
            **more.pop("teacher", {}),
        },
        "views": {"area": [0.5, 1.0]},
        "batch_size": 32,
        "optimizer": {"lr": 0.05, "epochs": 3},
        "run": {"name": name, "storage": str(runs)},
        **more,
    }


@pytest.mark.skipif(not CIFAR.is_file(), reason=f"no real images: {CIFAR} is absent")
def test_four_arms_from_one_file(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", range(6), skip=0, most=480)
    target = write_images(tmp_path / "target", range(6, 10), skip=0, most=160)
    val = write_images(tmp_path / "val", range(6, 10), skip=160, most=80)
    cards = {}
    for name, net, start in (
        ("pretrained-teacher", "teacher_net", None),
        ("pretrained-student", "student_net", None),
        ("teacher", "teacher_net", "pretrained-teacher"),
    ):
        images, classes, more = (source, 6, {}) if start is None else (target, 4, {"evaluate": val})
        weights = {} if start is None else {"weights": str(tmp_path / start / "model.safetensors"), "new_head": True}
        data = teach_file(images, tmp_path, name, net, classes, teacher=weights, **more)
        cards[name] = teach(teaching_job(load(TeachFile, write(tmp_path / "teach.yaml", data))))
    taught = cards["teacher"]
    assert cards["pretrained-teacher"]["labels_sha256"] == cards["pretrained-student"]["labels_sha256"]
    assert taught["labels_sha256"] != cards["pretrained-teacher"]["labels_sha256"]
    assert taught["metrics"]["top1"] > 0.25  # of chance

    label = {
        "images": target,
        "store": str(tmp_path / "labels"),
        "teacher": {
            "arch": taught["student"]["arch"],
            "weights": str(tmp_path / "teacher" / "model.safetensors"),
            "num_classes": 4,
            "size_px": 32,
            "labels_sha256": taught["labels_sha256"],
            **HALVES,
        },
        "views": {"per_image": 2, "area": [0.5, 1.0]},
        "labels": {"k": 4, "temperatures": [1, 4]},
        "for_methods": [yaml.safe_load(TEXT)["method"]],
    }
    store = label_store(label_job(load(LabelFile, write(tmp_path / "label.yaml", label)))).store
    assert store.spec.teacher.weights_sha256 == taught["weights_sha256"]

    begun = str(tmp_path / "pretrained-student" / "model.safetensors")
    here = {
        **yaml.safe_load(TEXT),
        "store": store.url,
        "student": {"arch": f"python:{__name__}:student_net", "num_classes": 4, "weights": begun, "new_head": True},
        "data": {"batch_size": 32, "size_px": 32},
        "optimizer": {"lr": 0.02, "epochs": 1},
        "evaluate": {"images": val},
    }
    here["run"] = {"name": "tl-kd", "storage": str(tmp_path / "runs")}
    path, results = write(tmp_path / "transfer.yaml", here), {}
    for name, overrides in ARMS.items():
        results[name] = train(train_job(load(TrainFile, path, overrides)))
    assert list(results) == ["scratch", "tl", "scratch-kd", "tl-kd"]
    for name, result in results.items():
        card = result.card
        start = (begun, True) if "tl" in name else (None, False)
        assert (card["student"]["weights"], card["student"]["new_head"]) == start
        assert card["method"] == ({"name": "kd", "temperature": 4, "alpha": 0.9} if "kd" in name else {"name": "hard"})
        assert card["labels_sha256"] == card["teacher"]["labels_sha256"] == taught["labels_sha256"]
        assert card["teacher"]["weights_sha256"] == taught["weights_sha256"]
        assert {"top1", "nll", "ece", "brier"} <= set(card["metrics"])
        assert card == json.loads((tmp_path / "runs" / name / "card.json").read_text())
        others = {key: card[key] for key in ("data", "optimizer", "evaluate", "input", "store")}
        assert others == {key: results["scratch"].card[key] for key in others}  # arms differ in nothing else
    assert len({result.card["weights_sha256"] for result in results.values()}) == 4
    # what was learned on the source serves the target from the first step on
    assert results["tl"].loss_S[-1] < results["scratch"].loss_S[-1]


def test_the_commands_are_those_of_the_four_arms() -> None:
    assert [words[1] for words in COMMANDS] == ["teach", "label", "train", "train", "train", "train"]
    for words in COMMANDS:
        kind = {"teach": TeachFile, "label": LabelFile, "train": TrainFile}[words[1]]
        load(kind, CONFIGS / Path(words[2].removeprefix("jobs/configs/")), words[3:])


def test_a_teacher_is_taught_once_and_frozen_batchnorm_stays(tmp_path: Path) -> None:
    images = make_images(tmp_path, num_images=16, num_classes=4, min_px=24, max_px=32)
    data = teach_file(images, tmp_path, "t", "teacher_net", 4, teacher={"freeze_batchnorm": True, "size_px": 16})
    data["batch_size"] = 8
    job = teaching_job(load(TeachFile, write(tmp_path / "teach.yaml", data)))
    steps: list[int] = []
    card = teach(job, report=lambda step, num_steps, loss: steps.append(step))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert teach(job, report=lambda *_: pytest.fail("it is not done again")) == card
    weights, first = load_file(tmp_path / "t" / "model.safetensors"), build_network(job.network.arch, num_classes=4)
    for name, module in first.named_modules():
        for key, x in module.state_dict(prefix=f"{name}.").items() if isinstance(module, nn.BatchNorm2d) else ():
            assert torch.equal(x, weights[key]), key
    conv = next(name for name, x in first.named_parameters() if x.ndim == 4)
    assert not torch.equal(first.get_parameter(conv), weights[conv])
    said = list(classify(str(tmp_path / "t"), str(images), arch=job.network.arch, top=1))
    assert [(x.label, len(x.classes)) for x in said] == [(i % 4, 1) for i in range(16)]
    with pytest.raises(ConfigError, match=r"begun with another job|optimizer.lr: begun with 0.05, now 0.5"):
        teach(teaching_job(load(TeachFile, tmp_path / "teach.yaml", ["optimizer.lr=0.5"])))
    with pytest.raises(ConfigError, match=r"below the network's 3; got class 3 .*teacher.num_classes"):
        teach(teaching_job(load(TeachFile, tmp_path / "teach.yaml", ["teacher.num_classes=3", "run.name=x"])))
    with pytest.raises(SourceError, match="one batch of images at least; got 16 images, batch_size 32"):
        teach(teaching_job(load(TeachFile, tmp_path / "teach.yaml", ["batch_size=32", "run.name=x"])))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ("evaluate=nowhere.tar", SourceError, "nowhere.tar"),
        ("evaluate={more}", ConfigError, "below the network's 4; got class 5 .*more"),
        ("teacher.weights=nowhere.safetensors", TeacherError, "weights exist"),
    ],
)
def test_what_is_wrong_is_found_before_a_run_begins(
    tmp_path: Path, wrong: str, kind: type[Exception], message: str
) -> None:
    images = make_images(tmp_path / "images", num_images=8, num_classes=4, min_px=24, max_px=32)
    more = make_images(tmp_path / "more", num_images=8, num_classes=6, min_px=24, max_px=32)
    data = teach_file(images, tmp_path, "t", "teacher_net", 4, teacher={"size_px": 16}) | {"batch_size": 8}
    job = teaching_job(load(TeachFile, write(tmp_path / "teach.yaml", data), [wrong.format(more=more)]))
    with pytest.raises(kind, match=message):
        teach(job, report=lambda *_: pytest.fail("it is not trained"))
    assert not (tmp_path / "t").exists(), "the corrected command has the name for itself"
