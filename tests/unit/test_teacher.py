"""Teachers: built exactly as described, or refused with names; their answers depend on pixels alone."""

import dataclasses
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_weight

from kddata import nets
from kddata.errors import ConfigError, TeacherError
from kddata.teacher import Teacher, TeacherArgs, build_network, load_teacher, weights_sha256
from kddata.testing import FakeNetwork, fake_teacher, fake_teacher_args

SMALL = "python:kddata.nets:small_resnet"


@pytest.fixture
def user_code(monkeypatch):
    """A module of the user's own, importable as `user_code`."""
    module = types.ModuleType("user_code")
    monkeypatch.setitem(sys.modules, "user_code", module)
    return module


@pytest.fixture
def weights(tmp_path):
    """Weights of a small_resnet with 10 classes, as safetensors: convolutions in half precision, no step counters."""
    state = {k: v for k, v in nets.small_resnet(10).state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "small.safetensors"
    save_file({k: v.half() if v.ndim > 1 else v for k, v in state.items()}, path)
    return str(path)


def _args(weights=None, **changes):
    return TeacherArgs(**{"arch": SMALL, "weights": weights, "num_classes": 10, "size_px": 32, **changes})


def _views(num_views, size_px=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_views, 3, size_px, size_px), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_a_views_logits_do_not_depend_on_its_batch(weights, memory_format):
    teacher = load_teacher(_args(weights), batch_size=8, memory_format=memory_format)
    views = _views(21)
    logits = teacher(views)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    assert torch.equal(teacher(views[order]), logits[order])
    for chosen in ([20], [3, 4], list(range(9)), [5] * 8):
        assert torch.equal(teacher(views[chosen]), logits[chosen])


def test_logits_are_those_of_the_network_on_normalised_pixels(weights):
    teacher = load_teacher(_args(weights, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), batch_size=4)
    views = _views(6)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    x = (views.double() / 255 - mean) / std
    with torch.no_grad():
        expected = build_network(SMALL, num_classes=10, weights=weights).double()(x)
    logits = teacher(views)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.allclose(logits.double(), expected, atol=1e-4)


def test_no_views_get_no_logits():
    assert fake_teacher(num_classes=7)(_views(0, 16)).shape == (0, 7)


def test_views_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, 16, 16\]; got torch.uint8 \(2, 3, 32, 32\)"):
        fake_teacher()(_views(2))
    with pytest.raises(ValueError, match=r"got torch.float32"):
        fake_teacher()(_views(2, 16).float())


def test_the_forward_pass_is_padded_and_pinned_and_leaves_no_trace():
    seen = []

    class Spy(FakeNetwork):
        def forward(self, x):
            seen.append((x.shape[0], torch.get_num_threads(), self.training, torch.is_grad_enabled()))
            return super().forward(x)

    before = torch.get_num_threads()
    teacher = Teacher(Spy(10), fake_teacher().card, batch_size=4, threads=before + 1)
    teacher(_views(6, 16))
    assert seen == [(4, before + 1, False, False)] * 2
    assert torch.get_num_threads() == before


def test_a_card_tells_teachers_apart(weights):
    card = load_teacher(_args(weights)).card
    assert card == load_teacher(_args(weights)).card
    assert (card.arch, card.num_classes, card.size_px, card.dtype) == (SMALL, 10, 32, "float32")
    assert card.weights_sha256 == weights_sha256(build_network(SMALL, num_classes=10, weights=weights))
    assert card.classes_sha256 is None
    named = load_teacher(_args(weights, class_names=tuple("abcdefghij"))).card
    other = load_teacher(_args(weights, class_names=tuple("abcdefghji"))).card
    assert len({named.classes_sha256, other.classes_sha256, None}) == 3


def test_the_hash_of_weights_covers_names_shapes_and_values():
    def digest(**state):
        module = nn.Module()
        for name, value in state.items():
            module.register_buffer(name, value)
        return weights_sha256(module)

    base = digest(a=torch.zeros(2, 3), b=torch.zeros(()))
    assert base == digest(b=torch.zeros(()), a=torch.zeros(2, 3))
    others = [
        digest(a=torch.zeros(3, 2), b=torch.zeros(())),
        digest(a=torch.zeros(2, 3), c=torch.zeros(())),
        digest(a=torch.zeros(2, 3, dtype=torch.int32), b=torch.zeros(())),
        digest(a=torch.zeros(2, 3), b=torch.ones(())),
    ]
    assert len({base, *others}) == 5


