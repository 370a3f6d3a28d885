"""Loss and gradient of the fused loss against float64, over the product of what it serves."""

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import kddata_kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from kernel_reference import (
    LARGE_SHAPES,
    SMALL_SHAPES,
    Case,
    all_cases,
    assert_gradient,
    assert_loss,
    check_part,
    expected,
    inputs,
    pairwise_cases,
    teacher,
    tiles_of,
)

SMALL, LARGE = pairwise_cases(SMALL_SHAPES), pairwise_cases(LARGE_SHAPES)


def run(case: Case, device: str) -> None:
    logits, kept, options = inputs(case, device)
    untouched = [x.clone() for x in (logits, *kept)]
    logits.requires_grad_()
    with tiles_of(case):
        loss, stats = kernels.kd_loss(logits, *kept, **options, stats=True)
        loss.sum().backward()
        with torch.no_grad():  # without statistics, and without a gradient, other variants of the kernel run
            plain = kernels.kd_loss(logits, *kept, **options)
    want = expected(logits, *kept, **options)
    assert_loss(loss, want, case.reduction)
    assert_loss(plain, want, case.reduction)
    assert logits.grad is not None
    assert logits.grad.dtype == case.dtype
    assert_gradient(logits.grad, want.grad_NC)
    assert torch.equal(stats.top1.long(), logits.argmax(1)), "top-1"
    assert_gradient(stats.kl, want.kl_N, scale=float((1 + want.kl_N.abs()).max()) * 3)
    assert_gradient(stats.ce, want.ce_N, scale=float((1 + want.ce_N.abs()).max()) * 3)
    for x, before in zip((logits, *kept), untouched, strict=True):
        assert torch.equal(x.detach(), before), "an input was changed"


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_pairwise(number: int, device: str) -> None:
    run(SMALL[number], device)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("number", range(len(LARGE)))
def test_pairwise_large(number: int, device: str) -> None:
    run(LARGE[number], device)


def test_a_few_of_the_full_product(device: str) -> None:
    assert check_part(3, 1500, device) == 3


@pytest.mark.needs_cuda
@pytest.mark.timeout(3600)
def test_full_product(device: str) -> None:
    """In as many processes as there are cores: nearly every case compiles a kernel of its own."""
    parts = os.cpu_count() or 1
    with ProcessPoolExecutor(parts, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(check_part, range(parts), [parts] * parts, [device] * parts))
    assert sum(done) == len(all_cases())


