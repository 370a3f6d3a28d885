"""Loss and gradient of every row in plain torch: what the fused kernels compute, in the clear, on any device.

Everything is computed in float32 (float64 for float64 logits) in chunks of rows, with the gradient written out by
hand: `q - p` formed once in high precision stays right when the student has nearly reached the teacher, and no
log-softmax tensor is kept. Trade-off: the gradient is kept between forward and backward, in that precision.

Shapes: B rows, b rows of one chunk, C classes, K kept classes. In a row x are logits shifted so that their largest
is 0, z = x / T, q = softmax(z), S the kept classes, p the teacher at T, P and Q the sums over S of p and q,
p_t = 1 - P and q_t = 1 - Q the tail masses. Natural logarithms.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tail = Literal["bucket", "renorm", "uniform", "support", "sampled"]
TAILS: tuple[Tail, ...] = ("bucket", "renorm", "uniform", "support", "sampled")

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one temporary: within a core's cache; enough to fill a GPU


@dataclass(frozen=True, kw_only=True)
class SoftTerm:
    """weight_B * KL(teacher_T || student_T), with the tail treated as named.

    `log_p_BK` and `log_tail_B` are at the temperature, as from `SoftLabels.at`.
    """

    ids_BK: Tensor
    log_p_BK: Tensor
    log_tail_B: Tensor
    temperature: float
    tail: Tail
    weight_B: Tensor


@dataclass(frozen=True, kw_only=True)
class HardTerm:
    """weight_B * sum_j share_Bj * CE(student_1, targets_Bj): one target a row, or a mixup pair.

    An ignored target has share 0 and any valid class id.
    """

    targets_BJ: Tensor
    share_BJ: Tensor
    label_smoothing: float
    weight_B: Tensor


Term = TypeVar("Term", SoftTerm, HardTerm)


class RowStats(NamedTuple):
    """Of each row, detached: for logging without another pass over the logits. NaN where there is no such term.

    kl_B is the soft term without T^2 and weights; ce_B the hard term without weights (0 where ignored); tail_B the
    student's mass at T outside the kept classes; top1_B its most probable class.
    """

    kl_B: Tensor
    ce_B: Tensor
    tail_B: Tensor
    top1_B: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 at least; float64 when given float64."""
    return torch.promote_types(dtype, torch.float32)


def row_losses(
    logits_BC: Tensor, soft: SoftTerm | None, hard: HardTerm | None, *, stats: bool = False
) -> tuple[Tensor, RowStats | None]:
    """(loss_B, statistics): the weighted sum of the terms in every row, differentiable once in the logits alone."""
    loss_B, *rest = _RowLosses.apply(logits_BC, soft, hard, stats)
    return loss_B, RowStats(*rest) if stats else None


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, soft: SoftTerm | None, hard: HardTerm | None, stats: bool) -> Any:
        grad_BC = None
        if ctx.needs_input_grad[0]:
            grad_BC = torch.empty_like(logits_BC, dtype=compute_dtype(logits_BC.dtype))
            ctx.save_for_backward(grad_BC)
        loss_B, found = loss_and_grad(logits_BC, soft, hard, grad_BC=grad_BC, stats=stats)
        ctx.mark_non_differentiable(*found or ())
        ctx.logits_dtype = logits_BC.dtype
        return loss_B, *(found or ())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_B: Tensor, *_: Any) -> Any:
        (grad_BC,) = ctx.saved_tensors
        return (grad_BC * grad_loss_B[:, None]).to(ctx.logits_dtype), None, None, None


