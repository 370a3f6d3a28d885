"""Views are pure: drawn from their arguments alone, inside the image, and rendered to the same bits."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from kddata.errors import ConfigError
from kddata.testing import image_sizes, plans
from kddata.views import View, ViewPlan, pixel_hash, render

ids = st.text(max_size=20)  # rendered sides start at 2: torch 2.15 fails an assertion of its own on 1 x 1 outputs


@given(plan=plans(), image_id=ids, size=image_sizes(), view=st.integers(0, 10_000))
def test_a_box_lies_inside_the_image(plan, image_id, size, view):
    drawn = plan.draw(image_id, view, *size)
    top, left, height, width = drawn.box
    assert height >= 1
    assert width >= 1
    assert 0 <= top <= size[0] - height
    assert 0 <= left <= size[1] - width
    assert drawn.resize is None
    assert all(type(x) is int for x in drawn.box)


@given(plan=plans(), image_id=ids, size=image_sizes(200), seed=st.integers(0, 99))
def test_view_k_is_the_same_drawn_first_last_or_alone(plan, image_id, size, seed):
    in_order = [plan.draw(image_id, k, *size) for k in range(6)]
    order = list(range(6))
    random.Random(seed).shuffle(order)
    shuffled = {k: ViewPlan(**dataclasses.asdict(plan)).draw(image_id, k, *size) for k in order}
    assert [shuffled[k] for k in range(6)] == in_order


@given(plan=plans(), size=image_sizes(200))
def test_a_view_depends_on_id_index_and_seed(plan, size):
    # A photo has so many boxes that 8 equal draws mean a forgotten argument; flips alone would hide behind 2^-8.
    plan = dataclasses.replace(plan, area=(0.1, 0.9), aspect=(0.75, 1.4), flip_p=0.5)
    drawn = [plan.draw("a", k, 480, 640) for k in range(8)]
    assert len(set(drawn)) > 1
    assert drawn != [plan.draw("b", k, 480, 640) for k in range(8)]
    assert drawn != [dataclasses.replace(plan, seed=plan.seed + 1).draw("a", k, 480, 640) for k in range(8)]


def test_a_fresh_process_draws_the_same_views():
    cases = [("n01/α 1", k, h, w) for k in range(5) for h, w in ((1, 1), (333, 500), (4000, 3), (28, 28))]
    code = (
        "import json, sys\nfrom kddata.views import ViewPlan\n"
        "cases = json.loads(sys.argv[1])\n"
        "print(json.dumps([(v.box, v.flip) for v in (ViewPlan(seed=7).draw(*c) for c in reversed(cases))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases)], capture_output=True, check=True, text=True, cwd="/"
    )
    here = [ViewPlan(seed=7).draw(*case) for case in cases]
    assert [View(box=tuple(box), flip=flip) for box, flip in reversed(json.loads(done.stdout))] == here


def test_draws_are_pinned():
    """These boxes are in stores: if they change, the plan's version must change with them."""
    plan = ViewPlan(seed=0)
    assert [plan.draw("image", k, 375, 500) for k in range(3)] == PINNED


PINNED = [
    View(box=(15, 41, 357, 411), flip=True),
    View(box=(0, 106, 221, 170), flip=True),
    View(box=(0, 8, 290, 368), flip=True),
]


def test_area_and_aspect_are_those_of_the_plan():
    plan = ViewPlan(area=(0.25, 0.5), aspect=(0.5, 2.0), flip_p=0.25)
    drawn = [plan.draw(f"image-{i}", 0, 400, 400) for i in range(2000)]
    shares = torch.tensor([view.box[2] * view.box[3] / 400**2 for view in drawn])
    aspects = torch.tensor([view.box[3] / view.box[2] for view in drawn])
    assert 0.245 <= shares.min() <= shares.max() <= 0.505  # rounding to whole pixels
    assert 0.49 <= aspects.min() <= aspects.max() <= 2.02
    assert abs(shares.mean() - 0.375) < 0.01  # uniform in area: standard error 0.0016
    assert abs(aspects.log().mean()) < 0.06  # log-uniform: standard error 0.009
    assert abs(sum(view.flip for view in drawn) / 2000 - 0.25) < 0.05  # standard error 0.0097


@settings(deadline=None, max_examples=60)
@given(plan=plans(), size=image_sizes(60), view=st.integers(0, 3), size_px=st.integers(2, 24))
def test_rendering_twice_gives_equal_bits(plan, size, view, size_px):
    image = _noise(size)
    drawn = plan.draw("image", view, *size)
    pixels = render(image, drawn, size_px=size_px, interpolation=plan.interpolation)
    again = render(image.clone(), drawn, size_px=size_px, interpolation=plan.interpolation)
    assert pixels.shape == (3, size_px, size_px)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, again)
    assert pixel_hash(pixels) == pixel_hash(again)
    assert torch.equal(image, _noise(size))  # the image is not touched


