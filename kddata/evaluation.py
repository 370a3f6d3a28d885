"""How good a student is, and how like its teacher: numbers of every item first, their summary second.

Scores of single items are kept (a few float64 numbers each), so that batches, ranks and arms are joined exactly and
two arms can be compared item by item. Trade-off: 56 bytes an item instead of constant memory.

Shapes: N items, C classes. Natural logarithms.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kddata import rng
from kddata.errors import ConfigError, TeacherError

ECE_BINS = 15
METRICS = {"top1": 1, "top5": 1, "nll": -1, "brier": -1, "ece": -1}
"""By which evaluations are compared, and whether a higher (1) or a lower value (-1) is better."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of N items, float64 arrays [N]; NaN where they cannot be known (no label, no teacher).

    Attributes:
        top1, top5: 1 where the label is the most probable class (among the five most probable), else 0; of equal
            logits the lower class id comes first.
        nll: minus the log-probability of the label.
        brier: sum over classes of the squared difference between probabilities and the one-hot label.
        confidence: probability of the most probable class.
        agreement: 1 where student and teacher have the same most probable class, else 0.
        kl: KL(teacher || student) of the predictive distributions at temperature 1.
    """

    top1: np.ndarray
    top5: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    confidence: np.ndarray
    agreement: np.ndarray
    kl: np.ndarray

    def __len__(self) -> int:
        return len(self.top1)

    @staticmethod
    def cat(parts: list[Scores]) -> Scores:
        """All items, in order."""
        names = [field.name for field in dataclasses.fields(Scores)]
        return Scores(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def summary(self) -> dict[str, float]:
        """Means over the items that have the score, and ECE; what no item has is left out."""
        means = {}
        for field in dataclasses.fields(self):
            known = getattr(self, field.name)
            known = known[~np.isnan(known)]
            if known.size:
                means[field.name] = float(known.mean())
        labelled = ~np.isnan(self.top1)
        if labelled.any():
            means["ece"] = calibration_error(self.confidence[labelled], self.top1[labelled])
        return means


def score(logits_NC: Tensor, targets_N: Tensor | None = None, teacher_logits_NC: Tensor | None = None) -> Scores:
    """Scores of a batch, computed in float64. Targets below 0 mark items without a label.

    Raises ConfigError for shapes that do not fit or targets past the last class, and TeacherError for logits that are
    NaN or +inf: means over the items that remain would flatter a network that has diverged.
    """
    size, num_classes = len(logits_NC), logits_NC.shape[-1]
    unknown = torch.full((size,), math.nan, dtype=torch.float64)
    if teacher_logits_NC is not None and teacher_logits_NC.shape != logits_NC.shape:
        raise ConfigError(
            "student and teacher logits are [N, C] of the same items and classes",
            actual=f"{tuple(logits_NC.shape)} and {tuple(teacher_logits_NC.shape)}",
        )
    targets = torch.full((size,), -1) if targets_N is None else targets_N.detach().cpu().long()
    if logits_NC.ndim != 2 or targets.shape != (size,) or (size and int(targets.max()) >= num_classes):
        raise ConfigError(
            "logits are [N, C] and targets N class ids below C",
            actual=f"{tuple(logits_NC.shape)} and {tuple(targets.shape)}, largest {int(targets.max()) if size else 0}",
        )
    logits = _finite("student", logits_NC)
    log_q = logits.log_softmax(1)
    q = log_q.exp()
    known = targets >= 0
    label = targets.clamp_min(0)[:, None]
    of_label = logits.gather(1, label)
    before = (torch.arange(num_classes) < label) & (logits == of_label)
    rank = ((logits > of_label) | before).sum(1)
    p_label = q.gather(1, label)[:, 0]
    agreement = kl = unknown
    if teacher_logits_NC is not None:
        teacher = _finite("teacher", teacher_logits_NC)
        log_p = teacher.log_softmax(1)
        p = log_p.exp()
        agreement = (logits.argmax(1) == teacher.argmax(1)).double()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
    columns = {
        "top1": torch.where(known, (rank < 1).double(), unknown),
        "top5": torch.where(known, (rank < 5).double(), unknown),
        "nll": torch.where(known, -log_q.gather(1, label)[:, 0], unknown),
        "brier": torch.where(known, q.square().sum(1) - 2 * p_label + 1, unknown),
        "confidence": q.amax(1),
        "agreement": agreement,
        "kl": kl,
    }
    return Scores(**{name: column.numpy() for name, column in columns.items()})


def _finite(whose: str, logits_NC: Tensor) -> Tensor:
    logits = logits_NC.detach().cpu().double()
    bad = ~torch.isfinite(logits.amax(1))  # amax passes NaN on; -inf in some classes is a mask
    if bool(bad.any()):
        raise TeacherError(
            "a network's logits are numbers",
            actual=f"NaN or infinity for {int(bad.sum())} of {len(logits)} items",
            where=f"the {whose}'s logits",
            fix="lower the learning rate, or look at the inputs of these items",
        )
    return logits


def calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error: sum over bins of (items / N) |accuracy - mean confidence|.

    Bins are of equal width and closed on the right: (0, 1/bins], (1/bins, 2/bins], ... Source: Guo et al., arXiv
    1706.04599, equation 3.
    """
    which = np.clip(np.searchsorted(np.arange(1, bins + 1) / bins, confidence_N, side="left"), 0, bins - 1)
    gaps = np.bincount(which, weights=correct_N - confidence_N, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean difference with its bootstrap interval."""

    difference: float
    low: float
    high: float
    level: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is called real at this level."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a_N: np.ndarray, b_N: np.ndarray, *, seed: int = 0, level: float = 0.95, resamples: int = 4000
) -> Interval:
    """The mean of a - b over items, and its percentile interval when items are drawn again with replacement.

    Both arms are scored on the same items (say `scores.top1` of two students), so that what is hard for both cancels.
    The interval speaks of these test items, not of other seeds of training. Source: Efron and Tibshirani, "An
    Introduction to the Bootstrap", section 13.3.

    Raises ConfigError unless the arms have the same items, at least one, all scored.
    """
    a, b = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size or not np.isfinite(a - b).all():
        unknown = [int((~np.isfinite(arm)).sum()) for arm in (a, b)]
        raise ConfigError(
            "two arms are compared on the same items, all scored",
            actual=f"shapes {a.shape} and {b.shape}, with {unknown[0]} and {unknown[1]} unknown scores",
        )
    difference = a - b
    generator = rng.stream(seed, "paired_bootstrap")
    means = np.empty(resamples)
    step = max(1, 2**22 // a.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = (generator.random((count, a.size)) * a.size).astype(np.int64)
        means[start : start + count] = difference[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(difference=float(difference.mean()), low=float(low), high=float(high), level=level)
