"""The row kernel as operators for autograd and torch.compile: forward, fresh gradient, gradient made anew in place.

The forward operator writes the gradient for a factor of 1 on the loss, which is what a loss at the end of a graph gets.
Backward starts the same kernel again with the true factors: rows whose factor is 1 return at once, all others are made
from the logits anew, so that a factor never multiplies a rounded value. That costs no sync and, for a factor of 1, no
second pass.

Trade-off: the logits are kept until backward, as cross entropy keeps its log-softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kddata_kernels.count import label_share
from kddata_kernels.launch import Out, Recipe, Rows, launch_kd_rows

# One schema for all three: (tensors in), (numbers in). custom_op reads annotations, so they are spelled out.


@torch.library.custom_op("kddata_kernels::kd_rows", mutates_args=())
def kd_rows(
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None,
    targets: Tensor | None,
    targets_b: Tensor | None,
    lam: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    tail: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    want_grad: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], gradient for a factor of 1 or empty, statistics [3, N] or empty, top-1 [N] or empty)."""
    loss, grad, stats, top1 = _empty(logits, want_grad, want_stats)
    rows, recipe = _prepare(
        logits, ids, log_p, log_tail, targets, targets_b, lam, weights,
        temperature, alpha, tail, label_smoothing, ignore_index, mean,
    )  # fmt: skip
    if want_stats and targets is None:
        stats[1].zero_()
    out = Out(
        loss_N=loss,
        grad_NC=grad if want_grad else None,
        stats_3N=stats if want_stats else None,
        top1_N=top1 if want_stats else None,
    )
    launch_kd_rows(rows, recipe, out)
    return loss, grad, stats, top1


@kd_rows.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(logits, *args[-2:])


@torch.library.custom_op("kddata_kernels::kd_rows_grad", mutates_args=())
def kd_rows_grad(
    grad_out: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None,
    targets: Tensor | None,
    targets_b: Tensor | None,
    lam: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    tail: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """The gradient of (grad_out * loss).sum() with respect to the logits."""
    rows, recipe = _prepare(
        logits, ids, log_p, log_tail, targets, targets_b, lam, weights,
        temperature, alpha, tail, label_smoothing, ignore_index, mean,
    )  # fmt: skip
    grad = _grad_like(logits)
    launch_kd_rows(rows, recipe, Out(grad_NC=grad, grad_out_N=grad_out))
    return grad


@kd_rows_grad.register_fake
def _(grad_out: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return _grad_like(logits)


@torch.library.custom_op("kddata_kernels::kd_rows_regrad", mutates_args=("grad",))
def kd_rows_regrad(
    grad: Tensor,
    grad_out: Tensor,
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None,
    targets: Tensor | None,
    targets_b: Tensor | None,
    lam: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    tail: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> None:
    """Makes `grad`, the gradient for a factor of 1, into that for grad_out; touches no row whose factor is 1."""
    rows, recipe = _prepare(
        logits, ids, log_p, log_tail, targets, targets_b, lam, weights,
        temperature, alpha, tail, label_smoothing, ignore_index, mean,
    )  # fmt: skip
    launch_kd_rows(rows, recipe, Out(grad_NC=grad, grad_out_N=grad_out, skip_ones=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else autograd would fill a [N, C] of zeros for the unused gradient output
    *tensors, ctx.temperature, ctx.alpha, ctx.tail, ctx.label_smoothing, ctx.ignore_index, ctx.mean, ctx.made, _ = (
        inputs
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 15
    if grad_loss is None:
        return None, *nothing
    refuse_double_backward()
    *tensors, grad = ctx.saved_tensors
    numbers = (ctx.temperature, ctx.alpha, ctx.tail, ctx.label_smoothing, ctx.ignore_index, ctx.mean)
    if not ctx.made or graph_is_kept() or type(grad) is not Tensor:  # a tracer's tensors are never changed in place
        return kd_rows_grad(grad_loss, *tensors, *numbers), *nothing
    grad = grad.detach()
    kd_rows_regrad(grad, grad_loss, *tensors, *numbers)
    return grad, *nothing


kd_rows.register_autograd(_backward, setup_context=_setup)


def refuse_double_backward() -> None:
    """Raises RuntimeError under create_graph=True: a second derivative would silently lack its main part."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused losses have no second derivative; got backward with create_graph=True. "
            "Next: use the plain-torch loss where gradients of gradients are needed."
        )


def graph_is_kept() -> bool:
    """Whether this backward runs with retain_graph=True, so that what was saved may be asked for again."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return probe is None or probe()  # unknown: a fresh gradient is always right


def _empty(logits: Tensor, want_grad: bool, want_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, f32 = logits.shape[0], torch.float32
    return (
        logits.new_empty(n, dtype=f32),
        _grad_like(logits) if want_grad else logits.new_empty((0, 0)),
        logits.new_empty((3, n if want_stats else 0), dtype=f32),
        logits.new_empty(n if want_stats else 0, dtype=torch.int32),
    )


def _grad_like(logits: Tensor) -> Tensor:
    """Uninitialised, with the rows of the logits, their padding included, so that both are read and written alike."""
    n, c = logits.shape
    stride = logits.stride(0)
    return logits.new_empty((n, stride if c < stride < c + 128 else c))[:, :c]


def _prepare(
    logits: Tensor,
    ids: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None,
    targets: Tensor | None,
    targets_b: Tensor | None,
    lam: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    alpha: float,
    tail: str,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> tuple[Rows, Recipe]:
    share = None
    if mean and targets is not None and alpha != 1 and len(logits):
        share = label_share(targets, targets_b, ignore_index=ignore_index, numerator=1.0)
    rows = Rows(
        logits_NC=logits,
        ids_NK=ids,
        log_p_NK=log_p,
        log_tail_N=log_tail,
        targets_N=targets,
        targets_b_N=targets_b,
        lam_N=lam,
        weights_N=weights,
        ce_scale=share,
    )
    recipe = Recipe(
        temperature=temperature,
        alpha=alpha,
        tail=tail,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        kd_scale=1.0 / max(1, len(logits)) if mean else 1.0,
        ce_scale=1.0,
    )
    return rows, recipe
