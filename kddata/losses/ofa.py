"""One-for-all distillation, the loss of one exit: what the teacher says of the target counts more."""

from __future__ import annotations

import torch
from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch_with_targets, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction


def ofa_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor,
    *,
    temperature: float = 1.0,
    eps: float = 1.5,
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """-((1 + p_y)^eps - 1) log q_y - sum over others of p^eps log q at T, the mean over rows with a target.

    No T^2. Rows without a target have no loss. The reference takes the log of a rounded softmax, and gives NaN for
    logits hundreds apart; this does not. Needs all classes (k = C), or a named tail.
    Source: Hao et al., arXiv 2310.19444.
    """
    dense = batch_with_targets(student_logits_BC, labels, targets_B, ignore_index=ignore_index)
    log_p = teacher_log_p(dense, temperature=temperature, tail=tail)
    log_q = (dense.logits_BC / temperature).log_softmax(1)
    of_target = torch.expm1(eps * torch.log1p(log_p.gather(1, dense.targets_B1).exp()))
    weight = (eps * log_p).exp().scatter(1, dense.targets_B1, of_target)
    loss_B = -torch.where(weight > 0, weight * log_q, 0.0).sum(1)
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=True)
