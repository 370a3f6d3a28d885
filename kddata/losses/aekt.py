"""Adaptive explicit knowledge transfer: **a reading of the abstract** of Park & Lee, arXiv 2409.01679.

The paper's formulas were not available. What is built follows what its abstract states: a non-target term, a term on
the teacher's confidence in the target that adapts to the ratio of teacher and student, and a linear layer that
separates classification from distillation.

Shapes: B rows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch_with_targets, kl, reduce_rows, split_target, teacher_log_p
from kddata.losses.hard import Reduction


def aekt_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor,
    *,
    temperature: float = 4.0,
    explicit: float = 1.0,
    implicit: float = 1.0,
    max_ratio: float = 2.0,
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """explicit * w TCKD + implicit * NCKD, the mean over rows with a target; on the logits before the `ClassHead`.

        TCKD = T^2 KL(b_teacher || b_student), b = (p_y, 1 - p_y) at T
        NCKD = T^2 KL over the classes other than y, each side renormalised over them, at T
        w    = clip(p_teacher,y / p_student,y, 0, max_ratio) at T, without gradient

    KD is `TCKD + (1 - p_y) NCKD` of each row. In NCKD the gradient of a class j other than y is
    `T (q_j / (1 - q_y) - p_j / (1 - p_y))`, of y it is 0. Needs all classes (k = C), or a named tail. Source: a reading
    of the abstract of arXiv 2409.01679, with the terms of DKD (arXiv 2203.08679).
    """
    dense = batch_with_targets(student_logits_BC, labels, targets_B, ignore_index=ignore_index)
    log_p = teacher_log_p(dense, temperature=temperature, tail=tail)
    p, q = (split_target(x, dense.targets_B1) for x in (log_p, (dense.logits_BC / temperature).log_softmax(1)))
    log_ratio = p.log_binary_B2[:, 0] - q.log_binary_B2[:, 0].detach()
    ratio = log_ratio.nan_to_num(nan=0.0).exp().clamp(0.0, max_ratio)
    tckd, nckd = kl(p.log_binary_B2, q.log_binary_B2), kl(p.log_others_BC, q.log_others_BC)
    loss_B = temperature**2 * (explicit * ratio * tckd + implicit * nckd)
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=True)


class ClassHead(nn.Linear):
    """Logits that classify, W z + b, of logits z that are distilled: C x C, at first the identity."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, num_classes)
        with torch.no_grad():
            self.weight.copy_(torch.eye(num_classes))
            self.bias.zero_()
