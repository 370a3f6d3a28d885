"""Weighted soft labels: a sample weighs less where the student already knows the truth as well as its teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch_with_targets, cross_entropy, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction


def wsld_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 2.25,
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """alpha T^2 w CE(teacher_T, student_T), the mean over rows with a target; rows without one have no loss.

        w = 1 - exp(-CE(student_1, y) / (CE(teacher_1, y) + 1e-7)), without gradient

    Needs all classes (k = C), or a named tail. Source: Zhou et al., arXiv 2102.00650.
    """
    dense = batch_with_targets(student_logits_BC, labels, targets_B, ignore_index=ignore_index)
    with torch.no_grad():
        of_teacher = -teacher_log_p(dense, temperature=1.0, tail=tail).gather(1, dense.targets_B1)[:, 0]
        of_student = -dense.logits_BC.log_softmax(1).gather(1, dense.targets_B1)[:, 0]
        focus = -torch.expm1(-of_student / (of_teacher + 1e-7))
    log_p = teacher_log_p(dense, temperature=temperature, tail=tail)
    soft = cross_entropy(log_p, (dense.logits_BC / temperature).log_softmax(1))
    loss_B = alpha * temperature**2 * focus * soft
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=True)
