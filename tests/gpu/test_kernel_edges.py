"""Overlaps, empty and extreme rows, and what the fused losses refuse, with the words of each refusal."""

import math
import re
from typing import Any

import kddata_kernels as kernels
import pytest
import torch
from kddata_kernels import checks
from kernel_reference import IGNORED, Case, assert_gradient, assert_loss, expected, inputs


def check(logits: torch.Tensor, kept: tuple[Any, ...], **options: Any) -> None:
    logits = logits.detach().requires_grad_()
    loss = kernels.kd_loss(logits, *kept, **options)
    want = expected(logits, *kept, **options)
    assert_loss(loss, want, options.get("reduction", "mean"))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert_gradient(grad, want.grad_NC)


HARD = {"temperature": 2.0, "alpha": 0.4, "label_smoothing": 0.1}


def test_empty_memory_is_nan() -> None:
    """The fixture that all tests here lean on."""
    assert bool(torch.empty(5).isnan().all())


@pytest.mark.parametrize("tail", kernels.TAILS)
def test_labels_among_and_outside_the_kept_classes(tail: str, device: str) -> None:
    logits, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(6, 50, 4), temperature=2.0), device)
    outside = [int(x) for x in (torch.arange(50).unsqueeze(0) == ids.cpu().long()[..., None]).any(1).int().argmin(1)]
    first, last = ids[:, 0].long().tolist(), ids[:, 3].long().tolist()
    pairs = [
        (first[0], first[0]),
        (first[1], last[1]),
        (outside[2], outside[2]),
        (first[3], outside[3]),
        (outside[4], first[4]),
        (outside[5], 49),
    ]
    y, y_b = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    lam = torch.tensor([0.3, 0.0, 1.0, 0.5, 0.7, 0.9], device=device)
    check(logits, (ids, log_p, log_tail, y), targets_b_N=y_b, lam_N=lam, tail=tail, **HARD)


def test_ignored_labels(device: str) -> None:
    logits, (ids, log_p, log_tail, targets), _ = inputs(Case(shape=(4, 50, 4), temperature=2.0), device)
    nothing = torch.full_like(targets, IGNORED)
    check(logits, (ids, log_p, log_tail, nothing), **HARD)
    check(
        logits, (ids, log_p, log_tail, nothing), targets_b_N=targets, lam_N=torch.full((4,), 0.3, device=device), **HARD
    )
    loss = kernels.kd_loss(logits.requires_grad_(), ids, log_p, log_tail, nothing, alpha=0.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all()), "a row without a label has a gradient of zeros, and it is written"


def test_another_ignore_index_and_int32_labels(device: str) -> None:
    logits, (ids, log_p, log_tail, targets), _ = inputs(Case(shape=(5, 50, 4), temperature=2.0), device)
    targets = torch.where(targets == IGNORED, 255, targets).int()
    check(logits, (ids, log_p, log_tail, targets), ignore_index=255, **HARD)


@pytest.mark.parametrize("tail", kernels.TAILS)
def test_no_rows(tail: str, device: str) -> None:
    logits = torch.zeros(0, 9, device=device, requires_grad=True)
    ids, log_p = torch.zeros(0, 3, dtype=torch.int32, device=device), torch.zeros(0, 3, device=device)
    y = torch.zeros(0, dtype=torch.int64, device=device)
    for reduction in ("mean", "sum"):
        loss = kernels.kd_loss(logits, ids, log_p, log_p[:, 0], y, alpha=0.5, tail=tail, reduction=reduction)
        loss.backward()
        assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 9)
    assert kernels.kd_loss(logits, ids, log_p, log_p[:, 0], tail=tail, reduction="none").shape == (0,)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_teacher_without_a_tail(tail: str, device: str) -> None:
    logits, (ids, log_p, _, targets), _ = inputs(Case(shape=(3, 50, 4)), device)
    check(logits, (ids, log_p, torch.full((3,), -math.inf, device=device), targets), tail=tail)


def test_a_teacher_of_tail_alone(device: str) -> None:
    """log_tail = 0, and above it by rounding: the kept classes have no mass, and no NaN comes of it."""
    logits, (ids, log_p, _, _), _ = inputs(Case(shape=(2, 50, 4)), device)
    for tail_mass in (0.0, 1e-3):
        log_tail = torch.full((2,), tail_mass, device=device)
        loss = kernels.kd_loss(logits.requires_grad_(), ids, log_p, log_tail)
        (grad,) = torch.autograd.grad(loss, logits)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("tail", ["bucket", "renorm", "support", "sampled"])
