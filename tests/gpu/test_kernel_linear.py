"""The linear loss and DKD: values, gradients, refusals; and what the linear loss holds in memory."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kddata_kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from kddata_kernels.dkd import dkd_rows
from kernel_reference import IGNORED, Case, assert_gradient, assert_loss, expected, inputs
from torch import Tensor

CASE = Case(shape=(11, 101, 7), temperature=2.0, alpha=0.3, smoothing=0.1, mixup=True, weights=True)


def classifier(dtype: torch.dtype, device: str, *, n: int = 11, c: int = 101, d: int = 16) -> tuple[Tensor, ...]:
    """Features, weight and bias."""
    g = torch.Generator().manual_seed(1)
    shapes = ((n, d), (c, d), (c,))
    return tuple((0.5 * torch.randn(*s, generator=g)).to(device, dtype).requires_grad_() for s in shapes)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [3, 4, 11, 2048])
def test_equals_the_loss_of_its_logits(chunk_rows: int, reduction: str, device: str) -> None:
    """Chunks that divide N, that do not, and one that is larger; a factor on the loss."""
    _, kept, options = inputs(Case(**{**vars(CASE), "reduction": reduction}), device)
    leaves = classifier(torch.float32, device)
    loss = kernels.kd_linear_loss(*leaves, *kept, **options, chunk_rows=chunk_rows)
    found = torch.autograd.grad(3 * loss, leaves)
    exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    logits = F.linear(*exact)
    want = expected(logits, *kept, **options, grad_out=3.0)
    assert_loss(loss, want, reduction)
    for ours, theirs in zip(found, torch.autograd.grad(logits, exact, want.grad_NC), strict=True):
        assert_gradient(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_its_logits(dtype: torch.dtype, device: str) -> None:
    """Against a float64 graph that rounds logits and their gradient to the dtype where the chunk buffer does."""
    _, kept, options = inputs(CASE, device)
    leaves = classifier(dtype, device)
    loss = kernels.kd_linear_loss(*leaves, *kept, **options, chunk_rows=4)
    found = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        logits = F.linear(*leaves)
    want = expected(logits, *kept, **options)
    assert abs(float(loss) - float(want.loss_N.sum())) <= 1e-2 * float(want.loss_N.sum())
    x, weight, _ = (leaf.detach().double().cpu() for leaf in leaves)
    grad = (want.grad_NC * 11).to(dtype).double() / 11
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(found, (grad @ weight, grad.t() @ x, grad.sum(0)), strict=True):
        assert ours.dtype == dtype
        room = 2 * eps * float(theirs.abs().max())  # its logits come from another matmul, so they round differently
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=2 * eps, atol=room)


def test_only_what_is_wanted_is_made(device: str) -> None:
    _, kept, options = inputs(CASE, device)
    x, weight, bias = classifier(torch.float32, device)
    (alone,) = torch.autograd.grad(kernels.kd_linear_loss(x.detach(), weight, None, *kept, **options), weight)
    (both,) = torch.autograd.grad(kernels.kd_linear_loss(x, weight, bias.detach() * 0, *kept, **options), weight)
    assert torch.equal(alone, both)
    with torch.no_grad():
        assert not kernels.kd_linear_loss(x, weight, bias, *kept, **options).requires_grad


def test_linear_no_rows(device: str) -> None:
    _, kept, options = inputs(Case(shape=(3, 101, 7)), device)
    leaves = classifier(torch.float32, device, n=0)
    loss = kernels.kd_linear_loss(*leaves, *(x[:0] for x in kept), **options)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.item() == 0
    assert all(bool((g == 0).all()) for g in grads)


def test_linear_under_autocast(device: str) -> None:
    """Features and weight are cast as F.linear casts them; gradients arrive in float32."""
    _, kept, options = inputs(CASE, device)
    leaves = classifier(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        loss = kernels.kd_linear_loss(*leaves, *kept, **options)
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    same = kernels.kd_linear_loss(*low, *kept, **options)
    assert torch.equal(loss, same)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(same, low), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


def test_linear_compiles_and_has_no_second_derivative(device: str) -> None:
    _, kept, options = inputs(CASE, device)
    leaves = classifier(torch.float32, device)
    torch._dynamo.reset()

    def loss_of(*x: Tensor) -> Tensor:
        return kernels.kd_linear_loss(*x, *kept, **options, chunk_rows=4)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, loss_of(*leaves), rtol=0, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(loss_of(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(*leaves), leaves, create_graph=True)


LINEAR_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "shapes": (
        {"weight_CD": torch.zeros(101, 15)},
        r"features are \[N, D\] and weight is \[C, D\]; got \(11, 16\)",
    ),
    "bias": ({"bias_C": torch.zeros(100)}, r"bias is \[C\] with C = 101; got \(100,\)"),
    "dtypes": (
        {"weight_CD": torch.zeros(101, 16).half()},
        "features, weight and bias share one of .*; got torch.f",
    ),
    "chunk": ({"chunk_rows": 0}, "a chunk has at least 1 row; got 0"),
    "reduction": ({"reduction": "none"}, "reduction is one of mean, sum; got 'none'"),
    "debug": ({"debug": True, "ids_NK": torch.zeros(11, 7, dtype=torch.int64)}, "ids are distinct in a row"),
}


@pytest.mark.parametrize("name", LINEAR_REFUSALS)
def test_linear_refusals(name: str, device: str) -> None:
    change, message = LINEAR_REFUSALS[name]
    x, weight, bias = classifier(torch.float32, device)
    _, (ids, log_p, log_tail, targets), options = inputs(CASE, device)
    teacher = {"ids_NK": ids, "log_p_NK": log_p, "log_tail_N": log_tail, "targets_N": targets}
    arguments = {"features_ND": x, "weight_CD": weight, "bias_C": bias, **teacher, **options}
    change = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        kernels.kd_linear_loss(**(arguments | change))


def unfused(x: Tensor, weight: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor) -> Tensor:
    """The same loss as anyone would write it: all logits, float32, the bucket by log1p of minus the kept mass."""
    log_q = torch.log_softmax((x @ weight.t()).float() / 2, 1)
    kept = log_q.gather(1, ids)
    p, p_t = log_p.exp(), log_tail.exp()
    bucket = p_t * (log_tail - torch.log1p(-kept.exp().sum(1).clamp_max(1 - 1e-6)))
    return 4 * ((p * (log_p - kept)).sum(1) + bucket).mean()


def peak_bytes(work: Callable[[], Any], device: str, folder: Path) -> int:
    """The most that torch's allocator held during `work`, above what it held before."""
    if device == "cuda":
        work()  # so that cuBLAS holds its workspace
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = [(e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    _, total, first = min(held)
    return max(h[1] for h in held) - (total - first)


def test_linear_memory(device: str, tmp_path: Path) -> None:
    """Beyond its gradients: the chunk buffer and rows of numbers. N : D : C : chunk as 8192 : 4096 : 128256 : 2048,
    each divided by 16 or 64; float32, where the accumulators are the gradients."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    n, d, c, chunk = 128, 64, 2004, 32
    x, weight, _ = classifier(torch.float32, device, n=n, c=c, d=d)
    _, (ids, log_p, log_tail, _), _ = inputs(Case(shape=(n, c, 10), temperature=2.0), device)
    teacher = (ids.long(), log_p, log_tail)
    fused = unused = None

    def run_fused() -> None:
        nonlocal fused
        fused = kernels.kd_linear_loss(x, weight, None, *teacher, temperature=2.0, chunk_rows=chunk)

    def run_unfused() -> None:
        nonlocal unused
        unused = torch.autograd.grad(unfused(x, weight, *teacher), (x, weight))

    gradients = 4 * (x.numel() + weight.numel())
    ours = peak_bytes(run_fused, device, tmp_path) - gradients
    theirs = peak_bytes(run_unfused, device, tmp_path) - gradients
    buffer = 4 * chunk * -(-c // 8) * 8
    assert buffer <= ours <= 1.1 * buffer + 2**14, f"{ours} bytes, of which the chunk buffer takes {buffer}"
    assert ours <= theirs / 8, f"{ours} bytes against {theirs}"


def dense_dkd(x: Tensor, log_p: Tensor, y: Tensor, t: float, alpha: float, beta: float) -> Tensor:
    """Rows of DKD from dense float64 tensors: the formula of the module, written out."""
    p, q = log_p.softmax(1), (x / t).softmax(1)
    p_y, q_y = p.gather(1, y[:, None])[:, 0], q.gather(1, y[:, None])[:, 0]
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, y[:, None], False)
    p_n, q_n = (p * others).sum(1), (q * others).sum(1)
    target = p_y * torch.log(p_y / q_y) + p_n * torch.log(p_n / q_n)
    r, s = p / p_n[:, None], q / q_n[:, None]
    rest = torch.where(others, r * torch.log(r / s), 0.0).sum(1)
    return t * t * (alpha * target + beta * rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 10), (3, 100), (2, 1000), (4, 33), (1, 4096)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd(shape: tuple[int, int], temperature: float, dtype: torch.dtype, device: str) -> None:
    n, c = shape
    case = Case(shape=(n, c, c), temperature=temperature, dtype=dtype, log_p_dtype=torch.float16, weights=True)
    logits, (ids, log_p, _, targets), options = inputs(case, device)
    logits.requires_grad_()
    loss = kernels.dkd_loss(
        logits, ids, log_p, targets, temperature=temperature, beta=2.0, weights_N=options["weights_N"], reduction="none"
    )
    factor = torch.linspace(0.5, 2, n)
    (grad,) = torch.autograd.grad((loss * factor.to(device)).sum(), logits)
    exact = logits.detach().double().cpu().requires_grad_()
    dense = torch.empty(n, c, dtype=torch.float64).scatter_(1, ids.cpu().long(), log_p.cpu().double())
    has = targets.cpu() != IGNORED
    want = dense_dkd(exact, dense, targets.cpu().clamp_min(0), temperature, 1.0, 2.0)
    want = torch.where(has, want * options["weights_N"].cpu().double(), 0.0)
    (want_grad,) = torch.autograd.grad((want * factor).sum(), exact)
    room = 1e-6 * temperature**2 * 3 * float((1 + want / temperature**2).max())
    assert float((loss.detach().cpu().double() - want.detach()).abs().max()) <= room
    assert_gradient(grad, want_grad)


def test_dkd_mean_counts_rows_with_a_label(device: str) -> None:
    logits, (ids, log_p, _, targets), _ = inputs(Case(shape=(5, 20, 20)), device)
    rows = kernels.dkd_loss(logits, ids, log_p, targets, reduction="none")
    assert rows[1] == 0
    torch.testing.assert_close(kernels.dkd_loss(logits, ids, log_p, targets), rows.sum() / 4, rtol=1e-6, atol=0)
    nothing = torch.full_like(targets, IGNORED)
    assert kernels.dkd_loss(logits, ids, log_p, nothing).item() == 0
    targets[2] = 20
    assert math.isnan(float(kernels.dkd_loss(logits, ids, log_p, targets)))


def test_dkd_as_an_operator(device: str) -> None:
    logits, (ids, log_p, _, targets), _ = inputs(Case(shape=(5, 20, 20)), device)
    torch.library.opcheck(dkd_rows, (logits.requires_grad_(), ids, log_p, targets, None, 2.0, 1.0, 8.0, IGNORED, True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kernels.dkd_loss(logits, ids, log_p, targets), logits, create_graph=True)


def test_dkd_refuses_labels_that_lack_classes(device: str) -> None:
    logits, (ids, log_p, _, targets), _ = inputs(Case(shape=(5, 20, 19)), device)
    with pytest.raises(ValueError, match=r"DKD needs every class of the teacher, K = C; got \(5, 19\)\. Next: "):
        kernels.dkd_loss(logits, ids, log_p, targets)
