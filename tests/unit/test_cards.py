"""Cards and specs: every field counts, and a difference is named."""

import dataclasses
import json

import pytest

from kddata.cards import Output, StoreSpec, TeacherCard, canonical_json, differences
from kddata.errors import ConfigError, StoreMismatchError, StoreVersionError
from kddata.views import ViewPlan

CARD = TeacherCard(
    arch="torchvision:mobilenet_v2",
    weights_sha256="ab" * 32,
    num_classes=1000,
    size_px=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SPEC = StoreSpec(plan=ViewPlan(), teacher=CARD, k=10, temperatures=(1, 2))

OTHER = {
    "plan.seed": 1,
    "plan.policy": "center",
    "plan.area": (0.1, 1.0),
    "plan.aspect": (0.5, 2.0),
    "plan.flip_p": 0.25,
    "plan.interpolation": "bicubic",
    "plan.center_px": 224,
    "plan.erase_p": 0.5,
    "plan.mix": "mixup",
    "plan.version": 2,
    "teacher.arch": "torchvision:mobilenet_v3_small",
    "teacher.weights_sha256": "cd" * 32,
    "teacher.num_classes": 999,
    "teacher.classes_sha256": "ef" * 32,
    "teacher.size_px": 192,
    "teacher.mean": (0.5, 0.5, 0.5),
    "teacher.std": (0.5, 0.5, 0.5),
    "teacher.dtype": "bfloat16",
    "teacher.labels_sha256": "01" * 32,
    "k": 11,
    "keep": "sampled",
    "temperatures": (1, 4),
    "codec": "compact",
    "format": "tar",
    "outputs": (Output(name="embedding", shape=(8,)),),
    "unit_images": 512,
    "unit_views": 2,
    "batch_size": 8,
    "threads": 2,
    "memory_format": "contiguous",
    "compile": True,
    "format_version": 2,
}


def _changed(key, value):
    """The spec with one field changed behind the back of its checks, so that fields can be changed one at a time."""
    group, _, name = key.rpartition(".")
    spec = dataclasses.replace(SPEC, **({group: dataclasses.replace(getattr(SPEC, group))} if group else {}))
    object.__setattr__(getattr(spec, group) if group else spec, name, value)
    return spec


def test_every_field_is_in_the_list_above():
    leaves = [f.name for f in dataclasses.fields(StoreSpec) if f.name not in ("plan", "teacher")]
    leaves += [f"plan.{f.name}" for f in dataclasses.fields(ViewPlan)]
    leaves += [f"teacher.{f.name}" for f in dataclasses.fields(TeacherCard)]
    assert sorted(leaves) == sorted(OTHER)


@pytest.mark.parametrize("key", OTHER)
def test_every_single_field_changes_the_fingerprint_and_is_named(key):
    changed = _changed(key, OTHER[key])
    assert changed.fingerprint != SPEC.fingerprint
    with pytest.raises(StoreMismatchError) as caught:
        SPEC.require_equal(changed, where="out/labels")
    message = str(caught.value)
    assert f"got {key}: stored " in message
    assert "(in out/labels)" in message
    assert message.count(": stored ") == 1
    assert "nothing was changed" in message


def test_equal_specs_agree():
    again = StoreSpec(plan=ViewPlan(area=(0.08, 1)), teacher=dataclasses.replace(CARD), k=10, temperatures=(2.0, 1.0))
    assert again.fingerprint == SPEC.fingerprint
    SPEC.require_equal(again, where="out/labels")


def test_the_fingerprint_is_pinned():
    """It is in stores: if it changes for an equal spec, no store of today can be joined tomorrow."""
    assert SPEC.fingerprint == PINNED


PINNED = "d986f084482aabb75b6f75e0713ea283f4ac9a8b8a4626cbb38558eefd872e44"


def test_json_and_back_is_the_same_spec():
    back = StoreSpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert back == SPEC
    assert back.fingerprint == SPEC.fingerprint


@pytest.mark.parametrize("version", [2, None, "1"])
def test_a_newer_version_is_refused(version):
    with pytest.raises(StoreVersionError, match=r"store format versions up to 1; got version .*Next: upgrade kddata"):
        StoreSpec.from_json({**SPEC.to_json(), "format_version": version})


def test_a_field_of_the_future_is_refused():
    data = SPEC.to_json()
    data["plan"]["policy_of_tomorrow"] = 1
    with pytest.raises(StoreVersionError, match=r"every field of a ViewPlan; got also \['policy_of_tomorrow'\]"):
        StoreSpec.from_json(data)


@pytest.mark.parametrize("k", [0, 1001])
def test_k_is_within_the_classes(k):
    with pytest.raises(ConfigError, match=f"labels.k is between 1 and the teacher's 1000 classes; got {k}"):
        dataclasses.replace(SPEC, k=k)


@pytest.mark.parametrize("name", ["unit_images", "unit_views", "batch_size", "threads"])
def test_counts_are_at_least_1(name):
    with pytest.raises(ConfigError, match=f"{name} is at least 1; got 0"):
        dataclasses.replace(SPEC, **{name: 0})


@pytest.mark.parametrize("change", [{"num_classes": 0}, {"size_px": 0}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}])
def test_a_card_is_checked(change):
    with pytest.raises(ConfigError, match="a teacher has at least one class and pixel"):
        dataclasses.replace(CARD, **change)


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": (1, 2.5), "a": None}) == '{"a":null,"b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_differences_name_leaves_by_dotted_keys():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == [("a.c", 2, None), ("a.d", None, 3)]
