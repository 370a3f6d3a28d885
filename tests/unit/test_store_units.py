"""The plan of units is what a list of them would be, and takes no room."""

from __future__ import annotations

import tracemalloc
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kddata.labelling import each_missing_unit, missing_units
from kddata.store import PlannedUnits, Unit
from kddata.store.naming import receipt_name
from kddata.testing import begin_small_store, made_up_rows, small_spec


def plainly(
    num_images: list[int], views: list[tuple[int, int]], unit_images: int, unit_views: int | None
) -> list[Unit]:
    units: list[Unit] = []
    for shard, (count, (first, stop)) in enumerate(zip(num_images, views, strict=True)):
        for piece, start in enumerate(range(0, count, unit_images)):
            for view in range(first, stop, unit_views or max(1, stop - first)):
                units.append(
                    Unit(
                        number=7 + len(units),
                        shard=shard,
                        piece=piece,
                        start=start,
                        stop=min(start + unit_images, count),
                        view_start=view,
                        view_stop=stop if unit_views is None else min(view + unit_views, stop),
                    )
                )
    return units


@given(
    shards=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 5)), max_size=6),
    unit_images=st.integers(1, 5),
    unit_views=st.none() | st.integers(1, 4),
)
def test_a_plan_is_the_list_of_its_units(shards, unit_images, unit_views):
    num_images, views = [n for n, _, _ in shards], [(first, first + span) for _, first, span in shards]
    wanted = plainly(num_images, views, unit_images, unit_views)
    plan = PlannedUnits(num_images, views=views, unit_images=unit_images, unit_views=unit_views, first_number=7)
    assert list(plan) == wanted
    assert len(plan) == len(wanted)
    assert [plan[i] for i in range(-len(wanted), len(wanted))] == wanted + wanted
    assert plan[1:-1] == wanted[1:-1]
    assert list(reversed(plan)) == wanted[::-1]
    with pytest.raises(IndexError):
        plan[len(wanted)]


def test_a_million_units_take_two_bytes_each():
    """Of which one says whether it is finished; a list of them took 150."""
    store = begin_small_store("memory://a-million", spec=small_spec(unit_images=1, unit_views=1), images=(10,))
    plan = PlannedUnits([1000] * 1000, views=[(0, 1)] * 1000, unit_images=1, unit_views=1)
    store._units = plan
    tracemalloc.start()
    try:
        first = sum(1 for _ in islice(each_missing_unit(store), 20_000))  # each is made and dropped
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (first, len(plan)) == (20_000, 10**6)
    assert peak < 2 * 10**6


def test_missing_units_are_those_without_a_receipt():
    store = begin_small_store("memory://some-missing", images=(6, 0, 3))
    units = list(store.units())
    assert missing_units(store) == units
    for unit in (units[1], units[-1]):
        store.write_unit(unit, [made_up_rows(store, unit)])
    assert missing_units(store) == [units[0], *units[2:-1]]


def test_what_is_finished_is_found_in_bytes_a_unit(tmp_path):
    """Of 5,000 receipts, whose names alone would take 100 bytes each."""
    store = begin_small_store(str(tmp_path), spec=small_spec(unit_images=1, unit_views=1), images=(10,))
    store._units = PlannedUnits([1000] * 8, views=[(0, 1)] * 8, unit_images=1, unit_views=1)
    (tmp_path / "receipts").mkdir()
    for number in range(0, 10_000, 2):  # of which 1,000 are of no unit
        (tmp_path / receipt_name(number)).touch()
    tracemalloc.start()
    try:
        missing = sum(1 for unit in each_missing_unit(store))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert missing == 4_000
    assert peak < 10 * 8_000
