"""The float64 dense autograd reference of the kernels, inputs to compare on, and the gate.

The gate is not a tolerance to tune: float32 outputs lie within 1e-6 of the scale of what was added up; bf16 and fp16
outputs within one unit in the last place besides.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kddata_kernels import launch, ops
from kddata_kernels.plan import Tiles
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the product that tests walk over."""

    shape: tuple[int, int, int]  # N, C, k
    tail: str = "bucket"
    temperature: float = 1.0
    alpha: float = 1.0
    smoothing: float = 0.0
    mixup: bool = False
    dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int32
    log_p_dtype: torch.dtype = torch.float32
    weights: bool = False
    reduction: str = "mean"
    padding: int = 0
    looped: bool = False
    seed: int = 0


def inputs(case: Case, device: str) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Any]]:
    """(logits, (ids, log_p, log_tail, targets), keyword arguments) of a case. One row's label is kept, one ignored."""
    n, c, k = case.shape
    g = torch.Generator().manual_seed(case.seed)
    base = 3 * torch.randn(n, c + case.padding, generator=g)
    logits = base.to(device=device, dtype=case.dtype)[:, :c]
    ids, log_p, log_tail = teacher(3 * torch.randn(n, c, generator=g), k, case.temperature)
    targets = torch.randint(0, c, (n,), generator=g)
    targets_b = torch.randint(0, c, (n,), generator=g)
    targets[0] = ids[0, 0]
    if n > 2:
        targets[1], targets_b[1], targets_b[2] = IGNORED, IGNORED, targets[2]
    options: dict[str, Any] = {
        "temperature": case.temperature,
        "alpha": case.alpha,
        "tail": case.tail,
        "label_smoothing": case.smoothing,
        "reduction": case.reduction,
    }
    if case.mixup:
        options |= {"targets_b_N": targets_b.to(device), "lam_N": torch.rand(n, generator=g).to(device)}
    if case.weights:
        options["weights_N"] = (2 * torch.rand(n, generator=g)).to(device)
    ids_dtype = case.ids_dtype if c <= 65536 or case.ids_dtype != torch.uint16 else torch.int32
    kept = (ids.to(ids_dtype), log_p.to(case.log_p_dtype), log_tail, targets)
    return logits, tuple(x.to(device) for x in kept), options


def teacher(logits_NC: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, log_p, log tail mass) of the k most probable classes at a temperature."""
    log_p = torch.log_softmax(logits_NC.double() / temperature, 1)
    top, ids = log_p.topk(k, 1)
    return ids, top.float(), torch.logsumexp(log_p.scatter(1, ids, -math.inf), 1).float()


@dataclass(frozen=True, kw_only=True)
class Expected:
    """In float64. `scale_N` is the sum of the absolute values of what a row's loss adds up."""

    loss_N: Tensor
    scale_N: Tensor
    grad_NC: Tensor
    kl_N: Tensor
    ce_N: Tensor


