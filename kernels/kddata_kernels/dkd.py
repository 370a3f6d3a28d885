"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7) on labels that keep every class.

    loss_i = w T^2 (alpha KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta KL(p^ || q^))

with p^ and q^ renormalised over the classes other than the target y; 0 for a row without a label. It needs all of the
teacher's probabilities, so K = C, at most 4096 classes: there a row is a few kilobytes, and gathering is its only pass.

Trade-off: forward makes the loss and backward starts the kernel again for the gradient; rows are short enough that the
second launch costs more than the second read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kddata_kernels.checks import check_classes, check_logits, check_numbers, check_rows, reject
from kddata_kernels.count import label_share
from kddata_kernels.dense import finite
from kddata_kernels.ops import refuse_double_backward
from kddata_kernels.plan import next_power_of_2


@triton.jit(
    do_not_specialize=["logits_stride", "grad_stride", "ids_stride", "log_p_stride", "grad_out_stride", "N", "C"]
)
def dkd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    logits_stride,
    grad_ptr,
    grad_stride,
    ids_ptr,
    ids_stride,
    log_p_ptr,
    log_p_stride,
    targets_ptr,
    weights_ptr,
    share_ptr,
    grad_out_ptr,
    grad_out_stride,
    loss_ptr,
    N,
    C,
    inv_t,
    alpha,
    beta,
    ignore_index,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < N
    j = tl.arange(0, BLOCK)
    mask = live[:, None] & (j < C)[None, :]
    y = tl.load(targets_ptr + row, mask=live, other=ignore_index).to(tl.int64)
    has = y != ignore_index
    wide_ids = tl.load(ids_ptr + row[:, None] * ids_stride + j[None, :], mask=mask, other=0).to(tl.int64)
    known = mask & (wide_ids >= 0) & (wide_ids < C)
    logits_row = logits_ptr + row * logits_stride
    x = tl.load(logits_row[:, None] + wide_ids, mask=known, other=float("-inf")).to(tl.float32)
    x = tl.where(mask & (known == 0), float("nan"), x)
    log_p = tl.load(log_p_ptr + row[:, None] * log_p_stride + j[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    hit = mask & (wide_ids == y[:, None])
    scale = tl.load(share_ptr) if share_ptr is not None else 1.0
    weight = tl.where(has, scale, 0.0)
    if weights_ptr is not None:
        weight *= tl.load(weights_ptr + row, mask=live, other=0.0)

    # The classes other than the target keep a reference of their own: exact where the target has all the mass.
    x_y = tl.max(tl.where(hit, x, float("-inf")), 1)
    m_n = tl.max(tl.where(hit, float("-inf"), x), 1)
    ref_n = finite(m_n)
    e = tl.where(hit, 0.0, tl.exp((x - ref_n[:, None]) * inv_t))
    s_n = tl.sum(e, 1)
    ref = tl.maximum(m_n, x_y)
    e_y = tl.exp((x_y - ref) * inv_t)
    from_n = tl.exp((m_n - ref) * inv_t)
    s = e_y + s_n * from_n
    log_q_y = (x_y - ref) * inv_t - tl.log(s)
    log_q_n = (m_n - ref) * inv_t + tl.log(s_n) - tl.log(s)

    ref_p = finite(tl.max(log_p, 1))
    log_p -= (ref_p + tl.log(tl.sum(tl.exp(log_p - ref_p[:, None]), 1)))[:, None]
    log_p_y = tl.max(tl.where(hit, log_p, float("-inf")), 1)
    ref_r = finite(tl.max(tl.where(hit, float("-inf"), log_p), 1))
    r = tl.where(hit, 0.0, tl.exp(log_p - ref_r[:, None]))
    s_r = tl.sum(r, 1)
    log_p_n = ref_r + tl.log(s_r)
    p_y = tl.exp(log_p_y)
    p_n = tl.exp(log_p_n)
    q_y = e_y / s
    q_n = s_n * from_n / s
    gap = tl.where((q_y > 0.5) & (p_y > 0.5), p_n - q_n, q_y - p_y)  # the difference of what is small
    r = tl.where(r == 0.0, 0.0, r / s_r[:, None])
    if loss_ptr is not None:
        target = tl.where(p_y == 0.0, 0.0, p_y * (log_p_y - log_q_y)) + tl.where(
            p_n == 0.0, 0.0, p_n * (log_p_n - log_q_n)
        )
        log_q = (x - ref_n[:, None]) * inv_t - tl.log(s_n)[:, None]
        others = tl.sum(tl.where(r == 0.0, 0.0, r * (log_p - log_p_n[:, None] - log_q)), 1)
        inside = has & (y >= 0) & (y < C)
        loss = weight * (alpha * target + beta * others) / (inv_t * inv_t)
        tl.store(loss_ptr + row, tl.where(inside, loss, tl.where(has, float("nan"), 0.0)), mask=live)
    if grad_ptr is not None:
        factor = weight * tl.load(grad_out_ptr + row * grad_out_stride, mask=live, other=0.0) / inv_t
        soft = e / s_n[:, None]
        g = beta * (soft - r) - alpha * gap[:, None] * soft
        g = tl.where(hit, alpha * gap[:, None], g)
        g = tl.where(has[:, None], factor[:, None] * g, 0.0)
        tl.store(grad_ptr + row[:, None] * grad_stride + wide_ids, g.to(grad_ptr.dtype.element_ty), mask=known)


def dkd_loss(
    logits_NC: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    ignore_index: int = -100,
    weights_N: Tensor | None = None,
    reduction: str = "mean",
    debug: bool = False,
) -> Tensor:
    """The loss of the module docstring, float32; `mean` divides by the rows that have a label, at least 1.

    Raises ValueError for K below C, for more than 4096 classes, and for shapes, dtypes, devices or numbers outside the
    rules, naming the rule.
    """
    check_numbers(
        temperature=temperature,
        alpha=1.0,
        tail="renorm",
        label_smoothing=0.0,
        reduction=reduction,
        reductions=("mean", "sum", "none"),
    )
    check_logits(logits_NC)
    num_rows, num_classes = logits_NC.shape
    if ids_NK.ndim != 2 or ids_NK.shape[1] != num_classes:
        raise reject("DKD needs every class of the teacher, K = C", tuple(ids_NK.shape), "label with k = num_classes")
    check_rows(
        num_rows,
        num_classes,
        logits_NC.device,
        ids_NK,
        log_p_NK,
        None,
        tail="renorm",
        targets_N=targets_N,
        weights_N=weights_N,
        needs_targets=True,
    )
    if debug:
        check_classes(num_classes, ids_NK, (targets_N,), ignore_index)
    numbers = (float(temperature), float(alpha), float(beta), ignore_index, reduction == "mean")
    loss_N = dkd_rows(logits_NC, ids_NK, log_p_NK, targets_N, weights_N, *numbers)
    return loss_N if reduction == "none" else loss_N.sum()


@torch.library.custom_op("kddata_kernels::dkd_rows", mutates_args=())
def dkd_rows(
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The loss of each row."""
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    _launch(logits, ids, log_p, targets, weights, temperature, alpha, beta, ignore_index, mean, loss=loss)
    return loss


@torch.library.custom_op("kddata_kernels::dkd_rows_grad", mutates_args=())
def dkd_rows_grad(
    grad_out: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The gradient of (grad_out * loss).sum() with respect to the logits."""
    grad = logits.new_empty(logits.shape)
    _launch(
        logits, ids, log_p, targets, weights, temperature, alpha, beta, ignore_index, mean, grad=grad, grad_out=grad_out
    )
    return grad


@dkd_rows.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@dkd_rows_grad.register_fake
def _(grad_out: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    return dkd_rows_grad(grad_loss, *ctx.saved_tensors, *ctx.numbers), *(None,) * 9


dkd_rows.register_autograd(_backward, setup_context=_setup)


def _launch(
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    ignore_index: int,
    mean: bool,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> None:
    num_rows, num_classes = logits.shape
    if num_rows == 0:
        return
    share = label_share(targets, None, ignore_index=ignore_index, numerator=1.0) if mean else None
    block = max(32, next_power_of_2(num_classes))
    rows = max(1, 1024 // block)
    with torch.cuda.device_of(logits):
        dkd_kernel[(triton.cdiv(num_rows, rows),)](
            logits_ptr=logits,
            logits_stride=logits.stride(0),
            grad_ptr=grad,
            grad_stride=0 if grad is None else grad.stride(0),
            ids_ptr=ids,
            ids_stride=ids.stride(0),
            log_p_ptr=log_p,
            log_p_stride=log_p.stride(0),
            targets_ptr=targets,
            weights_ptr=weights,
            share_ptr=share,
            grad_out_ptr=grad_out,
            grad_out_stride=0 if grad_out is None else grad_out.stride(0),
            loss_ptr=loss,
            N=num_rows,
            C=num_classes,
            inv_t=1.0 / temperature,
            alpha=alpha,
            beta=beta,
            ignore_index=ignore_index,
            R=rows,
            BLOCK=block,
            num_warps=max(4, rows * block // 256),
            enable_fp_fusion=True,
        )
