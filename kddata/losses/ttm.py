"""Transformed teacher matching: the teacher is tempered, the student is not."""

from __future__ import annotations

from torch import Tensor

from kddata.labels import SoftLabels
from kddata.losses.dense import batch, kl, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction


def ttm_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperature: float = 4.0,
    weighted: bool = False,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """KL(teacher_T || student_1), no T^2; `weighted` (WTTM) multiplies each row by sum_c p_c^(1/T), p the teacher at 1.

    The published exponent is 1 / T. That sum is large where the teacher is unsure. Targets are not used. Needs all
    classes (k = C). Source: Zheng and Yang, arXiv 2402.11148.
    """
    dense = batch(student_logits_BC, labels)
    loss_B = kl(teacher_log_p(dense, temperature=temperature), dense.logits_BC.log_softmax(1))
    if weighted:
        loss_B = (teacher_log_p(dense, temperature=1.0) / temperature).logsumexp(1).exp() * loss_B
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=False)


def wttm_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """`ttm_loss` with `weighted`, under the name that its paper gives it."""
    return ttm_loss(
        student_logits_BC,
        labels,
        targets_B,
        temperature=temperature,
        weighted=True,
        reduction=reduction,
        ignore_index=ignore_index,
        weights_B=weights_B,
    )