def expected(
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None,
    targets: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    tail: str = "bucket",
    targets_b_N: Tensor | None = None,
    lam_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED,
    weights_N: Tensor | None = None,
    reduction: str = "mean",
    grad_out: Tensor | float = 1.0,
) -> Expected:
    """Loss rows (already divided for the mean) and gradient, from a dense float64 autograd graph of the same inputs."""
    x = logits.detach().double().cpu().requires_grad_()
    ids, log_p = ids.cpu().long(), log_p.cpu().double()
    (n, c), k = x.shape, ids.shape[1]
    z = x / temperature
    log_q = torch.log_softmax(z, 1)
    log_q_S = torch.log_softmax(z.gather(1, ids), 1) if tail == "support" else log_q.gather(1, ids)
    log_p = torch.log_softmax(log_p, 1)
    terms = []
    if tail in ("bucket", "uniform") and k < c:
        assert log_tail is not None
        log_tail = log_tail.cpu().double()
        log_p = log_p + torch.log(-torch.expm1(log_tail))[:, None]
        off = torch.ones_like(x, dtype=torch.bool).scatter(1, ids, False)
        p_t = log_tail.exp()
        if tail == "bucket":
            log_q_t = torch.logsumexp(z.masked_fill(~off, -math.inf), 1) - torch.logsumexp(z, 1)
            terms += [_product(p_t, log_tail), -_product(p_t, log_q_t)]
        else:
            log_q_off = torch.where(off, log_q, 0.0).sum(1)
            terms += [_product(p_t, log_tail - math.log(c - k)), -_product(p_t / (c - k), log_q_off)]
    p = log_p.exp()
    terms += [_product(p, log_p).sum(1), -_product(p, log_q_S).sum(1)]
    kl, kl_scale = sum(terms), sum(t.detach().abs() for t in terms)
    ce = ce_scale = x.new_zeros(n)
    count = n
    if targets is not None:
        y, has = targets.cpu().long(), targets.cpu() != ignore_index
        lam = torch.ones(n, dtype=torch.float64) if lam_N is None else lam_N.cpu().double()
        one = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
        ce = lam * F.cross_entropy(x, y, **one)
        if targets_b_N is not None:
            y_b = targets_b_N.cpu().long()
            ce, has = ce + (1 - lam) * F.cross_entropy(x, y_b, **one), has | (y_b != ignore_index)
        spread = (x.detach() - x.detach().amax(1, keepdim=True)).abs()
        ce_scale = 1 + spread.mean(1)
        count = max(1, int(has.sum()))
    w = x.new_ones(n) if weights_N is None else weights_N.cpu().double()
    mean = reduction == "mean"
    soft, hard = w * alpha * temperature**2 / (n if mean else 1), w * (1 - alpha) / (count if mean else 1)
    loss = (soft * kl if alpha > 0 else 0) + (hard * ce if alpha < 1 else 0) + 0 * w
    scale = soft.abs() * (1 + kl_scale) + hard.abs() * ce_scale
    out = torch.as_tensor(grad_out).cpu().double()
    (grad,) = torch.autograd.grad((loss * out).sum(), x)
    return Expected(loss_N=loss.detach(), scale_N=scale.detach(), grad_NC=grad, kl_N=kl.detach(), ce_N=ce.detach())


