"""Subsets of any store: every chosen view once an epoch over all ranks, and never another one."""

from __future__ import annotations

import uuid
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kddata import order
from kddata.errors import ConfigError
from kddata.reader import order_of
from kddata.store import LabelStore, choose
from kddata.testing import begin_small_store, made_up_rows, small_spec


def store_of(images: tuple[int, ...], views: int, unit_images: int, unit_views: int | None, bad: int) -> LabelStore:
    """A committed store of made-up rows in which every `bad`-th image is bad; 0 for none."""
    spec = small_spec(unit_images=unit_images, unit_views=unit_views)
    store = begin_small_store(f"memory://{uuid.uuid4().hex}", spec=spec, images=images, views_per_image=views)
    for unit in store.units():
        out = tuple(x for x in store.read_index(unit)[0] if bad and int(x.rpartition("-")[2]) % bad == bad - 1)
        store.write_unit(unit, [made_up_rows(store, unit, leave_out=out)], bad=[(x, "made up") for x in out])
    store.commit()
    return store


STORES = st.builds(
    store_of,
    st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple).filter(sum),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([0, 3]),
)


def rows_of(store: LabelStore, choice) -> Counter:
    found: Counter = Counter()
    for unit in store.units():
        rows = store.read(unit.number).take(choice.rows(unit))
        found.update(zip(rows.image_id, rows.view.tolist(), strict=True))
    return found


@settings(max_examples=40, deadline=None)
@given(STORES, st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_share_is_whole_images_and_a_part_of_a_larger_share(store: LabelStore, a: float, b: float) -> None:
    chosen = []
    for share in sorted((a, b)):
        try:
            choice = choose(store, share)
        except ConfigError:  # of few images, none may be chosen
            chosen.append(Counter())
            continue
        chosen.append(rows_of(store, choice))
        assert sum(chosen[-1].values()) == choice.rows_per_unit(store.units()).sum()
        assert set(Counter(image_id for image_id, _ in chosen[-1]).values()) == {store.views_per_image}
    assert not chosen[0] - chosen[1]
    every = rows_of(store, choose(store))
    assert max(every.values(), default=1) == 1
    assert sum(every.values()) == store.num_rows
    assert not chosen[1] - every


@settings(max_examples=30, deadline=None)
@given(STORES, st.data(), st.integers(1, 3))
def test_chosen_views_come_once_an_epoch_over_all_ranks(store: LabelStore, data: st.DataObject, world: int) -> None:
    good = sorted({image_id for unit in store.units() for image_id in store.read(unit.number).image_id})
    if not good:
        return
    wanted = tuple(data.draw(st.lists(st.sampled_from(good), min_size=1, unique=True)))
    choice = choose(store, wanted)
    rows, batch, seen = order_of(store, 1, choice), data.draw(st.integers(1, 9)), Counter()
    for step in range(order.num_steps(rows.num_rows, batch)):
        start, stop = order.step_range(step, rows.num_rows, batch)
        for rank in range(world):
            for unit, row in rows.rows(0, *order.rank_range(start, stop, rank, world)).tolist():
                place = choice.rows(store.units()[unit])[row]
                found = store.read(unit).take([place])
                seen[found.image_id[0], int(found.view[0])] += 1
    assert seen == Counter({(image_id, view): 1 for image_id in wanted for view in range(store.views_per_image)})


def test_classes_choose_their_images_and_what_is_not_there_is_named() -> None:
    store = store_of((6, 4), 2, 3, None, 0)
    labels = {}
    for unit in store.units():
        rows = store.read(unit.number)
        labels |= dict(zip(rows.image_id, rows.label.tolist(), strict=True))
    chosen = rows_of(store, choose(store, (0, 3)))
    assert {image_id for image_id, _ in chosen} == {x for x, label in labels.items() if label in (0, 3)}
    for wrong, message in (((0, 99), "99"), (("nobody",), "nobody"), (0.0, "share"), (1.5, "share")):
        with pytest.raises(ConfigError, match=message):
            choose(store, wrong)
    with pytest.raises(ConfigError, match="at least one image"):
        choose(store, None, lambda ids, labels: np.zeros(len(ids), bool))