@torch.no_grad()
def loss_and_grad(
    logits_BC: Tensor, soft: SoftTerm | None, hard: HardTerm | None, *, grad_BC: Tensor | None, stats: bool
) -> tuple[Tensor, RowStats | None]:
    """Loss of each row and statistics; d loss_B / d logits_BC is written to every element of `grad_BC`, if given."""
    num_rows, num_classes = logits_BC.shape
    loss_B = logits_BC.new_zeros(num_rows, dtype=compute_dtype(logits_BC.dtype))
    nan_B = loss_B.new_full((num_rows if stats else 0,), math.nan)
    found = RowStats(nan_B, nan_B.clone(), nan_B.clone(), nan_B.long()) if stats else None
    step = max(1, CHUNK_ELEMENTS["cpu" if logits_BC.device.type == "cpu" else "cuda"] // max(1, num_classes))
    for rows in chunks(num_rows, step):
        x = logits_BC[rows].to(loss_B.dtype)
        x = x - x.amax(1, keepdim=True)  # exact for near values, so that no large logit costs precision later
        grad = x.new_zeros(x.shape) if grad_BC is not None else None
        if found is not None:
            found.top1_B[rows] = x.argmax(1)
        if soft is not None:
            part = take(soft, rows)
            kl, q_t, grad_z = _soft(x, part, want_grad=grad is not None, want_tail=stats)
            loss_B[rows] += part.weight_B * kl
            if found is not None and q_t is not None:
                found.kl_B[rows], found.tail_B[rows] = kl, q_t
            if grad_z is not None:
                grad = grad_z.mul_(part.weight_B[:, None] / part.temperature)
        if hard is not None:
            pair = take(hard, rows)
            ce = _hard(x, pair, add_grad_to=grad)
            loss_B[rows] += pair.weight_B * ce
            if found is not None:
                found.ce_B[rows] = ce
        if grad_BC is not None and grad is not None:
            grad_BC[rows] = grad
    return loss_B, found


def chunks(num_rows: int, step: int) -> list[slice]:
    """Ranges of at most `step` rows that cover all rows."""
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def take(term: Term, rows: slice) -> Term:
    """Some rows of a term."""
    fields = {field.name: getattr(term, field.name) for field in dataclasses.fields(term)}
    parts: dict[str, Any] = {key: x[rows] for key, x in fields.items() if isinstance(x, Tensor)}
    return dataclasses.replace(term, **parts)


def _soft(
    x: Tensor, term: SoftTerm, *, want_grad: bool, want_tail: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(KL_b, q_t, d KL / d z) of a chunk. The gradient on S is q - p; off S it differs from tail to tail."""
    ids, log_p, log_tail = term.ids_BK.long(), term.log_p_BK.to(x.dtype), term.log_tail_B.to(x.dtype)
    z = x / term.temperature
    z_S = z.gather(1, ids)
    if term.tail in ("renorm", "support", "sampled"):
        log_p = log_p.log_softmax(1)
    p = log_p.exp()
    if term.tail == "support":  # no pass over the other classes
        log_q = z_S.log_softmax(1)
        grad = torch.zeros_like(z).scatter_(1, ids, _kept_grad(log_q.exp(), p, 0.0)) if want_grad else None
        log_q_t = _split(z, ids, z_S)[1] if want_tail else None
        return _kl(p, log_p, log_q).sum(1), None if log_q_t is None else log_q_t.exp(), grad

    num_off = max(1, z.shape[1] - ids.shape[1])  # where k = C nothing is off, and its mass is 0
    sum_off = z.scatter(1, ids, 0).sum(1) if term.tail == "uniform" else None
    lse, log_q_t, r = _split(z, ids, z_S)
    log_q = z_S - lse[:, None]
    q_t, p_t = log_q_t.exp(), log_tail.exp()
    loss, off = _kl(p, log_p, log_q).sum(1), q_t
    if term.tail == "bucket":
        # q_off (1 - p_t / q_t) = r (q_t - p_t): no division by a q_t that may be 0
        loss, off = loss + _kl(p_t, log_tail, log_q_t), q_t - p_t
    elif sum_off is not None:
        loss = loss + _kl(p_t, log_tail - math.log(num_off), sum_off / num_off - lse)
    if not want_grad:
        return loss, q_t, None
    grad = r.mul_(off[:, None])
    if term.tail == "uniform":
        grad.sub_((p_t / num_off)[:, None])
        off = q_t - p_t
    return loss, q_t, grad.scatter_(1, ids, _kept_grad(log_q.exp(), p, off))


def _kept_grad(q: Tensor, p: Tensor, off: Tensor | float) -> Tensor:
    """q - p, in a row whose sum with `off`, the gradient's sum over the other classes, is 0.

    A class that both hold probable takes minus the sum of the rest: near 1, q - p keeps no digits when it is small.
    """
    grad = q - p
    sure = (q > 0.5) & (p > 0.5)  # one class in a row at most
    rest = grad.masked_fill(sure, 0.0).sum(1) + off
    return torch.where(sure, -rest[:, None], grad)


def _split(z: Tensor, ids: Tensor, z_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp of z, log q_t, softmax r over the classes off S and 0 on S). Overwrites z.

    The tail is summed from its own classes, never 1 - Q, and against its own largest logit: it may underflow beside Q.
    """
    top = z.scatter_(1, ids, -math.inf).amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
    r = z.sub_(top).exp_()
    total = r.sum(1, keepdim=True)
    lse_off = (top + total.log())[:, 0]  # -inf where nothing is off S
    lse = torch.logaddexp(z_S.logsumexp(1), lse_off)
    return lse, lse_off - lse, r.div_(total.clamp_min(torch.finfo(z.dtype).tiny))


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0, +inf where only q is."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def _hard(x: Tensor, term: HardTerm, *, add_grad_to: Tensor | None) -> Tensor:
    """Sum of share * CE in each row of a chunk; its gradient times the row's weight is added in place."""
    targets, share, smooth = term.targets_BJ, term.share_BJ, term.label_smoothing
    share_sum = share.sum(1)
    q = x.exp()
    total = q.sum(1)
    lse = total.log()
    one_hot = share * (1 - smooth)
    ce = torch.where(one_hot > 0, one_hot * (lse[:, None] - x.gather(1, targets)), 0.0).sum(1)
    if smooth:
        ce = ce + torch.where(share_sum > 0, smooth * share_sum * (lse - x.mean(1)), 0.0)
    if add_grad_to is not None:
        sure = q.gather(1, targets) > 0.5 * total[:, None]
        q.mul_((share_sum / total)[:, None])
        if smooth:
            q.sub_((smooth / x.shape[1] * share_sum)[:, None])
        q.scatter_add_(1, targets, -one_hot)  # both targets of a mixup pair may be one class
        # as in _kept_grad: a target that is nearly certain takes minus the sum of the rest
        likely = targets.gather(1, sure.int().argmax(1, keepdim=True))
        plain = q.gather(1, likely)
        rest = q.scatter_(1, likely, 0.0).sum(1, keepdim=True)
        q.scatter_(1, likely, torch.where(sure.any(1, keepdim=True), -rest, plain))
        add_grad_to.add_(q.mul_(term.weight_B[:, None]))
    return ce