def _product(p: Tensor, log_q: Tensor) -> Tensor:
    """p log q, 0 where p is 0."""
    return torch.where(p > 0, p * torch.where(p > 0, log_q, 0.0), 0.0)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring values of a dtype at the magnitude of x; 0 for float32."""
    if dtype == torch.float32:
        return torch.zeros_like(x)
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp_min(info.smallest_normal)))
    return info.eps * 2.0**exponent


def assert_gradient(found: Tensor, want: Tensor, *, scale: float | None = None) -> None:
    """The gate, for a gradient in its own dtype. Its scale is that of its largest element; where all of it vanishes,
    that of the probabilities that cancel, 1."""
    if scale is None:
        scale = float(want.abs().amax()) or 1.0
    room = ulp(want, found.dtype) + 1e-6 * scale
    _assert_within(found.detach().double().cpu(), want, room)


def assert_loss(found: Tensor, want: Expected, reduction: str) -> None:
    """The gate, for a loss in float32."""
    assert found.dtype == torch.float32
    rows = reduction == "none"
    loss, scale = (want.loss_N, want.scale_N) if rows else (want.loss_N.sum(), want.scale_N.sum())
    _assert_within(found.detach().double().cpu(), loss, 1e-6 * scale)


def _assert_within(found: Tensor, want: Tensor, room: Tensor) -> None:
    error = (found - want).abs()
    bad = ~(error <= room) & ~((found == want) & torch.isinf(want))  # NaN is bad, equal infinities are not
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} outside the gate; at {at}: {float(found[at]):.9g}, "
            f"expected {float(want[at]):.9g} within {float(room[at]):.3g}"
        )


SMALL_SHAPES = [
    (1, 1, 1), (3, 2, 1), (8, 31, 4), (3, 32, 32), (5, 33, 33), (7, 127, 126),  # within a word of the bitmap, and k = C
    (4, 100, 17), (2, 1000, 10), (3, 1021, 50), (2, 1024, 1), (1, 2049, 64), (2, 4096, 16),  # prime, at and past a tile
]  # fmt: skip
LARGE_SHAPES = [(257, 1000, 10), (64, 1000, 1000), (33, 4096, 4096), (17, 21841, 50), (9, 32000, 10), (5, 32768, 1)]
PRODUCT_SHAPES = [(8, 31, 4), (9, 65, 65), (33, 1000, 10), (5, 21841, 50), (5, 32000, 10), (3, 128256, 10)]
AXES: dict[str, list[Any]] = {
    "shape": SMALL_SHAPES,
    "tail": ["bucket", "renorm", "uniform", "support", "sampled"],
    "temperature": [1.0, 2.0, 0.5, 4.0],
    "alpha": [1.0, 0.0, 0.3],
    "smoothing": [0.0, 0.1],
    "mixup": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "ids_dtype": [torch.int32, torch.uint16, torch.int64],
    "log_p_dtype": [torch.float32, torch.float16],
    "weights": [False, True],
    "reduction": ["mean", "sum", "none"],
    "padding": [0, 7],
    "looped": [False, True],
}


def pairwise_cases(shapes: list[tuple[int, int, int]]) -> list[Case]:
    """Cases in which every pair of values of every two axes occurs: greedy, from a fixed seed."""
    axes = AXES | {"shape": shapes}
    rng = random.Random(0)
    names = list(axes)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    chosen = []
    while open_pairs:
        candidates = []
        for _ in range(30):
            a, i, b, j = rng.choice(sorted(open_pairs))
            row = [rng.randrange(len(axes[name])) for name in names]
            row[a], row[b] = i, j
            candidates.append((len(_pairs(row) & open_pairs), row))
        _, best = max(candidates)
        open_pairs -= _pairs(best)
        chosen.append(best)
    return [
        Case(seed=number, **{name: axes[name][i] for name, i in zip(names, row, strict=True)})
        for number, row in enumerate(chosen)
    ]


def all_cases() -> list[Case]:
    """The full product of the axes that meet in the arithmetic, for a GPU; the other axes take turns."""
    minor = ("ids_dtype", "log_p_dtype", "weights", "reduction", "padding", "looped")
    major = ("tail", "temperature", "alpha", "smoothing", "mixup", "dtype")
    turns = itertools.cycle(itertools.product(*(AXES[name] for name in minor)))
    cases = []
    for seed, values in enumerate(itertools.product(PRODUCT_SHAPES, *(AXES[name] for name in major))):
        point = dict(zip(("shape", *major), values, strict=True)) | dict(zip(minor, next(turns), strict=True))
        cases.append(Case(seed=seed, **point))
    return cases


def check_part(part: int, parts: int, device: str) -> int:
    """Every `parts`-th case of the full product; how many they were. One launch each: most cases compile a kernel."""
    cases = all_cases()[part::parts]
    for case in cases:
        logits, kept, options = inputs(case, device)
        tensors = (options.get("targets_b_N"), options.get("lam_N"), options.get("weights_N"))
        numbers = (case.temperature, case.alpha, case.tail, case.smoothing, IGNORED, case.reduction == "mean")
        with tiles_of(case):
            loss, grad, _, _ = ops.kd_rows(logits, *kept, *tensors, *numbers, True, False)
        want = expected(logits, *kept, **options)
        try:
            assert_loss(loss, want, "none")
            assert_gradient(grad, want.grad_NC)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    return len(cases)


@contextlib.contextmanager
def tiles_of(case: Case) -> Iterator[None]:
    """Rows walked in small tiles where the case says so, whatever their length."""
    block = 64 if case.shape[1] <= 512 else 1024
    looped = Tiles(rows=1, block=block, looped=True, num_warps=4)
    table = launch.tiles
    launch.tiles = (lambda *_, **__: looped) if case.looped else table
    try:
        yield
    finally:
        launch.tiles = table


def _pairs(row: list[int]) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}
