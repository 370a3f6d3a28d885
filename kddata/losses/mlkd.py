"""Multi-level logit distillation: images as they are, images among themselves, and classes among themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from kddata.labels import DenseTail, SoftLabels
from kddata.losses.dense import batch, kl, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction

MLKD_TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def batch_correlation_loss(
    student_logits_BC: Tensor, labels: SoftLabels, *, temperature: float = 4.0, tail: DenseTail | None = None
) -> Tensor:
    """|P P^T - Q Q^T|^2 / B, P and Q the probabilities [B, C] of teacher and student at T: how images resemble.

    Needs all classes (k = C), or a named tail. Source: Jin et al., "Multi-level logit distillation" (CVPR 2023).
    """
    p, q = _probabilities(student_logits_BC, labels, temperature, tail)
    return _among_images(p, q)


def class_correlation_loss(
    student_logits_BC: Tensor, labels: SoftLabels, *, temperature: float = 4.0, tail: DenseTail | None = None
) -> Tensor:
    """|P^T P - Q^T Q|^2 / C: how classes go together in the batch. Holds C x C matrices.

    Needs all classes (k = C), or a named tail. Source: the same.
    """
    p, q = _probabilities(student_logits_BC, labels, temperature, tail)
    return _among_classes(p, q)


def _probabilities(
    student_logits_BC: Tensor, labels: SoftLabels, temperature: float, tail: DenseTail | None
) -> tuple[Tensor, Tensor]:
    dense = batch(student_logits_BC, labels)
    p = teacher_log_p(dense, temperature=temperature, tail=tail).exp()
    return p, (dense.logits_BC / temperature).softmax(1)


def _among_images(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    return (p_BC @ p_BC.T - q_BC @ q_BC.T).square().sum() / max(1, len(q_BC))


def _among_classes(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    return (p_BC.T @ p_BC - q_BC.T @ q_BC).square().sum() / q_BC.shape[1]


def mlkd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperatures: Sequence[float] = MLKD_TEMPERATURES,
    tail: DenseTail | None = None,
    image_ids: Sequence[str] | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Sum over temperatures of T^2 KL + batch_correlation_loss + class_correlation_loss. Targets are not used.

    The published method sums this over a weak and a strong view of each image. With `image_ids`, the rows are taken
    apart: the first row of each image is one set, the second another, and so on, each with correlations of its own,
    which each of its rows carries whole. The mean over rows of a batch of pairs is then half of the published sum.
    Without, all rows are one set. The released code halves some of these terms by masks of confident rows; those are
    left out. Needs all classes (k = C), or a named tail. Source: the same.
    """
    dense = batch(student_logits_BC, labels)
    loss_B = dense.logits_BC.new_zeros(len(labels))
    sets = [rows.to(loss_B.device) for rows in _sets(len(labels), image_ids)]
    for t in temperatures:
        log_p, log_q = teacher_log_p(dense, temperature=t, tail=tail), (dense.logits_BC / t).log_softmax(1)
        loss_B = loss_B + t**2 * kl(log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        for rows in sets:
            shared = _among_images(p[rows], q[rows]) + _among_classes(p[rows], q[rows])
            loss_B = loss_B.index_add(0, rows, shared.expand(len(rows)))
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=False)


def _sets(num_rows: int, image_ids: Sequence[str] | None) -> list[Tensor]:
    """The rows, int64, of each set: all of them, or those that are their image's first, second, ..."""
    if image_ids is None or num_rows == 0:
        return [torch.arange(num_rows)]
    counts: Counter[str] = Counter()
    turn_of = []
    for image_id in image_ids:
        turn_of.append(counts[image_id])
        counts[image_id] += 1
    turns = torch.tensor(turn_of)
    return [(turns == turn).nonzero()[:, 0] for turn in range(max(turn_of) + 1)]
