"""The plain-torch loss against a float64 dense autograd reference and against the identities that define it."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kddata.labels import SoftLabels
from kddata.losses import hard_loss, kd_linear_loss, kd_loss, rows

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
TOP_K_TAILS = ("bucket", "renorm", "uniform", "support")


def random_logits(seed: int, num_rows: int, num_classes: int, *, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)


def make_labels(seed: int, num_rows: int, num_classes: int, k: int) -> SoftLabels:
    logits = random_logits(seed + 1, num_rows, num_classes)
    return SoftLabels.from_logits(logits, k=k, temperatures=TEMPERATURES)


def dense_soft_loss(x: Tensor, labels: SoftLabels, *, temperature: float, tail: str) -> Tensor:
    """KL of each row, straight from the table of tails, on dense tensors."""
    log_p, log_tail = labels.at(temperature)
    p, p_t, ids = log_p.exp(), log_tail.exp(), labels.ids_BK.long()
    log_q = torch.log_softmax(x / temperature, dim=1)
    log_q_S = log_q.gather(1, ids)
    off = torch.ones_like(x).scatter(1, ids, 0.0)
    if tail in ("renorm", "support", "sampled"):
        p = p / p.sum(1, keepdim=True)
        log_q_S = torch.log_softmax(log_q_S, dim=1) if tail == "support" else log_q_S
        return (p * (p.log() - log_q_S)).sum(1)
    loss = (p * (log_p - log_q_S)).sum(1)
    num_off = labels.num_classes - labels.k
    if num_off == 0:
        return loss
    if tail == "bucket":
        return loss + p_t * (log_tail - torch.logsumexp(log_q.masked_fill(off == 0, -math.inf), dim=1))
    u = (p_t / num_off)[:, None]
    return loss + (off * u * (u.log() - log_q)).sum(1)


def dense_hard_loss(x: Tensor, pair: list[tuple[Tensor, float]], smoothing: float) -> tuple[Tensor, Tensor]:
    """(CE, whether a target is not ignored) of each row, from F.cross_entropy and the share of each target."""
    losses = [lam * F.cross_entropy(x, y, reduction="none", label_smoothing=smoothing) for y, lam in pair]
    return torch.stack(losses).sum(0), torch.stack([y != -100 for y, _ in pair]).any(0)


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_equals_the_dense_float64_reference(data: st.DataObject) -> None:
    """Every tail x T x alpha x smoothing x mixup x dtype x weights x reduction x size; values and gradients."""
    num_rows, num_classes = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([2, 3, 7, 31, 64, 257]))
    k = data.draw(st.sampled_from(sorted({1, min(5, num_classes), num_classes - 1, num_classes})))
    tail = data.draw(st.sampled_from(rows.TAILS))
    temperature = 1.0 if tail == "sampled" else data.draw(st.sampled_from(TEMPERATURES))
    alpha, smoothing = data.draw(st.sampled_from([0.0, 0.3, 1.0])), data.draw(st.sampled_from([0.0, 0.1]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    seed = data.draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)

    def targets() -> Tensor:
        ids = torch.randint(num_classes, (num_rows,), generator=generator)
        return ids.masked_fill(torch.rand(num_rows, generator=generator) < 0.25, -100)

    labels = make_labels(seed, num_rows, num_classes, k)
    x = random_logits(seed, num_rows, num_classes).to(dtype).requires_grad_()
    y1, y2 = targets(), targets() if data.draw(st.booleans()) else None
    lam = 0.7 if y2 is not None else 1.0
    weights = torch.rand(num_rows, generator=generator) if data.draw(st.booleans()) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.CHUNK_ELEMENTS, "cpu", data.draw(st.sampled_from([1, 2 * num_classes, 2**18])))
        loss = kd_loss(
            x,
            labels,
            y1,
            temperature=temperature,
            tail=tail,
            alpha=alpha,
            label_smoothing=smoothing,
            reduction=reduction,
            targets2_B=y2,
            lam=lam,
            weights_B=weights,
        )

    exact = x.detach().double().requires_grad_()
    soft = dense_soft_loss(exact, labels, temperature=temperature, tail=tail)
    pair = [(y1, lam)] if y2 is None else [(y1, lam), (y2, 1 - lam)]
    hard, labelled = dense_hard_loss(exact, pair, smoothing)
    w = torch.ones(num_rows) if weights is None else weights
    count = max(1, int(labelled.sum())) if reduction == "mean" else 1
    expected = w * (
        alpha * temperature**2 * soft / (num_rows if reduction == "mean" else 1) + (1 - alpha) * hard / count
    )
    expected = expected if reduction == "none" else expected.sum()

    grad_out = torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.5
    (grad,) = torch.autograd.grad(loss, x, grad_out.to(loss.dtype))
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_out)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    terms = max(1.0, temperature**2) * (num_rows if reduction == "sum" else 1)  # what is added up and cancels
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance * terms)
    # one unit in the last place of the output's dtype, and 1e-6 of the largest gradient; q - p of near values cannot be
    # better than float32 holds p, of which a quarter of the largest possible gradient allows for
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    tiny = 2**-25 if dtype == torch.float16 else 0.0
    possible = (alpha * temperature + 1 - alpha) / (num_rows if reduction == "mean" else 1)
    scale = max(0.25 * possible, float(expected_grad.abs().max()))
    atol = (1e-13 if dtype == torch.float64 else 1e-6) * scale + tiny
    torch.testing.assert_close(grad.double(), expected_grad, rtol=ulp, atol=atol)


@pytest.mark.parametrize("tail", rows.TAILS)
@pytest.mark.parametrize("k", [1, 4, 9])
def test_gradcheck(tail: rows.Tail, k: int) -> None:
    labels = make_labels(0, 3, 9, k)
    y1, y2 = torch.tensor([0, -100, 8]), torch.tensor([0, 3, 1])
    temperature = 1.0 if tail == "sampled" else 2.0

    def loss(x: Tensor) -> Tensor:
        more = {"label_smoothing": 0.1, "targets2_B": y2, "lam": 0.3, "reduction": "none"}
        return kd_loss(x, labels, y1, temperature=temperature, tail=tail, alpha=0.6, **more)

    assert torch.autograd.gradcheck(loss, random_logits(5, 3, 9).requires_grad_())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("tail", TOP_K_TAILS)
def test_all_classes_kept_is_the_dense_kl(temperature: float, tail: rows.Tail) -> None:
    teacher, x = random_logits(1, 5, 13), random_logits(2, 5, 13).requires_grad_()
    labels = SoftLabels.from_logits(teacher, k=13)
    ours = kd_loss(x, labels, temperature=temperature, tail=tail)
    log_q, p = F.log_softmax(x / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    dense = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(dense, x), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_alpha_zero_is_cross_entropy(smoothing: float) -> None:
    x, y = random_logits(3, 6, 11).requires_grad_(), torch.tensor([0, 10, -100, 4, 4, 7])
    ours = kd_loss(x, make_labels(0, 6, 11, 3), y, temperature=2.0, alpha=0.0, label_smoothing=smoothing)
    theirs = F.cross_entropy(x, y, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    tail=st.sampled_from(rows.TAILS),
    k=st.sampled_from([1, 4, 16, 17]),
    shift=st.floats(-1000, 1000),
)
def test_identities(seed: int, tail: rows.Tail, k: int, shift: float) -> None:
    """Gradient rows sum to 0, shifts and the order of the kept entries change nothing, no KL is negative."""
    labels, x = make_labels(seed, 4, 17, k), random_logits(seed, 4, 17).requires_grad_()
    y = torch.tensor([0, 1, -100, 16])

    def loss(x: Tensor, labels: SoftLabels) -> Tensor:
        return kd_loss(x, labels, y, temperature=1.0, tail=tail, alpha=0.5, label_smoothing=0.1, reduction="none")

    ours = loss(x, labels)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(grad.sum(1), torch.zeros(4).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(loss(x + shift, labels), ours, rtol=1e-10, atol=1e-12)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    permuted = dataclasses.replace(labels, ids_BK=labels.ids_BK[:, order], log_p_BK=labels.log_p_BK[:, order])
    torch.testing.assert_close(loss(x, permuted), ours, rtol=1e-12, atol=1e-14)
    assert (kd_loss(x, labels, temperature=1.0, tail=tail, reduction="none") >= -1e-14).all()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), temperature=st.sampled_from(TEMPERATURES))
def test_bucket_is_a_lower_bound_of_the_full_kl(seed: int, k: int, temperature: float) -> None:
    teacher, x = random_logits(seed + 1, 4, 12), random_logits(seed, 4, 12)
    full = SoftLabels.from_logits(teacher, k=12)
    coarse = SoftLabels.from_logits(teacher, k=k, temperatures=TEMPERATURES)
    bucket, dense = (kd_loss(x, labels, temperature=temperature, reduction="none") for labels in (coarse, full))
    assert (bucket <= dense * (1 + 1e-12) + 1e-14).all()


@pytest.mark.parametrize("p_true", [0.3, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("tail", ["bucket", "uniform", "support"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_near_convergence(p_true: float, tail: rows.Tail, temperature: float) -> None:
    """A student within 1e-3 of its teacher still gets a gradient with less than 1 % of relative error in float32."""
    teacher = random_logits(7, 6, 1001, scale=1.0)
    teacher[:, 17] = torch.logsumexp(teacher, 1) + math.log(p_true / (1 - p_true))
    labels = SoftLabels.from_logits(teacher, k=10, temperatures=(1.0, 4.0))
    if tail == "uniform":  # what this tail converges to
        teacher = labels.dense("uniform", temperature=temperature).log() * temperature
    x = (teacher + 1e-3 * random_logits(8, 6, 1001, scale=1.0)).float()
    grads = []
    for dtype in (torch.float32, torch.float64):
        student = x.detach().to(dtype, copy=True).requires_grad_()
        (grad,) = torch.autograd.grad(kd_loss(student, labels, temperature=temperature, tail=tail), student)
        grads.append(grad.double())
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 1e-2
    kept = labels.ids_BK.long()
    ours, exact = grads[0].gather(1, kept), grads[1].gather(1, kept)
    assert float((ours - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("p_true", [0.9, 0.99, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("lam", [1.0, 0.4])
def test_hard_gradient_of_a_nearly_certain_student(p_true: float, lam: float) -> None:
    """1e-6 of the largest gradient in float32, where q - 1 keeps one digit in seven of it."""
    exact = random_logits(7, 6, 101, scale=1.0).float().double()
    exact[:, 17] = torch.logsumexp(exact, 1) + math.log(p_true / (1 - p_true))
    y, y2 = torch.full((6,), 17), torch.tensor([17, 3, 17, 4, 17, -100])
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = exact.float().to(dtype).requires_grad_()
        loss = hard_loss(x, y, targets2_B=y2, lam=lam, reduction="sum")
        grads.append(torch.autograd.grad(loss, x)[0].double())
    scale = grads[1].abs().amax(1, keepdim=True)
    assert ((grads[0] - grads[1]).abs() <= 1e-6 * scale).all()


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_linear_loss_equals_loss_of_logits(data: st.DataObject) -> None:
    seed, k = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([1, 5, 19]))
    tail, alpha = data.draw(st.sampled_from(TOP_K_TAILS)), data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    num_rows = data.draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((num_rows, 6), (19, 6), (19,))
    )
    inputs = [features, weight, *([bias] if data.draw(st.booleans()) else [])]
    labels = make_labels(seed, num_rows, 19, k)
    y = torch.randint(19, (num_rows,), generator=generator)
    args = {"temperature": 2.0, "tail": tail, "alpha": alpha, "reduction": reduction, "label_smoothing": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kddata.losses.linear.CHUNK_ROWS", data.draw(st.sampled_from([1, 4, 512])))
        ours = kd_linear_loss(features, weight, labels, y, bias_C=inputs[2] if len(inputs) > 2 else None, **args)
    whole = kd_loss(F.linear(*inputs), labels, y, **args)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
    for grad, expected in zip(
        torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * whole, inputs), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)
