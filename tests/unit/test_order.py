"""Order by example: golden sequence, the last step, shuffle quality, refusals."""

import numpy as np
import pytest

from kddata.errors import ConfigError
from kddata.order import WINDOW_ROWS, Order, num_steps, rank_range, step_range, window_rows_for


def test_the_order_of_a_seed_never_changes():
    order = Order(rows_per_unit=np.array([3, 0, 2, 4]), seed=8, window_rows=5)
    assert order.rows(0).tolist() == [[3, 0], [3, 3], [3, 2], [3, 1], [2, 1], [0, 0], [2, 0], [0, 2], [0, 1]]


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "ranges"),
    [
        (1000, 256, [(0, 256), (256, 512), (512, 768), (768, 1000)]),  # a large remainder is a step
        (800, 256, [(0, 256), (256, 512), (512, 768), (768, 800)]),  # 32 = 256 / 8 is large enough
        (799, 256, [(0, 256), (256, 512), (512, 799)]),  # 31 joins the step before
        (21, 8, [(0, 8), (8, 21)]),  # under 16 rows joins, whatever the batch
        (5, 8, [(0, 5)]),  # a short epoch is one step
        (16, 8, [(0, 8), (8, 16)]),
    ],
)
def test_the_last_step(num_rows, batch_size, ranges):
    assert [step_range(s, num_rows, batch_size) for s in range(num_steps(num_rows, batch_size))] == ranges


def test_shares_of_a_step_are_even():
    assert [rank_range(10, 21, rank, 3) for rank in range(3)] == [(10, 13), (13, 17), (17, 21)]


def test_a_window_over_the_whole_epoch_is_a_full_permutation():
    """Correlation of position and stored place: about N(0, 1/sqrt(n)) for a permutation, so 5 sigma is 0.05."""
    order = Order(rows_per_unit=np.full(10, 1000), seed=1, window_rows=10_000)
    stored = order.rows(0) @ np.array([1000, 1])
    assert abs(np.corrcoef(stored, np.arange(10_000))[0, 1]) < 0.05
    gaps = np.abs(np.diff(stored))
    assert abs(gaps.mean() / (10_000 / 3) - 1) < 0.05  # the mean gap of two random places is n / 3


def test_small_windows_mix_units_that_were_stored_apart():
    """With 1/10 of the rows in a window, a batch of 256 sees at least as many units as lie in the window."""
    order = Order(rows_per_unit=np.full(100, 100), seed=1, window_rows=1000)
    batch = order.rows(0, 0, 256)
    assert len(set(batch[:, 0])) == 10
    assert np.ptp(batch[:, 0]) > 50


def test_visits_are_shuffled_as_a_full_permutation_is_and_their_views_are_some_steps_apart():
    """Against what is derived for 10,000 rows of 2,500 images, m = 4, steps of 50 rows.

    Place and stored place are as little correlated as in a permutation of 2,500 (5 sigma: 0.1); two neighbours in the
    unit, views of other images, are a third of the window apart in the mean, and a row lies as far from its stored
    place. The m places of a visit are drawn out of 4 m steps: the mean gap is (4 m + 1) / (m + 1) steps, here 3.4, less
    what runs that are cut short at both ends of the window take.
    """
    order = Order(rows_per_unit=[10_000], views_per_unit=[4], seed=1, window_rows=10_000, visit_views=4, batch_size=50)
    stored = order.rows(0)[:, 1]
    assert abs(np.corrcoef(stored, np.arange(10_000))[0, 1]) < 0.1
    place = np.argsort(stored)
    assert abs(np.abs(place[3:-1:4] - place[4::4]).mean() / (10_000 / 3) - 1) < 0.05
    assert abs(np.abs(stored - np.arange(10_000)).mean() / (10_000 / 3) - 1) < 0.05
    views = np.sort(place.reshape(2500, 4), axis=1)
    assert 3.2 < np.diff(views, axis=1).mean() / 50 < 3.45
    assert (views[:, -1] - views[:, 0]).max() <= 50 * 15
    begun = np.bincount(views[:, 0] // 50, minlength=200)
    assert begun[20:180].reshape(-1, 4).sum(1).max() <= 1.6 * 50  # of 50 that four steps begin in the mean


def test_windows_shrink_for_large_rows():
    assert window_rows_for(200) == WINDOW_ROWS
    assert window_rows_for(8 * 1000) == 2**28 // 8000
    assert window_rows_for(2**30) == 1


def test_refusals():
    with pytest.raises(ConfigError, match="at least one row"):
        Order(rows_per_unit=np.array([0, 0]), seed=0)
    with pytest.raises(ConfigError, match=r"window_rows is at least 1; got 0"):
        Order(rows_per_unit=np.array([1]), seed=0, window_rows=0)
    with pytest.raises(ConfigError, match=r"views_per_visit is at least 1; got 0"):
        Order(rows_per_unit=np.array([1]), seed=0, visit_views=0)
    pairs = {"rows_per_unit": np.array([8]), "seed": 0, "views_per_unit": np.array([4]), "batch_size": 4}
    with pytest.raises(ConfigError, match=r"views_together divides the views of an image in a unit; got 3 and \[4\]"):
        Order(**pairs, together=3)
    with pytest.raises(ConfigError, match=r"views_together divides data.batch_size; got 4 and \[6\]"):
        Order(**{**pairs, "batch_size": 6}, together=4)
    with pytest.raises(ConfigError, match=r"1 where data.views_per_visit is above 1; got 2 and 2"):
        Order(**pairs, together=2, visit_views=2)
    with pytest.raises(ConfigError, match=r"batch_size is at least 1; got 0"):
        num_steps(10, 0)
    with pytest.raises(ValueError, match="outside an epoch"):
        Order(rows_per_unit=np.array([3]), seed=0).window_at(0, 3)
    with pytest.raises(ValueError, match="outside a world"):
        rank_range(0, 4, 2, 2)
