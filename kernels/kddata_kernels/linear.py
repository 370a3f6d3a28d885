"""The distillation loss of a linear classifier without its logits: features x weight, a chunk of rows at a time.

One buffer holds the logits of a chunk; the row kernel turns them into their own gradient in place; three matrix
products give what flows on. Gradients of weight and bias are summed over the chunks in float32 and rounded once.

Trade-off: all gradients are made in the forward pass (and only where they are wanted), so that nothing is computed
twice; the price is that `reduction="none"` has no place here. Weights of rows do what a per-row factor would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kddata_kernels.checks import check_classes, check_numbers, check_rows, reject
from kddata_kernels.count import label_share
from kddata_kernels.launch import Out, Recipe, Rows, launch_kd_rows
from kddata_kernels.ops import refuse_double_backward

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def kd_linear_loss(
    features_ND: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor | None,
    targets_N: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    tail: str = "bucket",
    targets_b_N: Tensor | None = None,
    lam_N: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weights_N: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int = 2048,
    debug: bool = False,
) -> Tensor:
    """`kd_loss(features @ weight.T + bias, ...)`, float32, holding the logits of `chunk_rows` rows at a time.

    Features and weight share a dtype (under autocast both are cast to its dtype, as by F.linear); logits are rounded
    to it, as they would be. Gradients flow to features, weight and bias.

    Raises ValueError for shapes, dtypes, devices or numbers outside the rules, naming the rule.
    """
    check_numbers(
        temperature=temperature,
        alpha=alpha,
        tail=tail,
        label_smoothing=label_smoothing,
        reduction=reduction,
        reductions=("mean", "sum"),
    )
    device = features_ND.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        features_ND, weight_CD = features_ND.to(dtype), weight_CD.to(dtype)
        bias_C = None if bias_C is None else bias_C.to(dtype)
    _check_linear(features_ND, weight_CD, bias_C, chunk_rows)
    num_rows, num_classes = features_ND.shape[0], weight_CD.shape[0]
    if isinstance(lam_N, float):
        lam_N = torch.full((num_rows,), lam_N, device=device)
    check_rows(
        num_rows,
        num_classes,
        device,
        ids_NK,
        log_p_NK,
        log_tail_N,
        tail=tail,
        targets_N=targets_N,
        targets_b_N=targets_b_N,
        lam_N=lam_N,
        weights_N=weights_N,
        needs_targets=alpha < 1,
    )
    if debug:
        check_classes(num_classes, ids_NK, (targets_N, targets_b_N), ignore_index)
    grad = torch.is_grad_enabled()
    loss, _, _, _ = kd_linear(
        features_ND,
        weight_CD,
        bias_C,
        ids_NK,
        log_p_NK,
        log_tail_N,
        targets_N,
        targets_b_N,
        lam_N,
        weights_N,
        float(temperature),
        float(alpha),
        tail,
        float(label_smoothing),
        ignore_index,
        reduction == "mean",
        chunk_rows,
        [grad and x is not None and x.requires_grad for x in (features_ND, weight_CD, bias_C)],
    )
    return loss


@torch.library.custom_op("kddata_kernels::kd_linear", mutates_args=())
def kd_linear(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    chunk_rows: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, float32 gradients of features, weight and bias; N times too large for the mean; empty where not wanted).

    The factor of 1 / N waits for backward, where values are float32: fp16 logit gradients would underflow with it.
    """
    num_rows, num_classes = features.shape[0], weight.shape[0]
    scale = 1.0 / max(1, num_rows) if mean else 1.0
    d_features, d_weight, d_bias = _empty_grads(features, weight, bias, wanted)
    loss_N = features.new_empty(num_rows, dtype=torch.float32)
    share = None
    if mean and targets is not None and alpha != 1 and num_rows:
        share = label_share(targets, targets_b, ignore_index=ignore_index, numerator=float(num_rows))
    recipe = Recipe(
        temperature=temperature,
        alpha=alpha,
        tail=tail,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        kd_scale=1.0,
        ce_scale=1.0,
    )
    buffer = features.new_empty((min(chunk_rows, num_rows), -(-num_classes // 8) * 8))  # rows start aligned
    for start in range(0, num_rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, num_rows))
        x = features[part]
        z = buffer[: len(x), :num_classes]
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        rows = Rows(
            logits_NC=z,
            ids_NK=ids[part],
            log_p_NK=log_p[part],
            log_tail_N=None if log_tail is None else log_tail[part],
            targets_N=None if targets is None else targets[part],
            targets_b_N=None if targets_b is None else targets_b[part],
            lam_N=None if lam is None else lam[part],
            weights_N=None if weights is None else weights[part],
            ce_scale=share,
        )
        launch_kd_rows(rows, recipe, Out(loss_N=loss_N[part], grad_NC=z if any(wanted) else None))
        if wanted[0]:
            matmul_float32(z, weight, out=d_features[part], add=False)
        if wanted[1]:
            matmul_float32(z.t(), x, out=d_weight, add=start > 0)
        if wanted[2]:
            d_bias += z.sum(0, dtype=torch.float32)
    if num_rows == 0:
        d_weight.zero_()
    return loss_N.sum() * scale, d_features, d_weight, d_bias


@kd_linear.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return features.new_empty((), dtype=torch.float32), *_empty_grads(features, weight, bias, args[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weight, bias = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.scale = 1.0 / max(1, features.shape[0]) if inputs[-3] else 1.0
    ctx.dtypes = [None if x is None else x.dtype for x in (features, weight, bias)]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 15
    if grad_loss is None:
        return None, None, None, *nothing
    refuse_double_backward()
    factor = grad_loss * ctx.scale
    grads = [
        torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
        if ctx.needs_input_grad[i] and dtype is not None
        else None
        for i, (grad, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True))
    ]
    return *grads, *nothing


kd_linear.register_autograd(_backward, setup_context=_setup)


def matmul_float32(a: Tensor, b: Tensor, *, out: Tensor, add: bool) -> None:
    """out (+)= a @ b with a float32 `out`, whatever the dtype of a and b, without a copy of them on CUDA."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=float(add), out=out)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=float(add), out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=float(add), out=out)


def _empty_grads(
    features: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    f32 = torch.float32
    return (
        features.new_empty(features.shape if wanted[0] else (0, 0), dtype=f32),
        weight.new_empty(weight.shape if wanted[1] else (0, 0), dtype=f32),
        weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=f32),
    )


def _check_linear(features: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> None:
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        shapes = f"{tuple(features.shape)} and {tuple(weight.shape)}"
        raise reject("features are [N, D] and weight is [C, D]", shapes, "check the classifier")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise reject(f"bias is [C] with C = {weight.shape[0]}", tuple(bias.shape), "check the classifier")
    for name, x in (("features", features), ("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype not in _FLOATS or x.dtype != features.dtype):
            raise reject(
                "features, weight and bias share one of bfloat16, float16, float32", x.dtype, f"convert {name}"
            )
        if x is not None and x.device != features.device:
            raise reject(f"{name} lies where the features lie, on {features.device}", x.device, f"{name}.to(...)")
    if chunk_rows < 1:
        raise reject("a chunk has at least 1 row", chunk_rows, "2048 or more keep the matrix products efficient")
