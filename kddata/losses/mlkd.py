"""The batch-level and class-level terms of multi-level logit distillation; its instance-level term is kd_loss.

The published method sums all three over several temperatures and two views of each image, with masks of confident
images and classes. What is here are its terms for one view and temperature.
"""

from __future__ import annotations

from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch, teacher_log_p


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
