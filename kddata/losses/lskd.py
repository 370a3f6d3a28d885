"""Logit standardisation: a student need not match its teacher's scale, only its shape."""

from __future__ import annotations

from torch import Tensor

from kddata.labels import SoftLabels
from kddata.losses.dense import batch, kl, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction

MIN_STD = 1e-2


def standardize(logits_BC: Tensor) -> Tensor:
    """(z - mean) / (1e-7 + std) of each row, std with C - 1 in the denominator.

    A row whose std is below MIN_STD is divided by MIN_STD instead: the published form multiplies the gradient of a
    constant row (a classifier that starts at zero) by 10^7.
    """
    std = logits_BC.std(dim=1, keepdim=True).clamp_min(MIN_STD)
    return (logits_BC - logits_BC.mean(dim=1, keepdim=True)) / (1e-7 + std)


def lskd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """T^2 KL(teacher_T || student_T) of standardised logits; needs all classes (k = C).

    The teacher's log-probabilities are its logits up to a shift, which standardisation removes. Targets are not used.
    Source: Sun et al., arXiv 2403.01427.
    """
    dense = batch(student_logits_BC, labels)
    teacher = standardize(teacher_log_p(dense, temperature=1.0))
    log_p, log_q = ((x / temperature).log_softmax(1) for x in (teacher, standardize(dense.logits_BC)))
    return reduce_rows(
        dense, temperature**2 * kl(log_p, log_q), reduction=reduction, weights_B=weights_B, known_only=False
    )