@settings(deadline=None, max_examples=60)
@given(plan=plans(), size=image_sizes(60), size_px=st.integers(2, 24))
def test_render_equals_crop_resize_flip_of_torchvision(plan, size, size_px):
    image, view = _noise(size), plan.draw("image", 0, *size)
    top, left, height, width = view.box
    mode = v2.InterpolationMode(plan.interpolation)
    expected = v2.functional.resized_crop(image, top, left, height, width, [size_px, size_px], mode, antialias=True)
    expected = v2.functional.horizontal_flip(expected) if view.flip else expected
    assert torch.equal(render(image, view, size_px=size_px, interpolation=plan.interpolation), expected)


@settings(deadline=None, max_examples=150)
@given(size=image_sizes(400), crop=st.integers(2, 64), interpolation=st.sampled_from(["bilinear", "bicubic"]))
def test_the_center_view_equals_resize_and_center_crop_of_torchvision(size, crop, interpolation):
    if max(size) / min(size) * crop > 4000:
        size = (size[0], size[0])  # torchvision would build a very long image; geometry of long ones is tested below
    image = _noise(size)
    plan = ViewPlan(policy="center", center_px=crop, interpolation=interpolation)
    mode = v2.InterpolationMode(interpolation)
    reference = v2.Compose([v2.Resize(round(crop * 256 / 224), mode, antialias=True), v2.CenterCrop(crop)])
    pixels = render(image, plan.draw("image", 0, *size), size_px=crop, interpolation=interpolation)
    assert torch.equal(pixels, reference(image))


@given(size=image_sizes(100_000), crop=st.integers(1, 512))
def test_a_center_box_lies_inside_the_resized_image(size, crop):
    view = ViewPlan(policy="center", center_px=crop).draw("image", 0, *size)
    assert view.resize is not None
    assert not view.flip
    assert view.box[2:] == (crop, crop)
    assert 0 <= view.box[0] <= view.resize[0] - crop
    assert 0 <= view.box[1] <= view.resize[1] - crop


def test_the_center_policy_has_one_view_an_image():
    with pytest.raises(ConfigError, match=r"center has one view an image; got view 1\. Next: per_image: 1"):
        ViewPlan(policy="center", center_px=224).draw("image", 1, 300, 300)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (torch.zeros(1, 4, 4, dtype=torch.uint8), r"uint8 \[3, H, W\]; got torch.uint8 \(1, 4, 4\)"),
        (torch.zeros(3, 4, 4), r"uint8 \[3, H, W\]; got torch.float32"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"uint8 \[3, H, W\]"),
    ],
)
def test_render_names_what_is_no_image(image, match):
    with pytest.raises(ValueError, match=match):
        render(image, View(box=(0, 0, 1, 1)), size_px=4, interpolation="bilinear")


@pytest.mark.parametrize("box", [(-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (3, 0, 2, 2), (0, 2, 2, 4)])
def test_render_refuses_a_box_that_leaves_the_image(box):
    with pytest.raises(ValueError, match="leaves the image of 4 x 5 px"):
        render(torch.zeros(3, 4, 5, dtype=torch.uint8), View(box=box), size_px=4, interpolation="bilinear")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("policy", "colour", "views.policy is one of none, center, color, randaugment; got 'colour'"),
        ("interpolation", "nearest", "views.interpolation is bilinear or bicubic; got 'nearest'"),
        ("area", (0.0, 1.0), r"0 < low <= high <= 1; got \(0.0, 1.0\)"),
        ("area", (0.5, 0.4), "views.area"),
        ("area", (0.5, float("nan")), "views.area"),
        ("aspect", (-1, 1), "views.aspect"),
        ("aspect", (1, float("inf")), "views.aspect"),
        ("flip_p", 1.5, "views.flip_p is between 0 and 1; got 1.5"),
        ("center_px", 224, "policy center, and no other, has a center_px; got none, 224"),
        ("version", 99, "draws plans of version 1; got 99"),
    ],
)
def test_a_plan_is_checked_when_it_is_made(field, value, match):
    with pytest.raises(ConfigError, match=match):
        ViewPlan(**{field: value})


def test_a_hash_tells_one_changed_pixel():
    pixels = _noise((8, 8))
    changed = pixels.clone()
    changed[2, 7, 7] ^= 1
    assert pixel_hash(changed) != pixel_hash(pixels)
    assert pixel_hash(pixels.permute(0, 2, 1)) == pixel_hash(pixels.permute(0, 2, 1).contiguous())


def _noise(size):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size[0]))
