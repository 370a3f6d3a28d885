"""DIST: a student need only rank classes, and rank images, as its teacher does."""

from __future__ import annotations

import torch
from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction


def dist_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """T^2 (beta (1 - mean over rows of r(q_i, p_i)) + gamma (1 - mean over classes of r(q_.c, p_.c))).

    r is Pearson's correlation of probabilities at T, with 1e-8 added to its denominator: across the classes of one
    image, and across the images of the batch for one class. The second is a property of the batch: every row carries
    the whole of it, so that the mean of `none` is the loss; of one row it is gamma, without gradient. Targets are not
    used. Needs all classes (k = C), or a named tail. Source: Huang et al., arXiv 2205.10536.
    """
    dense = batch(student_logits_BC, labels)
    p = teacher_log_p(dense, temperature=temperature, tail=tail).exp()
    q = (dense.logits_BC / temperature).softmax(1)
    loss_B = beta * (1 - _correlation(q, p)) + gamma * (1 - _correlation(q.T, p.T).mean())
    return reduce_rows(dense, temperature**2 * loss_B, reduction=reduction, weights_B=weights_B, known_only=False)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of two matrices."""
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1) + 1e-8)
