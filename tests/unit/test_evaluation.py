"""Scores against plain definitions on small cases, and the paired bootstrap's statistics."""

import math

import numpy as np
import pytest
import torch

from kddata.errors import ConfigError, TeacherError
from kddata.evaluation import ECE_BINS, Scores, calibration_error, paired_bootstrap, score


def test_scores_of_two_items_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3), -math.inf], [2.0, 2.0, 2.0]])
    teacher = torch.tensor([[0.0, 0.0, -math.inf], [0.0, math.log(2), 0.0]])
    scores = score(logits, torch.tensor([0, 0]), teacher)
    np.testing.assert_array_equal(scores.top1, [0, 1])  # of equal logits the lower class is first
    np.testing.assert_array_equal(scores.top5, [1, 1])
    np.testing.assert_allclose(scores.nll, [math.log(4), math.log(3)], rtol=1e-7)
    np.testing.assert_allclose(scores.brier, [0.75**2 + 0.75**2, (2 / 3) ** 2 + 2 / 9], rtol=1e-7)
    np.testing.assert_allclose(scores.confidence, [0.75, 1 / 3], rtol=1e-7)
    np.testing.assert_array_equal(scores.agreement, [0, 0])
    kl = [math.log(0.5) - 0.5 * math.log(0.25 * 0.75), 0.5 * math.log(0.75) + 0.5 * math.log(1.5)]
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-6)
    assert scores.top1.dtype == np.float64


def test_top5_counts_ties_by_lower_class() -> None:
    logits = torch.zeros(3, 10)
    np.testing.assert_array_equal(score(logits, torch.tensor([4, 5, 9])).top5, [1, 0, 0])


def test_batches_join_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 23, 7, generator=generator)
    targets = torch.randint(-1, 7, (23,), generator=generator)
    whole = score(logits, targets, teacher)
    parts = Scores.cat([score(logits[i : i + 5], targets[i : i + 5], teacher[i : i + 5]) for i in range(0, 23, 5)])
    assert len(parts) == 23
    assert parts.summary() == pytest.approx(whole.summary(), rel=1e-12)


def test_items_without_labels_or_teacher_are_left_out() -> None:
    logits, targets = torch.eye(4), torch.tensor([0, -1, -1, 2])
    summary = score(logits, targets).summary()
    assert summary["top1"] == 0.5
    assert "agreement" not in summary
    assert "kl" not in summary
    confidence = math.e / (math.e + 3)
    assert summary["ece"] == pytest.approx(abs(0.5 - confidence))
    assert set(score(logits, None, logits).summary()) == {"confidence", "agreement", "kl"}
    assert score(logits, None, logits).summary()["kl"] == 0


def test_calibration_bins_are_closed_on_the_right() -> None:
    edges = np.arange(1, ECE_BINS + 1) / ECE_BINS
    right = np.ones(ECE_BINS)
    # each edge lies in the bin that it ends: one item a bin, each off by 1 - confidence
    assert calibration_error(edges, right) == pytest.approx((1 - edges).mean())
    # two items on either side of an edge stand alone; in one bin their errors cancel
    assert calibration_error(np.array([0.35, 0.45]), np.array([0.0, 1.0]), bins=5) == pytest.approx((0.35 + 0.55) / 2)
    assert calibration_error(np.array([0.42, 0.48]), np.array([0.0, 1.0]), bins=5) == pytest.approx(abs(0.9 - 1) / 2)


def test_a_diverged_network_is_not_scored() -> None:
    logits = torch.zeros(3, 2)
    logits[1, 0] = math.nan
    with pytest.raises(TeacherError, match=r"NaN or infinity for 1 of 3 items \(in the student's logits\)"):
        score(logits, torch.zeros(3).long())
    with pytest.raises(TeacherError, match="in the teacher's logits"):
        score(torch.zeros(3, 2), None, logits)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"same items and classes; got \(2, 3\) and \(2, 4\)"):
        score(torch.zeros(2, 3), None, torch.zeros(2, 4))
    with pytest.raises(ConfigError, match=r"N class ids below C; got \(2, 3\) and \(2,\), largest 3"):
        score(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match=r"logits are \[N, C\]"):
        score(torch.zeros(2, 3), torch.tensor([0]))


def test_paired_bootstrap_matches_the_normal_interval() -> None:
    """For many items the percentile interval is the mean plus or minus 1.96 standard errors of the differences."""
    generator = np.random.default_rng(0)
    hard = generator.random(2000) < 0.5  # items that both arms fail
    a, b = ((generator.random(2000) < p) & ~hard for p in (0.85, 0.80))
    interval = paired_bootstrap(a, b, seed=3)
    difference = a.astype(float) - b
    error = 1.96 * difference.std() / math.sqrt(2000)
    assert interval.difference == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - error, abs=0.15 * error)
    assert interval.high == pytest.approx(difference.mean() + error, abs=0.15 * error)
    assert interval == paired_bootstrap(a, b, seed=3)
    assert interval != paired_bootstrap(a, b, seed=4)
    assert paired_bootstrap(a, b, seed=3, level=0.5).low > interval.low


def test_paired_bootstrap_of_equal_arms_does_not_call_a_difference() -> None:
    same = paired_bootstrap(np.ones(50), np.ones(50))
    assert (same.difference, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    assert paired_bootstrap(np.ones(50), np.zeros(50)).excludes_zero


@pytest.mark.parametrize("arms", [([1.0], [1.0, 0.0]), ([], []), ([math.nan], [1.0])])
def test_paired_bootstrap_needs_the_same_scored_items(arms: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ConfigError, match="same items, all scored"):
        paired_bootstrap(np.array(arms[0]), np.array(arms[1]))
