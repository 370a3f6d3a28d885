"""What a report is made of: recorded values of a distillation experiment, and what follows from them.

Nothing here trains, reads or draws. Trade-off: the words of a verdict are made here, beside the rule that they follow,
so that console and page say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kddata.evaluation import Interval

Kind = Literal["hard", "cached", "loop"]

LABELS_OF: dict[Kind, str] = {"hard": "hard labels", "cached": "cached labels", "loop": "teacher in the loop"}
COLUMNS = ("student", "learns from", "accuracy", "agreement", "NLL", "ECE", "wall time", "training", "images/s")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One student trained in one way.

    Attributes:
        student: its name.
        kind: from ground truth alone, from stored labels, or with the teacher in the loop.
        scores: top1, agreement (with the teacher's most probable class), nll and ece on the test images.
        wall_s: from the start of the run to its result: processes, training, evaluation.
        train_s: of that, the training steps.
        images_per_s: views trained on in a second of train_s.
        loss_S: of each step.
        cached_loss_S: with the teacher in the loop, what the cached labels made of each step.
    """

    student: str
    kind: Kind
    scores: Mapping[str, float]
    wall_s: float
    train_s: float
    images_per_s: float
    loss_S: Sequence[float]
    cached_loss_S: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Accuracy with cached labels minus accuracy with hard labels, of one student on the same test images."""

    student: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """One plain sentence, whatever the outcome."""
        i = self.interval
        points = f"{abs(i.difference) * 100:.1f} points"
        between = f"{i.level:.0%} interval {i.low * 100:+.1f} to {i.high * 100:+.1f}"
        if i.low > 0:
            return f"{self.student}: distillation from the cache beats hard labels by {points} ({between})."
        if i.high < 0:
            return f"{self.student}: distillation from the cache does worse than hard labels by {points} ({between})."
        return (
            f"{self.student}: distillation from the cache does not beat hard labels: the difference of "
            f"{i.difference * 100:+.1f} points may be chance ({between})."
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the cache cost, and what each student saves by it.

    Attributes:
        label_s: wall time of labelling, start of its processes included.
        num_images, views_per_image, store_bytes: of the store; everything in its folder counts.
        cached_s, loop_s: training time of one student on the same views, from the cache and with the teacher in the
            loop.
    """

    label_s: float
    num_images: int
    views_per_image: int
    store_bytes: int
    cached_s: float
    loop_s: float

    @property
    def bytes_per_view(self) -> float:
        """Bytes of the store for each view."""
        return self.store_bytes / (self.num_images * self.views_per_image)

    @property
    def break_even(self) -> float:
        """Students after which the cache has paid for itself: infinite where the teacher in the loop is no slower."""
        saved_s = self.loop_s - self.cached_s
        return self.label_s / saved_s if saved_s > 0 else math.inf

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        if self.break_even == math.inf:
            return "In this run the teacher in the loop was no slower, so the cache has not paid for itself."
        students = max(1, math.ceil(round(self.break_even, 1)))
        return (
            f"Labelling took {self.label_s:.0f} s, and each student saves {self.loop_s - self.cached_s:.0f} s: "
            f"the cache has paid for itself after {students} student{'s' * (students > 1)} ({self.break_even:.1f})."
        )


@dataclass(frozen=True, kw_only=True)
class StepAgreement:
    """Whether training from the cache is training with the teacher in the loop, step by step.

    Attributes:
        cached_S, loop_S: loss of each step of two runs of the same student on the same rows.
        loop_cached_S: what the cached labels made of each step of the loop run: the same weights and views.
        tolerance: largest |loop_cached_S - loop_S| of a step, as a share of the first step's loss.
        reason: why this tolerance, in a sentence.
        accuracy: of the cached run minus that of the loop run.
    """

    cached_S: Sequence[float]
    loop_S: Sequence[float]
    loop_cached_S: Sequence[float]
    tolerance: float
    reason: str
    accuracy: Interval

    @property
    def difference_S(self) -> list[float]:
        """Cached labels minus fresh ones on the same weights, as a share of the first step's loss."""
        return self._difference(self.loop_cached_S)

    @property
    def drift_S(self) -> list[float]:
        """The cached run minus the loop run, in the same unit."""
        return self._difference(self.cached_S)

    @property
    def largest(self) -> float:
        """The largest |difference_S|."""
        return max(map(abs, self.difference_S))

    @property
    def held(self) -> bool:
        """Whether every step kept the tolerance."""
        return self.largest <= self.tolerance

    @property
    def verdict(self) -> str:
        """One plain sentence on the tolerance."""
        steps = f"of {len(self.loop_S)} steps"
        return (
            f"On the same weights, cached labels and the teacher asked anew give the same loss within the tolerance at "
            f"{f'every one {steps}' if self.held else f'NOT every one {steps}'}: the largest difference is "
            f"{self.largest:.4%} of the first loss, {self.tolerance:.4%} was allowed."
        )

    @property
    def drift(self) -> str:
        """What became of the two whole runs, in plain sentences."""
        drift, i = [abs(d) for d in self.drift_S], self.accuracy
        last = drift[-max(1, len(drift) // 10) :]
        return (
            f"Two whole runs drift apart all the same: training amplifies the smallest difference in weights. Their "
            f"losses differ by at most {max(drift):.2%} of the first loss in a step, and by "
            f"{sum(last) / len(last):.2%} on average over the last tenth of the steps. In accuracy the cached run ends "
            f"{i.difference * 100:+.1f} points from the other ({i.level:.0%} interval {i.low * 100:+.1f} to "
            f"{i.high * 100:+.1f})" + ("." if i.excludes_zero else ": no difference is shown.")
        )

    def _difference(self, other_S: Sequence[float]) -> list[float]:
        return [(a - b) / self.loop_S[0] for a, b in zip(other_S, self.loop_S, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of the store: each of its views as PNG bytes, with the teacher's (class name, probability) pairs."""

    image_id: str
    truth: str
    views: Sequence[tuple[bytes, Sequence[tuple[str, float]]]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a page shows.

    Attributes:
        title, lead: heading, and what was done in two or three sentences.
        teacher: its scores on the test images.
        arms, comparisons: as trained.
        samples: a few images of the store.
        settings: (name, value) pairs by which a reader could do it again.
        caveats: what a reader should not conclude.
    """

    title: str
    lead: str
    teacher: Mapping[str, float]
    arms: Sequence[Arm]
    comparisons: Sequence[Comparison]
    cost: Cost
    steps: StepAgreement
    samples: Sequence[Sample] = ()
    settings: Sequence[tuple[str, str]] = ()
    caveats: Sequence[str] = ()

    def table(self) -> list[tuple[str, ...]]:
        """A row of text for the teacher and for each arm, under COLUMNS."""
        rows: list[tuple[str, ...]] = [("teacher", "", *_scores(self.teacher), "", "", "")]
        for arm in self.arms:
            times = (f"{arm.wall_s:.0f} s", f"{arm.train_s:.0f} s", f"{arm.images_per_s:,.0f}")
            rows.append((arm.student, LABELS_OF[arm.kind], *_scores(arm.scores), *times))
        return rows


def _scores(scores: Mapping[str, float]) -> tuple[str, str, str, str]:
    agreement = f"{scores['agreement']:.1%}" if "agreement" in scores else ""
    return f"{scores['top1']:.2%}", agreement, f"{scores['nll']:.3f}", f"{scores['ece']:.3f}"
