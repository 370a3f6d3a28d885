"""Methods by name: what each needs, its learned parts, sums of them, and what is refused before training."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kddata import losses
from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses import methods

NODES = {"teacher_nodes": ["t1", "t2"], "student_nodes": ["s1", "s2"]}
LAST = {"teacher_nodes": ["t2"], "student_nodes": ["s2"]}
ARGS: dict[str, dict[str, Any]] = {
    "kd": {"temperature": 4, "alpha": 0.5},
    "at": NODES,
    "nst": NODES,
    "ft": LAST,
    "fitnets": LAST,
    "vid": NODES,
    "ofd": NODES,
    "ab": NODES,
    "reviewkd": NODES,
    "fsp": {"teacher_pairs": [["t1", "t2"]], "student_pairs": [["s1", "s2"]]},
    "crd": {"num_images": 8, "negatives": 3},
    "srrl": {"student_nodes": ["s2"]},
    "one": {"node": "s1"},
}
STUDENT = {
    "logits": (5,),
    "embedding": (12,),
    "features:s1": (4, 8, 8),
    "features:s2": (6, 4, 4),
    "fsp:s1:s2": (4, 6),
    "boundary_logits": (5,),
    "peers": (2, 5),
    "branches": (3, 5),
    "gate": (3,),
}
TEACHER = {
    "embedding": (16,),
    "attention:t1": (8, 8),
    "attention:t2": (4, 4),
    "features:t1": (10, 8, 8),
    "features:t2": (16, 8, 8),  # another size than the student's
    "fsp:t1:t2": (4, 6),
    "boundary": (3, 8, 8),
    "boundary_logits": (5,),
}


def tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def arguments(tmp_path: Any) -> dict[str, dict[str, Any]]:
    save_file({"fc.weight": torch.randn(5, 16), "fc.bias": torch.zeros(5)}, tmp_path / "teacher.safetensors")
    classifier = {"classifier": str(tmp_path / "teacher.safetensors")}
    return {name: {**ARGS.get(name, {}), **(classifier if name == "srrl" else {})} for name in methods.METHODS}


def step(method: losses.Method, parts: nn.Module, student: dict[str, Tensor], **more: Any) -> Tensor:
    labels = SoftLabels.from_logits(torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), k=5)
    needs, seen = method.needs, {}
    if needs.sees:
        outputs = tensors(TEACHER, 1)
        seen = {
            "parts": parts,
            "student": {name: student[name] for name in (*needs.student, *needs.live)},
            "outputs": {name: outputs[name].half().float() for name in needs.outputs},
            "image_ids": ["a", "b", "c", "d"],
        }
    return method(student["logits"], labels, torch.tensor([0, 4, 2, 3]), **seen, **more)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_learns_from_what_it_names(name: str, arguments: dict[str, dict[str, Any]]) -> None:
    """A few steps on its own tensors: the loss falls, and every learned part moves."""
    torch.manual_seed(0)
    method = losses.make(name, **arguments[name])
    student = {key: x.requires_grad_() for key, x in tensors(STUDENT, 0).items()}
    parts = method.parts(STUDENT, TEACHER)
    before = [p.detach().clone() for p in parts.parameters()]
    optimizer = torch.optim.SGD([*student.values(), *parts.parameters()], lr=1e-3)
    seen = []
    for _ in range(12):
        torch.manual_seed(0)  # CRD's negatives
        loss = step(method, parts, student, reduction="none").sum() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    for (key, p), old in zip(parts.named_parameters(), before, strict=True):
        if not key.endswith("conv.bias"):  # BatchNorm takes it away again
            assert not torch.equal(p, old), key
    named = {"logits", *method.needs.student} if method.needs.cohort != "branches" else {*method.needs.live}
    assert all(student[key].grad is not None for key in named - (set() if method.needs.targets else {"logits"}))


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_mean_is_that_of_none(name: str, arguments: dict[str, dict[str, Any]]) -> None:
    torch.manual_seed(0)
    method = losses.make(name, **arguments[name])
    parts, student = method.parts(STUDENT, TEACHER).eval(), tensors(STUDENT, 0)
    results = []
    for reduction in ("mean", "none", "sum"):
        torch.manual_seed(0)
        results.append(step(method, parts, student, reduction=reduction))
    torch.testing.assert_close(results[1].mean(), results[0])
    torch.testing.assert_close(results[1].sum(), results[2])


def test_parts_come_back_from_their_state() -> None:
    for name in ("fitnets", "vid", "ofd", "ab", "reviewkd", "cc", "crd", "ctkd", "aekt"):
        method = losses.make(name, **ARGS.get(name, {}))
        one, two = method.parts(STUDENT, TEACHER), method.parts(STUDENT, TEACHER)
        two.load_state_dict(one.state_dict())
        student = tensors(STUDENT, 0)
        torch.manual_seed(0)
        first = step(method, one, student)
        torch.manual_seed(0)
        assert torch.equal(step(method, two, student), first)


def test_a_sum_is_the_weighted_sum_of_its_terms() -> None:
    terms = [
        {"name": "kd", "temperature": 4, "weight": 0.5},
        {"name": "at", **NODES, "weight": 1000},
        {"name": "hard", "weight": 0.25},
        {"name": "fitnets", **LAST},
    ]
    method, student = losses.make("sum", terms=terms), tensors(STUDENT, 0)
    parts = method.parts(STUDENT, TEACHER)
    assert isinstance(parts, nn.ModuleList)
    alone = [0.5 * step(losses.make("kd", temperature=4), nn.Module(), student)]
    alone += [step(losses.make("at", **NODES, weight=1000, hard_weight=0), nn.Module(), student)]
    alone += [0.25 * step(losses.make("hard"), nn.Module(), student)]
    alone += [step(losses.make("fitnets", **LAST, hard_weight=0), parts[3], student)]
    torch.testing.assert_close(step(method, parts, student), torch.stack(alone).sum())
    assert method.needs.outputs == ("attention:t1", "attention:t2", "features:t2")
    assert method.needs.student == ("features:s1", "features:s2")
    assert method.needs.temperatures == (4,)
    assert method.needs.targets


def test_the_head_of_a_sum_answers_for_it() -> None:
    method = losses.make("sum", terms=[{"name": "hard"}, {"name": "aekt", "hard_weight": 1}])
    parts, x = method.parts(STUDENT, TEACHER), tensors(STUDENT, 0)["logits"]
    assert isinstance(parts, nn.ModuleList)
    assert torch.equal(method.answer(x, parts), x)
    with torch.no_grad():
        parts[1].bias += 1
    assert torch.equal(method.answer(x, parts), x + 1)
    assert torch.equal(losses.make("kd", temperature=1).answer(x, None), x)


STORE = {"k": 3, "num_classes": 5, "temperatures": (1.0,), "has_targets": True}


@pytest.mark.parametrize(
    ("method", "store", "message"),
    [
        ({"name": "at", **NODES}, {"outputs": ("attention:t1",)}, "stored output attention:t2.*labels.outputs"),
        ({"name": "sp"}, {}, "stored output embedding"),
        ({"name": "ctkd"}, {}, "all classes"),
        ({"name": "aekt"}, {"k": 5, "has_targets": False}, "ground-truth"),
        (
            {"name": "sum", "terms": [{"name": "kd", "temperature": 4}, {"name": "sp"}]},
            {"outputs": ("embedding",)},
            "kd",
        ),
        ({"name": "sum", "terms": [{"name": "kd", "temperature": 1}, {"name": "sp"}]}, {}, "method sp needs"),
    ],
)
def test_a_store_that_cannot_serve_is_refused(method: dict[str, Any], store: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        losses.make(**method).check(**{**STORE, **store})


def test_a_store_that_serves_is_taken() -> None:
    made = losses.make("sum", terms=[{"name": "kd", "temperature": 1}, {"name": "at", **NODES}])
    made.check(**{**STORE, "outputs": ("attention:t1", "attention:t2", "embedding")})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"name": "at", "teacher_nodes": "t1", "student_nodes": ["s1"]}, "list of layers"),
        ({"name": "at", "teacher_nodes": ["t1"], "student_nodes": ["s1", "s2"]}, "as many"),
        ({"name": "at", "student_nodes": ["s1"]}, "needs teacher_nodes"),
        ({"name": "at", **NODES, "epss": 1}, "perhaps eps"),
        ({"name": "fsp", "teacher_pairs": [["a"]], "student_pairs": [["a"]]}, "two layers"),
        ({"name": "crd", "num_images": 1.5}, "whole number"),
        ({"name": "mlkd", "temperatures": [0]}, "numbers above 0"),
        ({"name": "sum"}, "terms: a list"),
        ({"name": "sum", "terms": [{"name": "spp"}]}, "perhaps sp"),
        ({"name": "sum", "terms": [{"name": "kd", "temperature": 1, "weight": "x"}]}, "a number"),
        ({"name": "sum", "terms": [{"name": "aekt"}, {"name": "aekt"}]}, "at most one"),
    ],
)
def test_bad_arguments_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        losses.make(**args)


def test_what_is_missing_in_a_call_is_named() -> None:
    method = losses.make("crd", num_images=4)
    with pytest.raises(ConfigError, match=r"(?s)outputs\['embedding'\].*student\['embedding'\].*parts.*image_ids"):
        method(torch.randn(2, 5), None, torch.tensor([0, 1]))


def test_shapes_that_cannot_be_compared_are_refused_with_the_parts(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"fsp:s1:s2 \[4, 6\] and fsp:t1:t2 \[4, 7\]"):
        losses.make("fsp", **ARGS["fsp"]).parts(STUDENT, TEACHER | {"fsp:t1:t2": (4, 7)})
    save_file({"head.weight": torch.randn(5, 9), "head.bias": torch.zeros(5)}, tmp_path / "t.safetensors")
    srrl = {"classifier": str(tmp_path / "t.safetensors"), "student_nodes": ["s2"]}
    with pytest.raises(ConfigError, match="linear layers head"):
        losses.make("srrl", **srrl).parts(STUDENT, TEACHER)
    with pytest.raises(ConfigError, match="embedding of 16 values"):
        losses.make("srrl", **srrl, classifier_layer="head").parts(STUDENT, TEACHER)


def test_ofd_takes_its_margins_from_the_teachers_batchnorms(tmp_path: Any) -> None:
    weights = {"t1.weight": torch.ones(10), "t1.bias": torch.zeros(10), "bn.weight": torch.full((16,), 2.0)}
    save_file({**weights, "bn.bias": torch.ones(16)}, tmp_path / "t.safetensors")
    ofd = {"name": "ofd", **NODES, "teacher_weights": str(tmp_path / "t.safetensors")}
    method = losses.make(**ofd, batchnorms=["t1", "bn"])
    parts, student = method.parts(STUDENT, TEACHER), tensors(STUDENT, 0)
    margins = [
        losses.batchnorm_margin(torch.full((c,), w), torch.full((c,), b)) for c, w, b in ((10, 1, 0), (16, 2, 1))
    ]
    for part, margin in zip(parts.children(), margins, strict=True):
        torch.testing.assert_close(part.get_buffer("margin_1C11"), margin.float())
    found = step(method, parts, student)
    measured = losses.make("ofd", **NODES)
    assert found != step(measured, parts, student)
    for part in parts.children():
        part.get_buffer("margin_1C11").zero_()
    assert step(method, parts, student) < found  # less of what is held back is asked for
    for wrong, message in (
        ({}, "hold t2.weight and t2.bias; got BatchNorm layers bn, t1"),
        ({"batchnorms": ["t1"]}, "of 2 BatchNorms"),
        ({"batchnorms": ["bn", "t1"]}, "10 channels of features:t1"),
        ({"teacher_weights": None, "batchnorms": ["bn", "t1"]}, "method.teacher_weights None"),
        ({"teacher_weights": str(tmp_path / "none")}, "method.teacher_weights names the teacher's weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            losses.make(**{**ofd, **wrong}).parts(STUDENT, TEACHER)


# docs/methods.md says of every method what the code says
TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
TABLE = {cells[0].strip("`"): cells[1:] for cells in ROWS}
BYTES = {  # of float16, in the teachers that the page names
    "embedding": 2 * 2048,
    "attention": 2 * sum(side**2 for side in (56, 28, 14, 7)),
    "features": 2 * 2048 * 7 * 7,
    "fsp": 2 * (16 * 32 + 32 * 64),
    "boundary": 2 * 3 * 224 * 224,
    "boundary_logits": 2 * 1000,
}


def test_the_table_has_every_method_once() -> None:
    assert [cells[0].strip("`") for cells in ROWS] == list(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_row_says_what_the_method_needs(name: str) -> None:
    labels, targets, outputs, student, parts, view_bytes, teacher, _golden, source = TABLE[name]
    args = {**ARGS.get(name, {}), **({"classifier": "t.safetensors"} if name == "srrl" else {})}
    needs = losses.make(name, **args).needs
    tailed = "tail" in inspect.signature(methods.METHODS[name].loss).parameters and needs.all_classes
    soft = "none" if not needs.temperatures else "all classes" if needs.all_classes else "top-k"
    assert labels == soft + (", or a tail" if tailed else "")
    if name not in ("kd", "hard", "one"):
        alone = losses.make(name, **{**args, "hard_weight": 0}).needs.targets
        assert targets == ("yes" if alone else "in `hard_weight`")
    kinds = dict.fromkeys(x.partition(":")[0] for x in needs.outputs)
    assert outputs == ", ".join(kinds)
    assert student == ", ".join(dict.fromkeys(x.partition(":")[0] for x in (*needs.student, *needs.live)))
    assert bool(parts) == (needs.parts and name != "fsp")
    assert ("kept at inference" in parts) == needs.head
    assert int(view_bytes) == math.fsum(BYTES[kind] for kind in kinds)
    assert teacher == ("none" if name == "hard" else "live" if needs.cohort else "offline")
    assert source
