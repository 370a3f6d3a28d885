"""Normalised knowledge distillation: the target's probability as it is, the others normalised among themselves."""

from __future__ import annotations

from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch_with_targets, cross_entropy, reduce_rows, split_target, teacher_log_p
from kddata.losses.hard import Reduction


def nkd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """-p_y log q_y - gamma T^2 sum over others of p' log q', the mean over rows with a target.

    p_y and q_y are at temperature 1; p' and q' at T, renormalised over the classes other than y. A cross-entropy: not 0
    where student and teacher agree. Rows without a target have no loss. Needs all classes (k = C), or a named tail.
    Source: Yang et al., arXiv 2303.13005.
    """
    dense = batch_with_targets(student_logits_BC, labels, targets_B, ignore_index=ignore_index)
    log_p = teacher_log_p(dense, temperature=1.0, tail=tail).gather(1, dense.targets_B1)
    log_q = dense.logits_BC.log_softmax(1).gather(1, dense.targets_B1)
    others_p = split_target(teacher_log_p(dense, temperature=temperature, tail=tail), dense.targets_B1).log_others_BC
    others_q = split_target((dense.logits_BC / temperature).log_softmax(1), dense.targets_B1).log_others_BC
    loss_B = cross_entropy(log_p, log_q) + gamma * temperature**2 * cross_entropy(others_p, others_q)
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=True)
