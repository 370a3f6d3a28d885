"""Decoupled knowledge distillation: the target against the rest, and the rest among themselves, weighted apart."""

from __future__ import annotations

from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch_with_targets, kl, reduce_rows, split_target, teacher_log_p
from kddata.losses.fused import Backend, fused_dkd_loss, kernels_for
from kddata.losses.hard import Reduction
from kddata.losses.kd import check_labels
from kddata.losses.lskd import standardize


def dkd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    standardized: bool = False,
    tail: DenseTail | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), the mean over rows with a target; rows without one have no loss.

        TCKD = KL(b_teacher || b_student),  b = (p_y, 1 - p_y) at T
        NCKD = KL over the classes other than y, each side renormalised over them, at T

    KD itself is `TCKD + (1 - p_y) NCKD`. Where the reference takes the log of a rounded probability, and gives NaN for
    logits hundreds apart, all of this is done in logarithms. Needs all classes (k = C), or a named tail;
    `standardized`, the variant on standardised logits (see lskd.py), needs all classes. On CUDA a kernel does the plain
    form of up to 4096 classes; `backend` is that of `kd_loss`.
    Source: Zhao et al., arXiv 2203.08679.
    """
    dense = batch_with_targets(student_logits_BC, labels, targets_B, ignore_index=ignore_index)
    kernels = None
    if targets_B is not None and not standardized and labels.k == labels.num_classes:
        check_labels(student_logits_BC, labels)
        kernels = kernels_for(backend, student_logits_BC, labels)
    if kernels is not None:
        options = {"alpha": alpha, "beta": beta, "reduction": reduction, "ignore_index": ignore_index}
        return fused_dkd_loss(
            kernels, student_logits_BC, labels, targets_B, temperature=temperature, weights_B=weights_B, **options
        )
    if standardized:
        student = standardize(dense.logits_BC)
        log_p = (standardize(teacher_log_p(dense, temperature=1.0)) / temperature).log_softmax(1)
    else:
        student, log_p = dense.logits_BC, teacher_log_p(dense, temperature=temperature, tail=tail)
    p, q = (split_target(x, dense.targets_B1) for x in (log_p, (student / temperature).log_softmax(1)))
    loss_B = alpha * kl(p.log_binary_B2, q.log_binary_B2) + beta * kl(p.log_others_BC, q.log_others_BC)
    return reduce_rows(dense, temperature**2 * loss_B, reduction=reduction, weights_B=weights_B, known_only=True)