@pytest.mark.parametrize("tail", kernels.TAILS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_kept_is_the_dense_kl(tail: str, temperature: float, device: str) -> None:
    torch.manual_seed(0)
    student, logits = 3 * torch.randn(4, 65, device=device), 3 * torch.randn(4, 65, device=device)
    ids, log_p, log_tail = teacher(logits.cpu(), 65, temperature)
    loss = kernels.kd_loss(
        student, ids.to(device), log_p.to(device), log_tail.to(device), temperature=temperature, tail=tail
    )
    p, log_q = torch.softmax(logits.double() / temperature, 1), torch.log_softmax(student.double() / temperature, 1)
    torch.testing.assert_close(
        loss.double(), temperature**2 * F.kl_div(log_q, p, reduction="batchmean"), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_alpha_0_is_cross_entropy(smoothing: float, device: str) -> None:
    logits, kept, _ = inputs(Case(shape=(6, 77, 5)), device)
    loss = kernels.kd_loss(logits, *kept, alpha=0.0, label_smoothing=smoothing)
    want = F.cross_entropy(logits.double(), kept[3], label_smoothing=smoothing)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tail", kernels.TAILS)
def test_gradient_rows_sum_to_zero(tail: str, device: str) -> None:
    case = Case(shape=(4, 333, 9), tail=tail, temperature=2.0, alpha=0.4, smoothing=0.1, mixup=True, reduction="sum")
    logits, kept, options = inputs(case, device)
    logits.requires_grad_()
    kernels.kd_loss(logits, *kept, **options).backward()
    assert logits.grad is not None
    assert float(logits.grad.double().sum(1).abs().max()) < 1e-6 * float(logits.grad.abs().sum(1).max())


@pytest.mark.parametrize("tail", kernels.TAILS)
def test_shift_and_order_change_nothing(tail: str, device: str) -> None:
    """Shifts that are exact in float32 leave every difference of logits as it was."""
    case = Case(shape=(4, 200, 8), tail=tail, temperature=2.0, alpha=0.5, smoothing=0.1)
    logits, (ids, log_p, log_tail, targets), options = inputs(case, device)
    logits = (logits * 64).round() / 64
    plain = kernels.kd_loss(logits, ids, log_p, log_tail, targets, **options)
    shifted = kernels.kd_loss(logits + 4096, ids, log_p, log_tail, targets, **options)
    torch.testing.assert_close(plain, shifted, rtol=1e-6, atol=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = kernels.kd_loss(
        logits, ids[:, order].contiguous(), log_p[:, order].contiguous(), log_tail, targets, **options
    )
    torch.testing.assert_close(plain, permuted, rtol=1e-6, atol=0)


def test_bucket_is_a_lower_bound(device: str) -> None:
    torch.manual_seed(1)
    student, logits = 3 * torch.randn(8, 300, device=device), 3 * torch.randn(8, 300)
    full = F.kl_div(
        torch.log_softmax(student.double(), 1), torch.softmax(logits.double(), 1).to(device), reduction="none"
    ).sum(1)
    for k in (1, 5, 50, 299):
        ids, log_p, log_tail = (x.to(device) for x in teacher(logits, k, 1.0))
        bucket = kernels.kd_loss(student, ids, log_p, log_tail, reduction="none").double()
        assert bool((bucket <= full * (1 + 1e-6)).all())
        assert bool((bucket >= 0).all())


@pytest.mark.parametrize("tail", ["bucket", "renorm", "uniform", "support"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("certain", [0.0, 12.0])
def test_near_convergence_the_gradient_keeps_its_digits(
    tail: str, dtype: torch.dtype, certain: float, device: str
) -> None:
    """The student is the teacher but for 1e-3 of noise; all classes but the kept ones agree for every tail."""
    torch.manual_seed(2)
    student = torch.randn(4, 500).to(dtype)
    student[:, 7] += certain  # p(top) up to 0.997
    near = student.double() + 1e-3 * torch.randn(4, 500, dtype=torch.float64)
    ids, log_p, log_tail = (x.to(device) for x in teacher(near, 20, 1.0))
    logits = student.to(device).requires_grad_()
    options = {"tail": tail, "reduction": "sum"}
    kernels.kd_loss(logits, ids, log_p, log_tail, **options).backward()
    want = expected(logits, ids, log_p, log_tail, **options).grad_NC
    assert logits.grad is not None
    error = (logits.grad.double().cpu() - want).norm() / want.norm()
    assert float(error) < 0.01


def test_near_convergence_outside_the_kept_classes(device: str) -> None:
    """Nearly all mass of both lies on a class that is not kept."""
    torch.manual_seed(4)
    student = torch.randn(4, 500)
    student[:, 7] += 14
    near = student.double() + 1e-3 * torch.randn(4, 500, dtype=torch.float64)
    log_p = torch.log_softmax(near, 1)
    ids = log_p.topk(21, 1).indices[:, 1:]
    log_tail = torch.logsumexp(log_p.scatter(1, ids, -math.inf), 1).float().to(device)
    log_p = log_p.gather(1, ids).float().to(device)
    logits = student.to(device).requires_grad_()
    kernels.kd_loss(logits, ids.to(device), log_p, log_tail, reduction="sum").backward()
    want = expected(logits, ids, log_p, log_tail, reduction="sum").grad_NC
    assert logits.grad is not None
    assert float((logits.grad.double().cpu() - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("share", [0.9, 0.99, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_student_keeps_the_gradient_of_its_label(share: float, dtype: torch.dtype, device: str) -> None:
    """Rounded to its dtype first and read back, q - 1 would lose this up to all of its digits."""
    c = 1001
    logits = torch.zeros(2, c, dtype=dtype, device=device)
    logits[:, 5] = math.log(share / (1 - share) * (c - 1))
    logits.requires_grad_()
    ids = torch.tensor([[5, 1], [2, 3]], device=device)
    log_p, log_tail = torch.full((2, 2), -1.0, device=device), torch.full((2,), -1.0, device=device)
    targets = torch.tensor([5, 5], device=device)
    kernels.kd_loss(logits, ids, log_p, log_tail, targets, alpha=0.0, reduction="sum").backward()
    want = expected(logits, ids, log_p, log_tail, targets, alpha=0.0, reduction="sum").grad_NC
    assert logits.grad is not None
    assert_gradient(logits.grad, want)


def test_mass_that_is_tiny_or_underflows(device: str) -> None:
    """The student leaves 1e-12, or exp(-60000), outside the kept classes, and the teacher a tenth."""
    for gap, dtype in ((27.6 + math.log(100), torch.float32), (6e4, torch.float16)):
        torch.manual_seed(3)
        logits = (0.1 * torch.randn(2, 102)).to(dtype)
        logits[:, 2:] -= gap / 2
        logits[:, :2] += gap / 2
        logits = logits.to(device).requires_grad_()
        ids = torch.tensor([[0, 1], [1, 0]], device=device)
        log_p = torch.log(torch.tensor([[0.6, 0.3], [0.6, 0.3]], device=device))
        log_tail = torch.log(torch.tensor([0.1, 0.1], device=device))
        loss = kernels.kd_loss(logits, ids, log_p, log_tail, reduction="none")
        want = expected(logits, ids, log_p, log_tail, reduction="none")
        assert_loss(loss, want, "none")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert_gradient(grad, want.grad_NC)