def test_half_precision_weights_are_cast_and_step_counters_may_miss(weights):
    network = build_network(SMALL, num_classes=10, weights=weights)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert not network.training


def test_weights_may_lie_behind_a_url(weights):
    import fsspec

    with fsspec.open("memory://weights/small.safetensors", "wb") as file, open(weights, "rb") as local:
        file.write(local.read())
    there, here = (
        build_network(SMALL, num_classes=10, weights=url) for url in ("memory://weights/small.safetensors", weights)
    )
    assert weights_sha256(there) == weights_sha256(here)


def test_initial_weights_are_a_pure_function_of_the_seed():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = weights_sha256(build_network(SMALL, num_classes=10, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert weights_sha256(build_network(SMALL, num_classes=10, seed=1)) == one
    assert weights_sha256(build_network(SMALL, num_classes=10, seed=2)) != one


def test_weights_of_another_network_are_named(weights):
    with pytest.raises(TeacherError) as caught:
        build_network("python:kddata.nets:small_cnn", num_classes=10, weights=weights)
    message = str(caught.value)
    assert message.startswith("weights fit python:kddata.nets:small_cnn exactly; got ")
    assert "unexpected: 3.body.0.weight, " in message
    assert f"(in {weights})" in message
    assert message.count(".weight") + message.count(".bias") + message.count(".running") < 16  # the first few alone


def test_weights_of_another_width_are_named(weights):
    match = r"got 2 of another shape: 8.weight \[10, 64\] for \[12, 64\], 8.bias \[10\] for \[12\].*check arch"
    with pytest.raises(TeacherError, match=match):
        build_network(SMALL, num_classes=12, weights=weights)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(
        TeacherError,
        match=r"weights exist; got no such file \(in .*none.safetensors\)\. Next: name a safetensors file by its path",
    ):
        build_network(SMALL, num_classes=10, weights=str(tmp_path / "none.safetensors"))


def test_weights_that_are_a_pickle_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(nets.small_resnet(10).state_dict(), path)
    with pytest.raises(TeacherError, match="weights are a safetensors file"):
        build_network(SMALL, num_classes=10, weights=str(path))


def test_a_torchvision_teacher_needs_weights():
    with pytest.raises(TeacherError, match=r"a teacher has weights; got weights: null"):
        load_teacher(_args(arch="torchvision:squeezenet1_1"))


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("mobilenet_v2", "arch is torchvision:NAME, timm:NAME, hf:NAME-or-path or python:.*; got 'mobilenet_v2'"),
        ("torchvision:mobilnet_v2", "names a torchvision classifier; got 'mobilnet_v2'. Next: perhaps .*:mobilenet_v2"),
        ("torchvision:qqq", "Next: see torchvision.models.list_models"),
        ("python:no_such_module:f", "names a module that can be imported here; got No module named 'no_such_module'"),
        ("python:kddata.nets:no_such", "names a callable; got 'kddata.nets:no_such'"),
        ("python:kddata.nets", "names a callable; got 'kddata.nets'"),
    ],
)
def test_an_unknown_arch_is_named(arch, match):
    with pytest.raises(ConfigError, match=match):
        build_network(arch, num_classes=10)


def test_an_arch_that_builds_something_else(user_code):
    user_code.build = lambda num_classes: [num_classes]
    with pytest.raises(TeacherError, match=r"builds a torch.nn.Module; got list \(in python:user_code:build\)"):
        build_network("python:user_code:build", num_classes=10)


def test_a_class_list_of_another_length():
    with pytest.raises(TeacherError, match="one name for each class of its teacher; got 2 names, num_classes 10"):
        load_teacher(_args(class_names=("cat", "dog")))


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (lambda num_classes: FakeNetwork(num_classes + 1), r"\(16, 11\)"),
        (lambda num_classes: nn.Flatten(0), r"\(49152,\)"),
        (lambda num_classes: _Tuple(), "tuple"),
    ],
)
def test_an_answer_of_another_width_is_found_at_loading(user_code, network, found):
    user_code.build = network
    with pytest.raises(TeacherError, match=rf"of 10 classes answers .* shape \(16, 10\); got {found}.*num_classes"):
        load_teacher(_args(arch="python:user_code:build"))


class _Tuple(nn.Module):
    def forward(self, x):
        return x, x


def test_a_size_that_the_network_does_not_take_is_found_at_loading(user_code):
    user_code.build = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))
    args = _args(arch="python:user_code:build")
    with pytest.raises(TeacherError, match=r"takes views of 32 px \(teacher.size_px\); got .*mat1 and mat2 .*size_px"):
        load_teacher(args)
    load_teacher(dataclasses.replace(args, size_px=16))