def test_minus_infinite_logits(tail: str, device: str) -> None:
    """Masked classes: no mass, no gradient, no NaN. One of them is kept, with no probability."""
    logits, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(3, 50, 4), temperature=2.0), device)
    log_p[:, 3] = -math.inf
    logits[torch.arange(3), ids[:, 3].long()] = -math.inf
    logits[:, 40:] = torch.where(
        (torch.arange(40, 50, device=device) == ids[..., None]).any(1), logits[:, 40:], -math.inf
    )
    y = ids[:, 1].long()
    check(logits, (ids, log_p, log_tail, y), tail=tail, temperature=2.0, alpha=0.5)


def test_no_probability_for_what_the_teacher_gives_some_is_infinite(device: str) -> None:
    logits, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(2, 50, 4)), device)
    logits[0, ids[0, 1].long()] = -math.inf
    logits[1] = torch.where((torch.arange(50, device=device)[:, None] == ids[1].long()).any(1), logits[1], -math.inf)
    loss = kernels.kd_loss(logits.requires_grad_(), ids, log_p, log_tail, reduction="none")
    assert loss.tolist() == [math.inf, math.inf]
    assert kernels.kd_loss(logits, ids, log_p, log_tail, reduction="none", tail="uniform").tolist() == [math.inf] * 2
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert not bool(grad.isnan().any())


@pytest.mark.parametrize("tail", kernels.TAILS)
def test_logits_at_the_end_of_float16(tail: str, device: str) -> None:
    logits, kept, _ = inputs(Case(shape=(4, 50, 4), dtype=torch.float16), device)
    logits = torch.where(logits > 0, 3e4, -3e4).half()
    check(logits, kept, tail=tail, alpha=0.5, reduction="none")


def test_nan_is_passed_on(device: str) -> None:
    logits, kept, _ = inputs(Case(shape=(3, 50, 4)), device)
    logits[1, 17] = math.nan
    loss, stats = kernels.kd_loss(logits, *kept, alpha=0.5, reduction="none", stats=True)
    assert loss.isnan().tolist() == [False, True, False]
    assert stats.kl.isnan().tolist() == [False, True, False]


def test_float16_gradients_survive_a_scaled_loss(device: str) -> None:
    """1 / N would push them below the least float16; the factor of a GradScaler is applied before they are rounded."""
    n = 4096 if device == "cuda" else 64
    logits, kept, _ = inputs(Case(shape=(n, 200, 4), dtype=torch.float16), device)
    logits.requires_grad_()
    loss = kernels.kd_loss(logits, *kept, weights_N=torch.full((n,), 64 / n / 1024, device=device))
    (loss * 65536.0).backward()
    want = expected(logits, *kept, weights_N=torch.full((n,), 64 / n / 1024), grad_out=65536.0)
    assert logits.grad is not None
    assert_gradient(logits.grad, want.grad_NC)


@pytest.mark.parametrize("where", ["ids", "targets", "targets_b"])
@pytest.mark.parametrize("value", [-5, 50, 2**31 - 1])
def test_a_class_out_of_range_is_never_read(where: str, value: int, device: str) -> None:
    """Its row becomes NaN, other rows stay, and debug mode names the row."""
    logits, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(3, 50, 4), ids_dtype=torch.int64), device)
    targets = torch.tensor([1, 2, 3], device=device)
    targets_b = targets.clone()
    {"ids": ids[:, 2], "targets": targets, "targets_b": targets_b}[where][1] = value
    options = {"alpha": 0.5, "targets_b_N": targets_b, "lam_N": torch.full((3,), 0.5, device=device)}
    loss = kernels.kd_loss(logits, ids, log_p, log_tail, targets, reduction="none", **options)
    assert loss.isnan().tolist() == [False, True, False]
    name = "ids are in" if where == "ids" else "labels are in"
    with pytest.raises(ValueError, match=rf"{name} \[0, 50\).*; got otherwise in rows \[1\]. Next: "):
        kernels.kd_loss(logits, ids, log_p, log_tail, targets, debug=True, **options)


def test_debug_mode_finds_ids_that_repeat(device: str) -> None:
    logits, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(3, 50, 4)), device)
    kernels.kd_loss(logits, ids, log_p, log_tail, debug=True)
    ids[2, 0] = ids[2, 3]
    with pytest.raises(ValueError, match=r"ids are distinct in a row; got otherwise in rows \[2\]"):
        kernels.kd_loss(logits, ids, log_p, log_tail, debug=True)


def _with(name: str, change: Any) -> Any:
    """A change of one argument."""
    return lambda arguments: arguments.update({name: change(arguments[name])})


