"""Ops and mixes: drawn from their arguments alone, exact, and of the meaning that others give these names."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from kddata import ops
from kddata.errors import ConfigError
from kddata.views import Mix, View, ViewPlan, pixel_hash, render

BOX = st.tuples(*[st.integers(0, 64)] * 4).map(
    lambda x: tuple(side / 64 for side in (min(x[0], 64 - x[2]), min(x[1], 64 - x[3]), x[2], x[3]))
)
FACTOR = st.floats(0, 3).map(ops.round_magnitude)
ENTRY = st.floats(-1.5, 1.5).map(ops.round_magnitude)
MAGNITUDES = {
    "hue/1": st.tuples(ENTRY, ENTRY),
    "autocontrast/1": st.just(()),
    "equalize/1": st.just(()),
    "posterize/1": st.integers(0, 8).map(lambda bits: (float(bits),)),
    "affine/1": st.tuples(*[ENTRY] * 6),
    "erase/1": BOX,
}
OPS = st.sampled_from(ops.NAMES).flatmap(lambda name: st.tuples(st.just(name), MAGNITUDES.get(name, st.tuples(FACTOR))))
RICH = [
    ViewPlan(seed=3, policy="color"),
    ViewPlan(seed=3, policy="randaugment", erase_p=0.25),
    ViewPlan(seed=3, erase_p=1.0),
]
ids = st.text(max_size=20)


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth shapes and noise, from integers alone."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    channels = [(3 + c) * y + (5 - c) * x + (y * x * (c + 1) + seed * 7919) % 61 for c in range(3)]
    return (torch.stack(channels) % 256).byte()


@settings(deadline=None, max_examples=200)
@given(op=OPS, size=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_op_is_pure_and_keeps_the_form(op, size, seed):
    pixels = image(size, size, seed)
    changed = ops.apply(pixels, (op,))
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(changed, ops.apply(pixels.clone(), (op,)))
    assert torch.equal(pixels, image(size, size, seed))  # what it is given is not touched


@given(plan=st.sampled_from(RICH), image_id=ids, view=st.integers(0, 10_000))
def test_drawn_ops_are_known_lose_nothing_as_text_and_leave_the_crop_alone(plan, image_id, view):
    drawn = plan.draw(image_id, view, 300, 400)
    for name, magnitudes in drawn.ops:
        ops.check(name, magnitudes)
        assert all(x * 2**16 == int(x * 2**16) for x in magnitudes)
    assert json.loads(json.dumps(drawn.ops)) == [[name, list(magnitudes)] for name, magnitudes in drawn.ops]
    plain = dataclasses.replace(plan, policy="none", erase_p=0.0).draw(image_id, view, 300, 400)
    assert dataclasses.replace(drawn, ops=()) == plain
    assert plan.draw(image_id, view, 30, 40).ops == drawn.ops


def test_every_op_is_drawn_sooner_or_later():
    drawn = {name for plan in RICH for k in range(300) for name, _ in plan.draw("image", k, 64, 64).ops}
    assert drawn == set(ops.NAMES)


def test_erased_shares_and_jitter_are_those_that_are_stated():
    views = [RICH[1].draw("image", k, 64, 64) for k in range(2000)]
    share = sum(any(name == "erase/1" for name, _ in view.ops) for view in views) / 2000
    assert abs(share - 0.25) < 0.04  # standard error 0.0097
    areas = torch.tensor([RICH[2].draw("image", k, 64, 64).ops[0][1] for k in range(2000)])[:, 2:].prod(1)
    assert 0.019 <= areas.min() <= areas.max() <= 1 / 3 + 0.004  # sides are rounded to 1/256
    jitter = [dict(RICH[0].draw("image", k, 64, 64).ops) for k in range(500)]
    assert all(0.6 <= ops_of["brightness/1"][0] <= 1.4 for ops_of in jitter)
    assert len({tuple(ops_of) for ops_of in jitter}) == 24  # every order


@settings(deadline=None, max_examples=60)
@given(
    lam=st.floats(0, 1).map(ops.round_magnitude),
    box=BOX,
    size=st.integers(2, 30),
    kind=st.sampled_from(["mixup", "cutmix"]),
)
def test_a_mix_has_the_shares_that_it_states(lam, box, size, kind):
    pixels, partner = image(size, size, 1), image(size, size, 2)
    view = View(box=(0, 0, size, size), mix=Mix(kind="mixup", partner="b", partner_view=0, lam=lam))
    if kind == "cutmix":
        mix = Mix(kind=kind, partner="b", partner_view=0, lam=1 - box[2] * box[3], box=box)
        view = dataclasses.replace(view, mix=mix)
    mixed = render(pixels, view, size_px=size, interpolation="bilinear", partner=partner)
    if kind == "mixup":
        exact = lam * pixels.double() + (1 - lam) * partner.double()
        assert (mixed.double() - exact).abs().max() <= 0.5
    else:
        top, left, bottom, right = (int(x * size + 0.5) for x in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(mixed, torch.where(inside, partner, pixels))


UNIT = [f"id-{i}" for i in range(7)]


@given(kind=st.sampled_from(["mixup", "cutmix"]), own=st.sampled_from(UNIT), view=st.integers(0, 1000))
def test_a_mix_is_with_the_same_view_of_another_image_of_the_unit(kind, own, view):
    plan = ViewPlan(seed=1, mix=kind)
    mix = plan.draw_mix(UNIT, own, view)
    assert mix == plan.draw_mix(list(UNIT), own, view)
    assert mix.partner in set(UNIT) - {own}
    assert (mix.kind, mix.partner_view) == (kind, view)
    assert 0 <= mix.lam <= 1
    if kind == "cutmix":
        top, left, height, width = mix.box
        assert mix.lam == 1 - height * width
        assert 0 <= top <= 1 - height
        assert 0 <= left <= 1 - width


def test_partners_and_shares_are_even_and_a_lone_image_stays_unmixed():
    mixes = [ViewPlan(mix="mixup").draw_mix(UNIT, "id-3", k) for k in range(3000)]
    counts = torch.tensor([sum(mix.partner == name for mix in mixes) for name in UNIT])
    assert counts[3] == 0
    assert (counts[counts > 0] - 500).abs().max() < 100  # standard deviation 20
    assert abs(sum(mix.lam for mix in mixes) / 3000 - 0.5) < 0.03  # standard error 0.005
    assert ViewPlan(mix="mixup").draw_mix(["id-3"], "id-3", 0) is None
    assert ViewPlan().draw_mix(UNIT, "id-3", 0) is None


def test_ops_mean_what_others_mean_by_these_names():
    """Within one step of grey of torchvision, which rounds and truncates by way of floats; equal where it is exact."""
    x = image(33, 33)

    def apart(name, magnitudes, expected):
        return int((ops.apply(x, ((name, magnitudes),)).int() - expected.int()).abs().max())

    for factor in (0.5, 0.75, 1.0, 1.5):
        assert apart("brightness/1", (factor,), tv.adjust_brightness(x, factor)) <= 1
        assert apart("contrast/1", (factor,), tv.adjust_contrast(x, factor)) <= 1
        assert apart("saturation/1", (factor,), tv.adjust_saturation(x, factor)) <= 1
        assert apart("sharpness/1", (factor,), tv.adjust_sharpness(x, factor)) <= 1
    dim = (x // 2 + 30).byte()
    assert (ops.apply(dim, (("autocontrast/1", ()),)).int() - tv.autocontrast(dim).int()).abs().max() <= 1
    assert apart("equalize/1", (), tv.equalize(x)) == 0
    assert apart("posterize/1", (5.0,), tv.posterize(x, 5)) == 0
    assert apart("solarize/1", (0.5,), tv.solarize(x, 128)) == 0
    assert apart("affine/1", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), x) == 0
    assert torch.equal(ops.apply(x, (("affine/1", (0.0, 1.0, 0.0, -1.0, 0.0, 0.0)),)), x.rot90(-1, (1, 2)))
    shifted = ops.apply(image(32, 32), (("affine/1", (1.0, 0.0, 0.25, 0.0, 1.0, 0.0)),))
    assert torch.equal(shifted[:, :, :24], image(32, 32)[:, :, 8:])
    assert set(shifted[:, :, 24:].flatten().tolist()) == {128}
    third = ops.round_magnitude(1 / 3)
    assert apart("hue/1", (1.0, 0.0), x) == 0
    assert apart("hue/1", (0.0, 1.0), x.roll(-1, 0)) == 0  # a third of a turn
    assert apart("hue/1", (third, third), x.double().mean(0, keepdim=True).expand(3, -1, -1)) <= 1


# The ops and mixes are in stores: where one of these changes, a new version of the name must be added instead.
GOLDEN_OPS = {
    "brightness/1": "42d972f417207d01",
    "contrast/1": "91f63ca928de352c",
    "saturation/1": "e6c831531bc0069b",
    "sharpness/1": "2398cff96541a1f7",
    "hue/1": "5c5da4cedff3c0a3",
    "autocontrast/1": "755e8924d1a02892",
    "equalize/1": "45e57f0dee9a1909",
    "posterize/1": "4f02dcac0ca19614",
    "solarize/1": "8e0816fe3630ee27",
    "affine/1": "40c3e4e7bd3b6236",
    "erase/1": "925a0219a2de0a4d",
    "mixup": "ad0ae1e64ff43c59",
    "cutmix": "90d19fb5063fecc2",
}
GOLDEN_VIEWS = {
    "color none 0": "7aedc9c45c5ce331",
    "color none 1": "7bf9de8b4af7cef1",
    "color none 2": "5cf48999720483ed",
    "randaugment mixup 0": "2aa8974e5943916e",
    "randaugment mixup 1": "57260708d1011d27",
    "randaugment mixup 2": "5baba322db026f17",
    "none cutmix 0": "3ac4b8f874d7c60b",
    "none cutmix 1": "d55be7554c935b10",
    "none cutmix 2": "0d73f382dece5231",
}


def _golden() -> dict[str, str]:
    x = image(37, 37)
    magnitudes = {
        "hue/1": (0.9, 0.3),
        "posterize/1": (4.0,),
        "affine/1": (0.9, 0.2, 0.1, -0.2, 0.9, 0.05),
        "erase/1": (0.25, 0.5, 0.3, 0.4),
    }
    for name in ("autocontrast/1", "equalize/1"):
        magnitudes[name] = ()
    found = {}
    for name in ops.NAMES:
        op = name, tuple(ops.round_magnitude(m) for m in magnitudes.get(name, (0.7,)))
        found[name] = f"{pixel_hash(ops.apply((x // 2 + 40).byte(), (op,))):016x}"
    found["mixup"] = f"{pixel_hash(ops.mixup(x, image(37, 37, 5), 0.3)):016x}"
    found["cutmix"] = f"{pixel_hash(ops.paste(x, image(37, 37, 5), (0.1, 0.2, 0.5, 0.6))):016x}"
    return found


def _golden_views() -> dict[str, str]:
    found = {}
    for policy, mix in (("color", "none"), ("randaugment", "mixup"), ("none", "cutmix")):
        plan = ViewPlan(seed=5, policy=policy, mix=mix, erase_p=0.5)
        for k in range(3):
            drawn = plan.draw("a", k, 80, 60)
            text = repr((drawn, plan.draw_mix(["a", "b", "c"], "a", k)))
            found[f"{policy} {mix} {k}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def test_pixels_of_ops_are_pinned():
    assert _golden() == GOLDEN_OPS


def test_draws_of_ops_and_mixes_are_pinned():
    """If they change, the plan's version must change with them."""
    assert _golden_views() == GOLDEN_VIEWS


