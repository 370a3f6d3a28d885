"""Distillation straight from features and classifier: the logits of all rows never exist at once.

Trade-off: gradients are made in the forward pass, chunk by chunk, so per-row losses are not offered.

Shapes: B rows, D embedding width, C classes, K kept classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.fused import Backend, fused_kd_linear_loss, kernels_for
from kddata.losses.kd import KDArgs, check_batch, kd_terms
from kddata.losses.rows import HardTerm, SoftTerm, Tail, chunks, compute_dtype, loss_and_grad, take

CHUNK_ROWS = 512


def kd_linear_loss(
    features_BD: Tensor,
    weight_CD: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    bias_C: Tensor | None = None,
    temperature: float,
    tail: Tail = "bucket",
    alpha: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    targets2_B: Tensor | None = None,
    lam: float | Tensor = 1.0,
    weights_B: Tensor | None = None,
    backend: Backend = "auto",
    debug: bool = False,
) -> Tensor:
    """`kd_loss(F.linear(features, weight, bias), labels, targets, ...)` without holding the logits of all rows.

    Arguments, formula and errors are those of `kd_loss`. Differentiable once in features, weight and bias, whose
    gradients are summed in float32 at least. Under autocast, features and classifier are cast as F.linear's are.

    Raises ConfigError also for features and a classifier that do not fit each other, and for reduction "none": the
    gradient of the weight is summed over rows before any per-row factor could be known.
    """
    args = KDArgs(
        temperature=temperature,
        tail=tail,
        alpha=alpha,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        targets2_B=targets2_B,
        lam=lam,
        weights_B=weights_B,
        backend=backend,
        debug=debug,
    )
    if reduction == "none":
        raise ConfigError("reduction of kd_linear_loss is mean or sum", actual="'none'")
    parts = [features_BD, weight_CD] + ([] if bias_C is None else [bias_C])
    kind = features_BD.device.type
    if torch.is_autocast_enabled(kind):
        parts = [part.to(torch.get_autocast_dtype(kind)) for part in parts]
    shapes = [tuple(part.shape) for part in parts]
    fits = features_BD.ndim == weight_CD.ndim == 2 and shapes[0][1] == shapes[1][1]
    if not fits or shapes[2:] not in ([], [shapes[1][:1]]) or len({(part.dtype, part.device) for part in parts}) > 1:
        raise ConfigError(
            "features [B, D], weight [C, D] and bias [C] share D, C, dtype and device",
            actual=", ".join(f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in parts),
        )
    logits_BC = parts[0].detach()[:, :1].expand(-1, len(weight_CD))  # their shape, dtype and device, without memory
    check_batch(logits_BC, labels, targets_B, args)
    inputs = (parts[0], parts[1], parts[2] if len(parts) > 2 else None)
    kernels = kernels_for(backend, logits_BC, labels)
    if kernels is not None:
        return fused_kd_linear_loss(kernels, *inputs, labels, targets_B, args)
    soft, hard = kd_terms(logits_BC, labels, targets_B, args)
    return _LinearLoss.apply(*inputs, soft, hard)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_BD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, soft: SoftTerm, hard: HardTerm
    ) -> Tensor:
        dtype = compute_dtype(features_BD.dtype)
        inputs = (features_BD, weight_CD, bias_C)
        grads = [
            torch.zeros_like(x, dtype=dtype) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        loss = features_BD.new_zeros((), dtype=dtype)
        with torch.autocast(features_BD.device.type, enabled=False):
            for rows in chunks(len(features_BD), CHUNK_ROWS):
                logits = F.linear(features_BD[rows], weight_CD, bias_C)
                grad_bC = torch.empty_like(logits, dtype=dtype) if any(g is not None for g in grads) else None
                terms = (take(soft, rows) if soft else None, take(hard, rows) if hard else None)
                loss += loss_and_grad(logits, *terms, grad_BC=grad_bC, stats=False)[0].sum()
                if grad_bC is None:
                    continue
                top = grad_bC.abs().amax().clamp_min(torch.finfo(dtype).tiny)  # keeps float16 from underflow
                factor = (grad_bC / top).to(features_BD.dtype)
                if grads[0] is not None:
                    grads[0][rows] = (factor @ weight_CD).to(dtype) * top
                if grads[1] is not None:
                    grads[1] += (factor.T @ features_BD[rows]).to(dtype) * top
                if grads[2] is not None:
                    grads[2] += grad_bC.sum(0)
        ctx.save_for_backward(*grads)
        ctx.input_dtype = features_BD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        grads = [None if g is None else (g * grad_loss).to(ctx.input_dtype) for g in ctx.saved_tensors]
        return *grads, None, None
