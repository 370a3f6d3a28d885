"""Corruption: ground truth made noisy, and classes made rare, as pure functions of image id, label and seed.

For experiments on robustness. Nothing here reads or writes; a store keeps the true labels, and what is asked for is
applied to the rows that a student trains on. The draw of an image depends on its id alone, so it is the same in every
epoch, for every student and on every rank, and images can be added without changing what happened to the others.

Trade-off: each image's noise is drawn on its own, so the share of wrong labels is the asked one only on average
(standard deviation sqrt(rate (1 - rate) / N)).

Letters: N images, C classes.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from kddata import rng
from kddata.errors import ConfigError

_SORTED_AT_ONCE = 1 << 17  # lines; of more, sorted runs wait in temporary files


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """Symmetric label noise, under one of the two conventions that papers mix up.

    Attributes:
        rate: r in [0, 1].
        convention: "flip": with probability r a label becomes one of the C - 1 others, so r are wrong. "uniform": with
            probability r it is drawn anew from all C classes, so r (C - 1) / C are wrong.
        seed: of the draws.

    Source: "flip" as in Co-teaching (arXiv 1804.06872), "uniform" as in Hendrycks et al. (arXiv 1901.09960).
    """

    rate: float
    convention: Literal["flip", "uniform"] = "flip"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError("noise.rate is between 0 and 1", actual=self.rate)
        if self.convention not in ("flip", "uniform"):
            raise ConfigError("noise.convention is flip or uniform", actual=repr(self.convention))

    def label(self, image_id: str, label: int, num_classes: int) -> int:
        """What an image's label becomes; -1, for none, stays."""
        if label < 0 or rng.unit_interval(self.seed, "noisy", image_id) >= self.rate:
            return label
        choices = num_classes - 1 if self.convention == "flip" else num_classes
        if choices < 1:
            return label
        drawn = int(rng.unit_interval(self.seed, "noise", image_id) * choices)
        return drawn + (self.convention == "flip" and drawn >= label)

    def labels(self, image_ids: Iterable[str], labels_N: np.ndarray, num_classes: int) -> np.ndarray:
        """int64 [N]: `label` of each."""
        return np.array(
            [
                self.label(image_id, label, num_classes)
                for image_id, label in zip(image_ids, labels_N.tolist(), strict=True)
            ],
            dtype=np.int64,
        )

    def transition_CC(self, num_classes: int) -> np.ndarray:
        """float64 [C, C]: the probability that label i becomes label j."""
        same = np.eye(num_classes)
        if self.convention == "uniform":
            return (1 - self.rate) * same + self.rate / num_classes
        return (1 - self.rate) * same + self.rate / (num_classes - 1) * (1 - same)


@dataclass(frozen=True, kw_only=True)
class ClassImbalance:
    """Classes made rare: the images with the smallest hashes of each class stay, so a stronger imbalance is a subset.

    Attributes:
        kind: "exponential": class c keeps n_max ratio^(-c / (C - 1)) images; "step": the first half of the classes keep
            all, the others n_max / ratio. n_max is the size of the largest class; fractions are cut off.
        ratio: of the largest class to the smallest, at least 1.
        seed: of the hashes.

    Source: Cui et al. (arXiv 1901.05555), and Cao et al. (arXiv 1906.07413) for the two kinds.
    """

    kind: Literal["exponential", "step"] = "exponential"
    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("exponential", "step"):
            raise ConfigError("imbalance.kind is exponential or step", actual=repr(self.kind))
        if not 1 <= self.ratio < float("inf"):
            raise ConfigError("imbalance.ratio, of the largest class to the smallest, is at least 1", actual=self.ratio)

    def counts_C(self, largest: int, num_classes: int) -> np.ndarray:
        """int64 [C]: how many images each class keeps at most, of a set whose largest class has so many."""
        share, last = 1 / self.ratio, max(1, num_classes - 1)
        if self.kind == "step":
            shares = [1.0] * (num_classes // 2) + [share] * (num_classes - num_classes // 2)
        else:
            shares = [share ** (c / last) for c in range(num_classes)]
        return np.array([int(largest * s) for s in shares], dtype=np.int64)

    def keep_N(self, image_ids: Iterable[str], labels_N: np.ndarray, num_classes: int) -> np.ndarray:
        """bool [N]: which images stay. Raises ConfigError for one without a label."""
        if len(labels_N) and int(labels_N.min()) < 0:
            raise ConfigError("imbalance takes images that all have labels", actual=f"{(labels_N < 0).sum()} have none")
        counts = self.counts_C(int(np.bincount(labels_N, minlength=1).max()), num_classes)
        hashes = np.array([rng.unit_interval(self.seed, "rare", image_id) for image_id in image_ids])
        keep = np.zeros(len(labels_N), dtype=bool)
        for c in range(num_classes):
            members = np.flatnonzero(labels_N == c)
            keep[members[np.argsort(hashes[members], kind="stable")][: counts[c]]] = True
        return keep


def labels_sha256(labels: Iterable[tuple[str, int]]) -> str:
    """SHA-256 of image ids with their labels, in any order: what a teacher's card says it was trained on.

    It is that of the sorted lines "LABEL IMAGE_ID"; 2^17 of them are held, and more are merged from temporary files.
    """
    lines = (f"{label} {image_id}\n".encode() for image_id, label in labels)
    found = hashlib.sha256()
    with ExitStack() as files:
        runs: list[Iterable[bytes]] = []
        while run := sorted(islice(lines, _SORTED_AT_ONCE)):  # bytes of UTF-8 sort as their text does
            if len(run) < _SORTED_AT_ONCE:
                runs.append(run)
                continue
            file = files.enter_context(tempfile.TemporaryFile())
            file.writelines(run)
            file.seek(0)
            runs.append(file)
        for line in heapq.merge(*runs):
            found.update(line)
    return found.hexdigest()