def _set(**values: Any) -> Any:
    return lambda arguments: arguments.update(values)


def _columns_apart(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


REFUSALS: dict[str, tuple[Any, str]] = {
    "three dimensions": (_with("logits_NC", lambda x: x[None]), "logits are [N, C]; got (1, 3, 50)"),
    "float64": (_with("logits_NC", torch.Tensor.double), "logits are bfloat16, float16 or float32; got torch.float64"),
    "transposed": (_with("logits_NC", _columns_apart), "the classes of a row lie side by side; got strides (1, 3)"),
    "k = 0": (_with("ids_NK", lambda x: x[:, :0]), "between 1 and C = 50 classes are kept; got k = 0"),
    "k > C": (_with("ids_NK", lambda x: x.repeat(1, 20)), "between 1 and C = 50 classes are kept; got k = 80"),
    "rows of ids": (_with("ids_NK", lambda x: x[:2]), "ids are [N, K] with N = 3; got (2, 4)"),
    "ids dtype": (_with("ids_NK", torch.Tensor.float), "ids is uint16, int32, int64; got torch.float32"),
    "log_p shape": (_with("log_p_NK", lambda x: x[:, :3]), "log_p has the shape (3, 4); got (3, 3)"),
    "log_p dtype": (_with("log_p_NK", torch.Tensor.double), "log_p is float16, float32; got torch.float64"),
    "log_p stride": (_with("log_p_NK", _columns_apart), "the last dimension of log_p lies side by side; got strides"),
    "log_p grad": (_with("log_p_NK", torch.Tensor.requires_grad_), "no gradient flows to log_p; got requires_grad"),
    "no tail": (_set(log_tail_N=None), "the bucket tail needs the log of the teacher's mass outside ids; got log_tail"),
    "tail dtype": (_with("log_tail_N", torch.Tensor.half), "log_tail is float32; got torch.float16"),
    "no targets": (_set(targets_N=None), "alpha below 1 and second labels need targets; got targets = None"),
    "targets shape": (_with("targets_N", lambda x: x[:1]), "targets has the shape (3,); got (1,)"),
    "targets dtype": (_with("targets_N", torch.Tensor.float), "targets is int32, int64; got torch.float32"),
    "lam alone": (_set(lam_N=torch.ones(3)), "second labels and lam come together; got one of them"),
    "weights": (_set(weights_N=torch.ones(4)), "weights has the shape (3,); got (4,)"),
    "temperature": (_set(temperature=0.0), "a temperature is a positive number; got 0.0"),
    "alpha": (_set(alpha=1.5), "alpha is between 0 (labels alone) and 1 (teacher alone); got 1.5"),
    "smoothing": (_set(label_smoothing=-0.1), "label_smoothing is between 0 and 1; got -0.1"),
    "tail name": (_set(tail="top"), "tail is one of bucket, renorm, uniform, support, sampled; got 'top'"),
    "reduction": (_set(reduction="batchmean"), "reduction is one of mean, sum, none; got 'batchmean'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, device: str) -> None:
    logits, (ids, log_p, log_tail, targets), _ = inputs(Case(shape=(3, 50, 4)), device)
    teacher = {"ids_NK": ids, "log_p_NK": log_p, "log_tail_N": log_tail}
    arguments: dict[str, Any] = {"logits_NC": logits, **teacher, "targets_N": targets, "alpha": 0.5}
    change, message = REFUSALS[name]
    change(arguments)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        kernels.kd_loss(**arguments)
    assert "Next: " in str(caught.value)


def test_too_many_kept_classes(device: str) -> None:
    wide = torch.zeros(1, 5000, device=device)
    with pytest.raises(ValueError, match=r"the kernel keeps at most 4096 classes; got k = 5000\. Next: use the plain"):
        kernels.kd_loss(wide, wide.long(), wide, None, tail="renorm")


def test_devices_that_differ(device: str) -> None:
    """The meta device stands for any other one."""
    logits, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(3, 50, 4)), device)
    with pytest.raises(ValueError, match=r"log_p lies where the logits lie, on .*; got meta\. Next: log_p.to\(logits"):
        kernels.kd_loss(logits, ids, log_p.to("meta"), log_tail)


def test_a_device_that_cannot_run_them_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "INTERPRETED", False)
    assert kernels.unavailable("cuda") is None
    assert "TRITON_INTERPRET=1 before triton is imported" in str(kernels.unavailable("cpu"))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"run on a CUDA device, or anywhere in Triton's interpreter; got device cpu"):
        kernels.kd_loss(x, x.long(), x, None, tail="renorm")
