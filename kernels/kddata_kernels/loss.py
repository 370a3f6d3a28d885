"""The public fused loss: arguments checked, one operator, one sum."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from kddata_kernels.checks import check_classes, check_logits, check_numbers, check_rows
from kddata_kernels.ops import kd_rows


class KDStats(NamedTuple):
    """Per-row facts that cost no further pass, detached, unscaled and unweighted. Shapes [N]."""

    kl: Tensor  # KL of the chosen tail at temperature T, nats, without T^2
    ce: Tensor  # hard cross entropy, nats; 0 where the row has no label
    tail: Tensor  # the student's softmax mass at T outside ids
    top1: Tensor  # int32: the student's most probable class, the lowest of equal ones; -1 for a row of NaN


@overload
def kd_loss(logits_NC: Tensor, ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor | None, targets_N: Tensor | None = ..., *, temperature: float = ..., alpha: float = ..., tail: str = ..., targets_b_N: Tensor | None = ..., lam_N: Tensor | float | None = ..., label_smoothing: float = ..., ignore_index: int = ..., weights_N: Tensor | None = ..., reduction: str = ..., stats: Literal[False] = ..., recompute: bool = ..., debug: bool = ...) -> Tensor: ...  # fmt: skip  # noqa: E501
@overload
def kd_loss(logits_NC: Tensor, ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor | None, targets_N: Tensor | None = ..., *, temperature: float = ..., alpha: float = ..., tail: str = ..., targets_b_N: Tensor | None = ..., lam_N: Tensor | float | None = ..., label_smoothing: float = ..., ignore_index: int = ..., weights_N: Tensor | None = ..., reduction: str = ..., stats: Literal[True], recompute: bool = ..., debug: bool = ...) -> tuple[Tensor, KDStats]: ...  # fmt: skip  # noqa: E501
def kd_loss(
    logits_NC: Tensor,
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
    stats: bool = False,
    recompute: bool = False,
    debug: bool = False,
) -> Tensor | tuple[Tensor, KDStats]:
    """The distillation loss, float32; see the package's docstring for meaning and shapes.

    Args:
        stats: also return `KDStats`.
        recompute: leave the gradient to backward, instead of making it beside the loss. Moves 6 bytes for each bf16
            logit instead of 4, and instead of 8 where the loss is scaled before backward (GradScaler, loss / steps).
            torch.compile always takes this way.
        debug: also look for ids that repeat and classes out of range; waits for the device.

    Raises ValueError for shapes, dtypes, devices, strides or numbers outside the rules, naming the rule.
    """
    check_numbers(
        temperature=temperature,
        alpha=alpha,
        tail=tail,
        label_smoothing=label_smoothing,
        reduction=reduction,
        reductions=("mean", "sum", "none"),
    )
    check_logits(logits_NC)
    if isinstance(lam_N, float):
        lam_N = torch.full((logits_NC.shape[0],), lam_N, device=logits_NC.device)
    check_rows(
        logits_NC.shape[0],
        logits_NC.shape[1],
        logits_NC.device,
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
        check_classes(logits_NC.shape[1], ids_NK, (targets_N, targets_b_N), ignore_index)
    wanted = torch.is_grad_enabled() and logits_NC.requires_grad
    loss_N, _, stats_3N, top1_N = kd_rows(
        logits_NC,
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
        wanted and not recompute and not torch.compiler.is_compiling(),
        stats,
    )
    loss = loss_N if reduction == "none" else loss_N.sum()
    return (loss, KDStats(stats_3N[0], stats_3N[1], stats_3N[2], top1_N)) if stats else loss