def test_a_fresh_process_draws_and_renders_the_same():
    code = (
        "import torch, json\nfrom kddata.views import ViewPlan, render, pixel_hash\n"
        "x = (torch.arange(3 * 50 * 40) % 251).byte().view(3, 50, 40)\n"
        "plan = ViewPlan(seed=2, policy='randaugment', erase_p=0.5)\n"
        "torch.set_num_threads(1)\n"
        "views = [plan.draw('image', k, 50, 40) for k in range(20)]\n"
        "print(json.dumps([pixel_hash(render(x, v, size_px=24, interpolation='bilinear')) for v in views]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd="/")
    x = (torch.arange(3 * 50 * 40) % 251).byte().view(3, 50, 40)
    plan = ViewPlan(seed=2, policy="randaugment", erase_p=0.5)
    here = [
        pixel_hash(render(x, plan.draw("image", k, 50, 40), size_px=24, interpolation="bilinear")) for k in range(20)
    ]
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize(
    ("op", "match"),
    [
        (("blur/1", (1.0,)), "ops of a view are among brightness/1, .*; got 'blur/1'"),
        (("brightness/2", (1.0,)), "got 'brightness/2'"),
        (("brightness/1", ()), r"brightness/1 has 1 magnitudes, multiples of 2.-16 of at most 16; got \[\]"),
        (("brightness/1", (float("nan"),)), "got .nan."),
        (("brightness/1", (0.7,)), "got .0.7."),
        (("affine/1", (1e9,) * 6), "affine/1 has 6 magnitudes, .* of at most 16"),
    ],
)
def test_an_op_that_is_not_there_is_refused(op, match):
    with pytest.raises(ValueError, match=match):
        ops.apply(image(4, 4), (op,))


def test_a_mixed_view_needs_its_partner():
    view = View(box=(0, 0, 4, 4), mix=Mix(kind="mixup", partner="b", partner_view=0, lam=0.5))
    for partner in (None, image(5, 5), image(4, 4).float()):
        with pytest.raises(ValueError, match=r"rendered with its partner's pixels, uint8 \[3, S, S\]; got"):
            render(image(4, 4), view, size_px=4, interpolation="bilinear", partner=partner)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "blend"}, "a mix is mixup, or cutmix with a box; got 'blend'"),
        ({"kind": "cutmix"}, "cutmix with a box; got 'cutmix' with box None"),
        ({"box": (0.0, 0.0, 1.0, 1.0)}, "got 'mixup' with box"),
        ({"lam": 1.5}, "multiples of 2.-16 from 0 to 1; got 1.5"),
        ({"kind": "cutmix", "box": (0.0, 0.0, 2.0, 1.0)}, "from 0 to 1"),
        ({"lam": 0.3}, "multiples of 2.-16 from 0 to 1; got 0.3"),
    ],
)
def test_a_mix_is_checked_when_it_is_made(change, match):
    with pytest.raises(ValueError, match=match):
        Mix(**{"kind": "mixup", "partner": "b", "partner_view": 0, "lam": 0.5, **change})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"mix": "blend"}, "views.mix is one of none, mixup, cutmix; got 'blend'"),
        ({"erase_p": 2}, "views.erase_p is between 0 and 1; got 2"),
        ({"policy": "center", "center_px": 8, "mix": "mixup"}, "whole and unmixed; got erase_p 0, mix mixup"),
        ({"policy": "center", "center_px": 8, "erase_p": 0.5}, "whole and unmixed; got erase_p 0.5, mix none"),
    ],
)
def test_a_plan_with_ops_is_checked_when_it_is_made(fields, match):
    with pytest.raises(ConfigError, match=match):
        ViewPlan(**fields)
