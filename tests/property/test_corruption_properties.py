"""Noise and imbalance for any labels: pure in the image id, nested in their strength, never out of range."""

import hashlib
import tracemalloc
from random import Random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kddata import corruption
from kddata.corruption import ClassImbalance, LabelNoise, labels_sha256
from kddata.errors import ConfigError

LABELS = st.integers(2, 6).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c - 1), max_size=80)))


def ids(n: int) -> list[str]:
    return [f"{i:03d}" for i in range(n)]


@given(LABELS, st.floats(0, 1), st.sampled_from(["flip", "uniform"]), st.integers(0, 9))
def test_noise_is_pure_and_in_range(drawn, rate, convention, seed) -> None:
    num_classes, labels = drawn
    noise = LabelNoise(rate=rate, convention=convention, seed=seed)
    noisy = noise.labels(ids(len(labels)), np.array(labels, dtype=np.int64), num_classes)
    assert ((noisy >= 0) & (noisy < num_classes)).all()
    for i in reversed(range(len(labels))):
        assert noise.label(f"{i:03d}", labels[i], num_classes) == noisy[i]


@given(LABELS, st.floats(0, 1), st.floats(0, 1))
def test_what_little_noise_changes_more_noise_changes_alike(drawn, a, b) -> None:
    num_classes, labels = drawn
    low, high = sorted((a, b))
    for image_id, label in zip(ids(len(labels)), labels, strict=True):
        little = LabelNoise(rate=low).label(image_id, label, num_classes)
        assert little in (label, LabelNoise(rate=high).label(image_id, label, num_classes))


def test_all_flipped_labels_are_wrong_and_no_label_stays_none() -> None:
    noise = LabelNoise(rate=1.0)
    assert all(noise.label(image_id, 2, 5) != 2 for image_id in ids(500))
    assert {noise.label(image_id, 2, 5) for image_id in ids(500)} == {0, 1, 3, 4}
    assert {LabelNoise(rate=1.0, convention="uniform").label(i, 2, 5) for i in ids(500)} == {0, 1, 2, 3, 4}
    assert noise.label("a", -1, 5) == -1


@given(LABELS, st.sampled_from(["exponential", "step"]), st.floats(1, 50), st.floats(1, 50))
def test_stronger_imbalance_keeps_a_part(drawn, kind, a, b) -> None:
    num_classes, labels = drawn
    labels_N, low_high = np.array(labels, dtype=np.int64), sorted((a, b))
    weak, strong = (
        ClassImbalance(kind=kind, ratio=r).keep_N(ids(len(labels)), labels_N, num_classes) for r in low_high
    )
    assert not (strong & ~weak).any()
    largest = max((labels.count(c) for c in range(num_classes)), default=0)
    counts = ClassImbalance(kind=kind, ratio=low_high[1]).counts_C(largest, num_classes)
    for c in range(num_classes):
        assert strong[labels_N == c].sum() == min(counts[c], labels.count(c))


def test_values_out_of_range_are_refused() -> None:
    for make in (
        lambda: LabelNoise(rate=1.5),
        lambda: LabelNoise(rate=0.1, convention="pair"),  # type: ignore[arg-type]
        lambda: ClassImbalance(ratio=0.5),
        lambda: ClassImbalance(kind="linear", ratio=2),  # type: ignore[arg-type]
        lambda: ClassImbalance(ratio=2).keep_N(["a"], np.array([-1]), 3),
    ):
        with pytest.raises(ConfigError):
            make()


@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1), st.integers(-1, 120)
    ),
    st.randoms(),
)
def test_the_hash_of_labels_is_that_of_their_sorted_lines_in_any_order(labels: dict[str, int], random: Random) -> None:
    text = "".join(sorted(f"{label} {image_id}\n" for image_id, label in labels.items()))
    shuffled = list(labels.items())
    random.shuffle(shuffled)
    for at_once in (1, 3, 1 << 17):
        with mock.patch.object(corruption, "_SORTED_AT_ONCE", at_once):
            assert labels_sha256(shuffled) == hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_of_labels_takes_no_more_memory_for_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruption, "_SORTED_AT_ONCE", 1 << 10)
    peaks = []
    for num_images in (1 << 12, 1 << 15):
        tracemalloc.start()
        labels_sha256((f"n{number % 97}/{number}.jpeg", number % 1000) for number in range(num_images))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0], "eight times as many, each run with the buffer of a file"
