"""What losses over all classes share: the teacher as a dense tensor, divergences without NaN, reductions.

Trade-off: plain autograd on [B, C] tensors, in float32 at least, for clarity; the fast path of this library is kd_loss.

Shapes: B rows, C classes. Natural logarithms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kddata.errors import ConfigError, LabelError
from kddata.labels import DenseTail, SoftLabels
from kddata.losses.hard import Reduction, check_logits, check_rows, check_targets, row_weights
from kddata.losses.kd import check_labels
from kddata.losses.rows import compute_dtype


class Dense(NamedTuple):
    """A batch as these losses see it: logits in the precision of the computation, checked labels and targets.

    `targets_B1` holds class 0 where `known_B` is False: an ignored target, or none given.
    """

    logits_BC: Tensor
    labels: SoftLabels
    targets_B1: Tensor
    known_B: Tensor


def batch(student_logits_BC: Tensor, labels: SoftLabels) -> Dense:
    """The batch, checked, without targets. Raises ConfigError or LabelError for what does not fit."""
    check_logits(student_logits_BC)
    check_labels(student_logits_BC, labels)
    known = torch.zeros(len(labels), dtype=torch.bool, device=student_logits_BC.device)
    logits = student_logits_BC.to(compute_dtype(student_logits_BC.dtype))
    return Dense(logits, labels, torch.zeros_like(known, dtype=torch.int64)[:, None], known)


def batch_with_targets(
    student_logits_BC: Tensor, labels: SoftLabels, targets_B: Tensor | None, *, ignore_index: int
) -> Dense:
    """The batch, checked, for a loss that looks at the target. Raises ConfigError also where there are none."""
    dense = batch(student_logits_BC, labels)
    if targets_B is None:
        raise ConfigError("this loss needs targets_B", actual="None", fix="take kd, dist, lskd or ttm without labels")
    check_rows("targets_B", targets_B, student_logits_BC, integer=True)
    targets = targets_B.long()[:, None]
    check_targets(student_logits_BC, targets, ignore_index)
    ignored = targets == ignore_index
    return dense._replace(targets_B1=targets.masked_fill(ignored, 0), known_B=~ignored[:, 0])


def teacher_log_p(dense: Dense, *, temperature: float, tail: DenseTail | None = None) -> Tensor:
    """Log-probabilities [B, C] of the teacher at a temperature; exact where k = C.

    Truncated labels are spread by a named tail (uniform or renorm, see `SoftLabels.dense`): an approximation that the
    caller has to ask for. Raises LabelError where k < C and no tail is named.
    """
    labels = dense.labels
    log_p = labels.log_p_BK.detach().to(dense.logits_BC.dtype)
    exact = dataclasses.replace(labels, log_p_BK=log_p)
    if labels.k == labels.num_classes:
        return torch.empty_like(log_p).scatter_(1, labels.ids_BK.long(), exact.at(temperature)[0])
    if tail is None:
        raise LabelError(
            "this loss needs the teacher's probabilities of all classes",
            actual=f"k = {labels.k} of {labels.num_classes}",
            fix=f"label with labels.k={labels.num_classes}, or name how to spread the rest (tail: uniform or renorm)",
        )
    return exact.dense(tail, temperature=temperature).log()


def kl(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """KL(p || q) of each row; a class of p = 0 adds nothing, also where q is 0 too."""
    p = log_p_BC.exp()
    return torch.where(p > 0, p * (log_p_BC - log_q_BC), 0.0).sum(1)


def cross_entropy(log_p_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """- sum p log q of each row; a class of p = 0 adds nothing."""
    p = log_p_BC.exp()
    return -torch.where(p > 0, p * log_q_BC, 0.0).sum(1)


class Split(NamedTuple):
    """A distribution seen from the target: log mass of (target, all others) [B, 2], and the others among themselves.

    `log_others_BC` is -inf at the target and sums to 1 over the others.
    """

    log_binary_B2: Tensor
    log_others_BC: Tensor


def split_target(log_p_BC: Tensor, targets_B1: Tensor) -> Split:
    """All of it in logarithms: a probability that rounds to 0 or 1 still has a logarithm, and a gradient."""
    others = log_p_BC.scatter(1, targets_B1, -math.inf)
    rest = others.logsumexp(1, keepdim=True)
    return Split(torch.cat([log_p_BC.gather(1, targets_B1), rest], dim=1), others - rest)


def reduce_rows(
    dense: Dense, loss_B: Tensor, *, reduction: Reduction, weights_B: Tensor | None, known_only: bool
) -> Tensor:
    """none: w_i loss_i; sum: their sum; mean: the sum over the number of rows (of known target, if `known_only`).

    With `known_only` a row without a target has no loss.
    """
    if known_only:
        loss_B = torch.where(dense.known_B, loss_B, 0.0)
    weighted = loss_B * row_weights(dense.logits_BC, weights_B, reduction, dense.known_B if known_only else None)
    return weighted if reduction == "none" else weighted.sum()
