"""Order over random stores: each row once, one sequence from every offset, for every world size."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kddata.order import Order, num_steps, rank_range, step_range


def order_over(images: list[int], views: int, seed: int, window_rows: int, visit_views: int, batch_size: int) -> Order:
    return Order(
        rows_per_unit=views * np.array(images),
        views_per_unit=np.full(len(images), views),
        seed=seed,
        window_rows=window_rows,
        visit_views=visit_views,
        batch_size=batch_size,
    )


orders = st.builds(
    order_over,
    st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    st.integers(1, 9),
    st.integers(0, 2**63),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(1, 40),
)
epochs = st.integers(0, 1000)
groups = st.integers(1, 4)


def order_of_groups(images: list[int], views: int, seed: int, window_rows: int, steps: int, together: int) -> Order:
    return Order(
        rows_per_unit=views * together * np.array(images),
        views_per_unit=np.full(len(images), views * together),
        seed=seed,
        window_rows=window_rows,
        batch_size=steps * together,
        together=together,
    )


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    st.integers(1, 3),
    st.integers(0, 2**63),
    st.integers(1, 200),
    st.integers(1, 20),
    groups,
    epochs,
)
def test_views_together_share_a_step_and_every_row_comes_once(images, views, seed, window_rows, steps, together, epoch):
    order = order_of_groups(images, views, seed, window_rows, steps, together)
    rows = order.rows(epoch)
    assert sorted(map(tuple, rows.tolist())) == all_rows(order)
    for group in rows.reshape(-1, together, 2).tolist():
        (unit, first), *rest = group
        assert rest == [[unit, first + i] for i in range(1, together)]
        assert first % together == 0
    for step in range(num_steps(order.num_rows, order.batch_size)):
        assert step_range(step, order.num_rows, order.batch_size)[0] % together == 0
    if together == 1:
        alone = Order(rows_per_unit=order.rows_per_unit, seed=seed, window_rows=window_rows)
        assert np.array_equal(rows, alone.rows(epoch))


def all_rows(order: Order) -> list[tuple[int, int]]:
    return [(unit, row) for unit, rows in enumerate(order.rows_per_unit) for row in range(rows)]


@given(orders, epochs, st.integers(1, 64), st.integers(1, 9))
def test_every_row_is_seen_once_an_epoch_by_all_ranks_together(order, epoch, batch_size, world_size):
    seen = []
    for step in range(num_steps(order.num_rows, batch_size)):
        start, stop = step_range(step, order.num_rows, batch_size)
        for rank in range(world_size):
            seen += map(tuple, order.rows(epoch, *rank_range(start, stop, rank, world_size)).tolist())
    assert sorted(seen) == all_rows(order)


@given(orders, epochs, st.data())
def test_any_slice_is_a_slice_of_the_one_sequence(order, epoch, data):
    start = data.draw(st.integers(0, order.num_rows))
    stop = data.draw(st.integers(start, order.num_rows))
    assert np.array_equal(order.rows(epoch, start, stop), order.rows(epoch)[start:stop])


@given(orders, epochs)
def test_windows_are_even_and_bounded_and_hold_each_position(order, epoch):
    lengths, position = [], 0
    while position < order.num_rows:
        window = order.window_at(epoch, position)
        assert window.start == position
        last = order.window_at(epoch, window.stop - 1)
        assert last.start == position
        lengths.append(len(window.permutation_W))
        position = window.stop
    assert len(lengths) == order.num_windows
    assert max(lengths) <= order.window_rows
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 10**9), st.integers(1, 10**5), st.integers(1, 64))
def test_steps_cover_the_epoch_and_none_is_tiny(num_rows, batch_size, world_size):
    steps = num_steps(num_rows, batch_size)
    start, stop = step_range(steps - 1, num_rows, batch_size)
    assert stop == num_rows
    assert start == (steps - 1) * batch_size
    assert stop - start >= min(num_rows, batch_size, max(16, batch_size // 8))
    assert stop - start < batch_size + max(16, batch_size // 8)
    shares = [rank_range(start, stop, rank, world_size) for rank in range(world_size)]
    assert shares[0][0] == start
    assert shares[-1][1] == stop
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
    sizes = [b - a for a, b in shares]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=20)
@given(st.integers(0, 2**62), st.integers(0, 1000))
def test_epochs_and_seeds_differ(seed, epoch):
    rows = np.full(8, 32)
    here = Order(rows_per_unit=rows, seed=seed, window_rows=100).rows(epoch)
    assert not np.array_equal(here, Order(rows_per_unit=rows, seed=seed, window_rows=100).rows(epoch + 1))
    assert not np.array_equal(here, Order(rows_per_unit=rows, seed=seed + 1, window_rows=100).rows(epoch))


@given(orders, epochs)
def test_a_visit_is_of_one_image_and_no_larger_than_it_was_asked_to_be(order, epoch):
    window = order.window_at(epoch, 0)
    if order.visit_views == 1:
        assert window.visit_W is None
        return
    found: dict[int, list[tuple[int, int]]] = {}
    for visit, (unit, row) in zip(window.visit_W.tolist(), order.rows(epoch, 0, window.stop).tolist(), strict=True):
        found.setdefault(visit, []).append((unit, row))
    for members in found.values():
        assert len(members) <= order.visit_views
        assert len({(unit, row // order.views_per_unit[unit]) for unit, row in members}) == 1


@given(st.integers(2, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**63))
def test_views_of_a_visit_keep_to_one_column_and_come_in_different_steps(m, visits, runs, batch_size, seed):
    """Where the window is m steps times a whole number, nothing is left over: each visit in one column, one a step."""
    num_rows = runs * m * batch_size  # one column holds `runs` visits
    order = order_over([num_rows], m * visits, seed, 10**9, m, batch_size)
    order = Order(**{**vars(order), "rows_per_unit": np.array([num_rows * visits])})
    window = order.window_at(1, 0)
    for visit in range(num_rows * visits // m):
        places = np.flatnonzero(window.visit_W == visit)
        assert len(places) == m
        assert len(set((places % batch_size).tolist())) == 1
        steps = places // batch_size
        assert len(set(steps.tolist())) == m
        assert steps.max() - steps.min() < 4 * m


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any), st.integers(0, 2**63), epochs)
def test_one_view_a_visit_is_the_order_of_old(images, seed, epoch):
    old = Order(rows_per_unit=3 * np.array(images), seed=seed, window_rows=50)
    assert np.array_equal(old.rows(epoch), order_over(images, 3, seed, 50, 1, 7).rows(epoch))
