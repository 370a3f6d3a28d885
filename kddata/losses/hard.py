"""Cross-entropy with ground truth: the hard term of distillation, and the baseline that distillation must beat.

Shapes: B rows, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kddata.errors import ConfigError
from kddata.losses.rows import HardTerm, compute_dtype, row_losses

Reduction = Literal["mean", "sum", "none"]


def hard_loss(
    student_logits_BC: Tensor,
    targets_B: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    targets2_B: Tensor | None = None,
    lam: float | Tensor = 1.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy at temperature 1; F.cross_entropy with the mixup pair and row weights that it lacks.

        CE_i = lam_i CE(x_i, targets_i) + (1 - lam_i) CE(x_i, targets2_i),   an ignored target's part being 0
        none = [w_i CE_i],  sum = sum_i w_i CE_i,  mean = sum / (rows of which not every target is ignored)

    So mean is that of F.cross_entropy; weights stay out of its denominator, and where all are ignored it is 0, not NaN.

    Args:
        student_logits_BC: floating point; computed in float32 at least, float64 when given float64.
        targets_B: int64 class ids, or `ignore_index`.
        reduction: mean, sum or none ([B]).
        label_smoothing: as in F.cross_entropy.
        targets2_B, lam: the second target of a mixup pair; lam is the first one's share, a number or [B].
        weights_B: of the rows; all 1 by default.

    Raises ConfigError for shapes, dtypes or devices that do not fit, and on CPU for target ids out of range.
    """
    check_logits(student_logits_BC)
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError("reduction is one of mean, sum, none", actual=repr(reduction))
    if not 0 <= label_smoothing <= 1:
        raise ConfigError("label_smoothing is between 0 and 1", actual=label_smoothing)
    hard = hard_term(
        student_logits_BC,
        targets_B,
        factor=1.0,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        targets2_B=targets2_B,
        lam=lam,
        weights_B=weights_B,
    )
    loss_B, _ = row_losses(student_logits_BC, None, hard)
    return loss_B if reduction == "none" else loss_B.sum()


def hard_term(
    logits_BC: Tensor,
    targets_B: Tensor,
    *,
    factor: float,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    targets2_B: Tensor | None,
    lam: float | Tensor,
    weights_B: Tensor | None,
    check_ids: bool = False,
) -> HardTerm:
    """factor * CE under a reduction, checked, as a weight for each row; the arguments are those of `hard_loss`."""
    dtype, device = compute_dtype(logits_BC.dtype), logits_BC.device
    pair = [targets_B] if targets2_B is None else [targets_B, targets2_B]
    for name, ids in zip(("targets_B", "targets2_B"), pair, strict=False):
        check_rows(name, ids, logits_BC, integer=True)
    lam_B = torch.as_tensor(lam, dtype=dtype, device=device).detach().expand(len(logits_BC))
    share_BJ = torch.stack([lam_B, 1 - lam_B] if targets2_B is not None else [torch.ones_like(lam_B)], dim=1)
    ids_BJ = torch.stack(pair, dim=1).long()
    ignored = ids_BJ == ignore_index
    check_targets(logits_BC, ids_BJ, ignore_index, wait=check_ids)
    share_BJ = share_BJ.masked_fill(ignored, 0.0)
    return HardTerm(
        targets_BJ=ids_BJ.masked_fill(ignored, 0),
        share_BJ=share_BJ,
        label_smoothing=label_smoothing,
        weight_B=factor * row_weights(logits_BC, weights_B, reduction, (~ignored).any(1)),
    )


def check_targets(logits_BC: Tensor, ids_BJ: Tensor, ignore_index: int, *, wait: bool = False) -> None:
    """Raises ConfigError for a target that is no class. Looks on the CPU alone, unless told to wait for the device."""
    if not wait and (logits_BC.device.type != "cpu" or torch.compiler.is_compiling()):
        return
    wrong = (ids_BJ != ignore_index) & ((ids_BJ < 0) | (ids_BJ >= logits_BC.shape[1]))
    if bool(wrong.any()):
        raise ConfigError(
            f"targets are class ids from 0 to {logits_BC.shape[1] - 1}, or ignore_index ({ignore_index})",
            actual=f"{ids_BJ[wrong][:8].tolist()} in rows {wrong.any(1).nonzero()[:8, 0].tolist()}",
            fix="map the ids to the student's classes, or pass the ignore_index that marks images without labels",
        )


def row_weights(logits_BC: Tensor, weights_B: Tensor | None, reduction: Reduction, counts_B: Tensor | None) -> Tensor:
    """What each row's loss is multiplied by before all are summed: w_i, in mean over the number of rows that count."""
    dtype = compute_dtype(logits_BC.dtype)
    if weights_B is None:
        weights = logits_BC.new_ones(len(logits_BC), dtype=dtype)
    else:
        check_rows("weights_B", weights_B, logits_BC)
        weights = weights_B.detach().to(dtype)
    if reduction != "mean":
        return weights
    return weights / (max(1, len(logits_BC)) if counts_B is None else counts_B.sum().clamp_min(1))


def check_logits(logits_BC: Tensor) -> None:
    """Raises ConfigError unless these are [B, C] floating-point logits."""
    if logits_BC.ndim != 2 or logits_BC.shape[1] < 1 or not logits_BC.is_floating_point():
        raise ConfigError(
            "student logits are [B, C], floating point, with at least one class",
            actual=f"{tuple(logits_BC.shape)} {logits_BC.dtype}",
        )


def check_rows(name: str, values_B: Tensor, logits_BC: Tensor, *, integer: bool = False) -> None:
    """Raises ConfigError unless `values_B` holds one value a row on the logits' device, of the kind asked for."""
    kind = "integers" if integer else "real numbers"
    fits = not (values_B.is_floating_point() or values_B.is_complex() or values_B.dtype == torch.bool)
    if tuple(values_B.shape) != (len(logits_BC),) or (integer and not fits) or values_B.device != logits_BC.device:
        raise ConfigError(
            f"{name} holds {kind}, one for each of the {len(logits_BC)} rows of logits, on {logits_BC.device}",
            actual=f"{tuple(values_B.shape)} {values_B.dtype} on {values_B.device}",
        )
