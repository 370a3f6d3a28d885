"""Teachers of other libraries: timm and transformers, with weights as safetensors, and without any download."""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kddata.builders import public_name
from kddata.errors import ConfigError, TeacherError
from kddata.labelling import LabellingJob, label_store
from kddata.teacher import TeacherArgs, build_network, load_teacher, weights_sha256
from kddata.testing import fake_teacher_args, make_images
from kddata.views import ViewPlan


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refused(*arguments, **more):
        raise OSError("no network in these tests")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def views(num_views: int, size_px: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_views, 3, size_px, size_px), dtype=torch.uint8, generator=random)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A folder as transformers saves it: config.json of a small ViT for 32 px and 5 classes, and its weights."""
    transformers = pytest.importorskip("transformers", reason="the extra kddata[hf] is not installed")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config.num_labels = 5
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def hf_args(folder: Path, **changes: object) -> TeacherArgs:
    weights = str(folder / "model.safetensors")
    args = TeacherArgs(arch=f"hf:{folder}", weights=weights, num_classes=5, size_px=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return dataclasses.replace(args, **changes)  # type: ignore[arg-type]


def test_a_hugging_face_teacher_answers_as_transformers_does(vit):
    from transformers import AutoModelForImageClassification

    teacher, pixels = load_teacher(hf_args(vit), batch_size=4), views(6, 32)
    reference = AutoModelForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        expected = reference(pixel_values=(pixels / 255 - 0.5) / 0.5).logits
    assert torch.allclose(teacher(pixels), expected, atol=1e-5)
    assert expected.std() > 1e-3


def test_a_card_holds_no_path_and_changes_with_the_config(vit, tmp_path):
    card = load_teacher(hf_args(vit)).card
    moved = vit.rename(tmp_path / "elsewhere")
    assert card.arch.startswith("hf:vit@")
    assert load_teacher(hf_args(moved)).card == card
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert public_name(f"hf:{moved}") == card.arch
    (moved / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load_teacher(hf_args(moved)).card.arch != card.arch


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, "config.json"),
        ("not json", "."),
        ({"model_type": "bert"}, "BertConfig"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "."),
    ],
)
def test_a_folder_that_is_no_model_is_refused_and_its_code_is_not_run(tmp_path, config, found):
    pytest.importorskip("transformers", reason="the extra kddata[hf] is not installed")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(TeacherError, match=rf"has the config.json of a model for image .*{found}.* never run"):
        build_network(f"hf:{tmp_path}", num_classes=5)
    assert not (tmp_path / "ran").exists()


def test_a_hub_that_cannot_be_reached_is_said_so():
    pytest.importorskip("transformers", reason="the extra kddata[hf] is not installed")
    with pytest.raises(TeacherError, match=r"\(in hf:nobody/nothing\).*on the hub where it can be reached"):
        build_network("hf:nobody/nothing", num_classes=5)


def test_weights_and_sizes_of_another_model_are_named(vit):
    with pytest.raises(TeacherError, match=r"of another shape: classifier.weight \[5, 16\] for \[7, 16\]"):
        load_teacher(hf_args(vit, num_classes=7))
    with pytest.raises(TeacherError, match=r"takes views of 48 px .*set teacher.size_px"):
        load_teacher(hf_args(vit, size_px=48))


def test_weights_fit_under_the_names_of_the_file_and_those_of_the_network(vit, tmp_path, capfd):
    network = build_network(f"hf:{vit}", num_classes=5, weights=str(vit / "model.safetensors"))
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    again = build_network(f"hf:{vit}", num_classes=5, weights=str(tmp_path / "own.safetensors"))
    assert weights_sha256(again) == weights_sha256(network)
    stored = load_file(vit / "model.safetensors")
    assert stored.keys() != network.state_dict().keys(), "transformers 5 saves a ViT under its older names"
    del stored["vit.layernorm.bias"]
    save_file({key: value.half() for key, value in stored.items()}, tmp_path / "cut.safetensors")
    capfd.readouterr()
    with pytest.raises(TeacherError, match=r"exactly; got 1 missing: vit.layernorm.bias \(in"):
        build_network(f"hf:{vit}", num_classes=5, weights=str(tmp_path / "cut.safetensors"))
    assert capfd.readouterr() == ("", "")


def test_a_timm_teacher_answers_as_timm_does(tmp_path):
    timm = pytest.importorskip("timm", reason="the extra kddata[timm] is not installed")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=6).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    args = TeacherArgs(
        arch="timm:test_resnet.r160_in1k", weights=str(tmp_path / "w.safetensors"), num_classes=6, size_px=64
    )
    teacher, pixels = load_teacher(args, batch_size=4), views(5, 64)
    mean, std = (torch.tensor(x)[:, None, None] for x in (args.mean, args.std))
    with torch.no_grad():
        expected = network((pixels / 255 - mean) / std)
    assert torch.allclose(teacher(pixels), expected, atol=1e-4)
    assert expected.std() > 1e-3
    assert teacher.card.arch == args.arch
    with pytest.raises(ConfigError, match=r"names a model of timm; got 'test_resnetx'. Next: perhaps timm:test_resnet"):
        build_network("timm:test_resnetx", num_classes=6)


@pytest.mark.parametrize(("scheme", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, scheme, package):
    load = importlib.import_module

    def without(name, *more):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    match = rf"needs the package {package}; got No module named '{package}'.*pip install 'kddata\[{scheme}\]'"
    with pytest.raises(TeacherError, match=match):
        build_network(f"{scheme}:some_model", num_classes=5)


def test_teachers_of_two_sizes_share_the_views_of_one_plan(tmp_path):
    images = make_images(tmp_path / "images", num_images=6, min_px=60, max_px=90)
    plan, stores = ViewPlan(policy="randaugment", erase_p=0.5, mix="mixup"), []
    for size_px, mean in ((224, (0.0,) * 3), (260, (0.5,) * 3)):
        teacher = dataclasses.replace(fake_teacher_args(size_px=size_px), mean=mean)
        store = str(tmp_path / str(size_px))
        job = LabellingJob(images=images, store=store, teacher=teacher, plan=plan, views_per_image=2, k=3)
        stores.append(label_store(job).store)
    assert [(s.spec.teacher.size_px, s.spec.teacher.mean) for s in stores] == [(224, (0.0,) * 3), (260, (0.5,) * 3)]
    for unit in stores[0].units():
        small, large = (store.read(unit.number) for store in stores)
        assert small.image_id == large.image_id
        assert [small.view_at(i) for i in range(len(small))] == [large.view_at(i) for i in range(len(large))]
        assert not torch.equal(small.labels.log_p_BK, large.labels.log_p_BK)
