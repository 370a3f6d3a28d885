"""Random streams: pure, keyed by every part, pinned."""

import numpy as np
import pytest

from kddata.rng import key_bytes, stream, unit_interval


def test_streams_are_pinned():
    """Views and orders of existing stores depend on these numbers."""
    assert key_bytes(0, "view", 1).hex() == PINNED_KEY
    assert stream(0, "view", 1).random(2).tolist() == PINNED_RANDOM
    assert unit_interval(0, "view", 1) == PINNED_UNIT


PINNED_KEY = "6a1f598fbc075aee79cb662ae1efb00a"
PINNED_RANDOM = [0.15681689303270874, 0.9370105828408317]
PINNED_UNIT = 0.9310612521506737


def test_a_stream_is_pure():
    assert stream(3, "a", 1).bytes(64) == stream(3, "a", 1).bytes(64)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 1), (1, 0)),  # seeds and keys are not added
        ((1, 2, 3), (1, 23)),
        ((1, "ab", "c"), (1, "a", "bc")),  # borders count
        ((1, "1"), (1, 1)),  # types count
        ((0,), (0, 0)),
        ((0, ""), (0,)),
        ((-1,), (1,)),
    ],
)
def test_every_part_and_border_counts(one, other):
    assert key_bytes(*one) != key_bytes(*other)
    assert stream(*one).random() != stream(*other).random()


@pytest.mark.parametrize("key", [True, 1.0, None, b"a"])
def test_a_key_holds_ints_and_strings(key):
    with pytest.raises(TypeError, match="a stream key holds ints and strings; got "):
        stream(0, key)


def test_numpy_integers_are_refused_rather_than_guessed():
    with pytest.raises(TypeError, match="ints and strings"):
        key_bytes(0, np.int64(3))


def test_unit_intervals_are_uniform():
    values = np.array([unit_interval(0, i) for i in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.025  # standard error 0.0046
    assert abs((values < 0.1).mean() - 0.1) < 0.025  # standard error 0.0047
