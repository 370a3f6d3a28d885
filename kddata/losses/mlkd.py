"""Multi-level logit distillation: images as they are, images among themselves, and classes among themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch, kl, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction


def batch_correlation_loss(
    student_logits_BC: Tensor, labels: SoftLabels, *, temperature: float = 4.0, tail: DenseTail | None = None
) -> Tensor:
    """|P P^T - Q Q^T|^2 / B, P and Q the probabilities [B, C] of teacher and student at T: how images resemble.

    Needs all classes (k = C), or a named tail. Source: Jin et al., "Multi-level logit distillation" (CVPR 2023).
    """
    p, q = _probabilities(student_logits_BC, labels, temperature, tail)
    return (p @ p.T - q @ q.T).square().sum() / max(1, len(q))


def class_correlation_loss(
    student_logits_BC: Tensor, labels: SoftLabels, *, temperature: float = 4.0, tail: DenseTail | None = None
) -> Tensor:
    """|P^T P - Q^T Q|^2 / C: how classes go together in the batch. Holds C x C matrices.

    Needs all classes (k = C), or a named tail. Source: the same.
    """
    p, q = _probabilities(student_logits_BC, labels, temperature, tail)
    return (p.T @ p - q.T @ q).square().sum() / q.shape[1]


def _probabilities(
    student_logits_BC: Tensor, labels: SoftLabels, temperature: float, tail: DenseTail | None
) -> tuple[Tensor, Tensor]:
    dense = batch(student_logits_BC, labels)
    p = teacher_log_p(dense, temperature=temperature, tail=tail).exp()
    return p, (dense.logits_BC / temperature).softmax(1)


def mlkd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Sum over temperatures of T^2 KL + batch_correlation_loss + class_correlation_loss. Targets are not used.

    The published method sums this over a weak and a strong view of each image; here a view is a row, so that two views
    of an image in one batch are two rows (which also makes them neighbours in the batch-level term). Its released code
    halves some of these terms by masks of confident rows; those are left out. The correlations are properties of the
    batch: every row carries the whole of them. Needs all classes (k = C), or a named tail. Source: the same.
    """
    dense = batch(student_logits_BC, labels)
    loss_B = dense.logits_BC.new_zeros(len(labels))
    for t in temperatures:
        log_p = teacher_log_p(dense, temperature=t, tail=tail)
        loss_B = loss_B + t**2 * kl(log_p, (dense.logits_BC / t).log_softmax(1))
        for correlation in (batch_correlation_loss, class_correlation_loss):
            loss_B = loss_B + correlation(student_logits_BC, labels, temperature=t, tail=tail)
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=False)