def test_a_bfloat16_teacher_answers_alike_and_says_so_on_its_card(weights):
    exact, quick = (load_teacher(_args(weights, dtype=dtype), batch_size=8) for dtype in ("float32", "bfloat16"))
    assert (quick.card.dtype, quick.card.weights_sha256) == ("bfloat16", exact.card.weights_sha256)
    views = _views(11)
    said = quick(views)
    assert said.dtype == torch.float32
    assert torch.equal(said, said.bfloat16().float())
    assert torch.equal(quick(views[3:4]), said[3:4])
    assert 0 < (said - exact(views)).abs().max() < 0.1 * exact(views).std()
    with pytest.raises(ConfigError, match="runs in float32 or bfloat16; got 'float16'"):
        load_teacher(_args(weights, dtype="float16"))


def test_the_fake_teacher_is_exact():
    args = fake_teacher_args(num_classes=5)
    one, other = load_teacher(args, batch_size=3, threads=2), load_teacher(args, memory_format="contiguous")
    views = _views(11, 16)
    assert one.card == other.card
    assert torch.equal(one(views), other(views))
    assert not torch.equal(one(views), one(views.flip(-1)))
    assert one(views).std() > 0.5


@pytest.mark.parametrize(
    "builder", [nets.small_resnet, nets.large_resnet, nets.quick_resnet, nets.quick_resnet_wide, nets.small_cnn]
)
@pytest.mark.parametrize("size_px", [28, 64])
def test_networks_take_small_images(builder, size_px):
    network = builder(num_classes=7).eval()
    assert network(torch.rand(2, 3, size_px, size_px)).shape == (2, 7)


def test_weights_are_named_as_torchvision_publishes_them(tmp_path, monkeypatch):
    """A file in torchvision's cache is taken; the fetch itself needs a network, and is torchvision's."""
    name = "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    network = build_network("torchvision:squeezenet1_1", num_classes=1000, seed=4)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / Path(get_weight(name).url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    loaded = build_network("torchvision:squeezenet1_1", num_classes=1000, weights=name)
    assert weights_sha256(loaded) == weights_sha256(network)
    with pytest.raises(TeacherError, match=r"for torchvision:squeezenet1_0.*one of SqueezeNet1_0_Weights"):
        build_network("torchvision:squeezenet1_0", num_classes=1000, weights=name)
    with pytest.raises(TeacherError, match="fit torchvision:squeezenet1_1 exactly"):
        build_network("torchvision:squeezenet1_1", num_classes=10, weights=name)
    assert build_network("torchvision:squeezenet1_1", num_classes=10, weights=name, new_head=True)


def test_published_weights_that_run_code_are_refused(tmp_path, monkeypatch):
    name = "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / Path(get_weight(name).url).name
    path.write_bytes(pickle.dumps(print))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(TeacherError, match="published weights can be fetched"):
        build_network("torchvision:squeezenet1_1", num_classes=1000, weights=name)


def test_a_compiled_teacher_answers_as_it_does_otherwise_up_to_rounding(monkeypatch):
    # else ten programs are compiled, to ask what this CPU can do
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    args = TeacherArgs(arch=f"python:{__name__}:small_linear", num_classes=5, size_px=8)
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, compiled = load_teacher(args, batch_size=4), load_teacher(args, batch_size=4, compile=True)
    assert compiled.card == plain.card
    torch.testing.assert_close(compiled(pixels), plain(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(pixels[4:]), compiled(pixels)[4:], rtol=0, atol=0)
    assert "OptimizedModule" in type(compiled._network).__name__


def small_linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def test_a_teacher_that_cannot_be_compiled_is_refused():
    import torch._inductor.config as inductor

    args = TeacherArgs(arch=f"python:{__name__}:small_tanh", num_classes=5, size_px=8)
    no_compiler = inductor.patch("cpp.cxx", ("no-such-compiler",))
    with no_compiler, pytest.raises(TeacherError, match=r"has a compiler: C\+\+ on the CPU.*teacher.compile=false"):
        load_teacher(args, compile=True)


def small_tanh(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(192, num_classes), nn.Sigmoid())


def test_a_compiled_teacher_has_no_outputs():
    args = TeacherArgs(arch=f"python:{__name__}:small_linear", num_classes=5, size_px=8)
    with pytest.raises(ConfigError, match=r"answers with logits alone; got outputs embedding"):
        load_teacher(args, compile=True, outputs=["embedding"])
