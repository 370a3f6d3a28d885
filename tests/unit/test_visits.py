"""Views per visit: the same views and pixels from fewer decodes, for any ranks, workers and restarts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kddata import cutting
from kddata.replay import Batch, Replay, loader
from kddata.store import LabelStore
from kddata.testing import make_store
from kddata.views import ViewPlan

# 24 images x 8 views in units of 5 images: 192 rows


@pytest.fixture(scope="module", params=["none", "cutmix"])
def store(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> LabelStore:
    plan = ViewPlan(seed=1, mix=request.param)
    return make_store(tmp_path_factory.mktemp("visits"), num_images=24, views_per_image=8, unit_images=5, plan=plan)


def by_view(batches: list[Batch]) -> dict[tuple[str, int], tuple[object, ...]]:
    """Everything that a batch holds of each view."""
    found: dict[tuple[str, int], tuple[object, ...]] = {}
    for batch in batches:
        columns = [batch.pixels_u8_B3SS, batch.labels.ids_BK, batch.labels.log_p_BK, batch.targets_B]
        columns += [x for x in (batch.teacher_pixels_u8, batch.targets2_B, batch.lam_B) if x is not None]
        for i, key in enumerate(zip(batch.image_ids, batch.view_indices, strict=True)):
            assert key not in found
            found[key] = tuple(column[i].numpy().tobytes() for column in columns)
    return found


def keys(batches: list[Batch]) -> list[tuple[str, int]]:
    return [key for batch in batches for key in zip(batch.image_ids, batch.view_indices, strict=True)]


def batches(store: LabelStore, views_per_visit: int = 4, **more: object) -> list[Batch]:
    return list(loader(store, batch_size=12, size_px=8, teacher_px=12, views_per_visit=views_per_visit, **more))


def test_each_view_is_the_one_that_it_is_alone(store):
    assert by_view(batches(store)) == by_view(batches(store, 1))
    assert keys(batches(store)) != keys(batches(store, 1))


def test_an_image_is_decoded_once_a_visit(store, monkeypatch):
    decoded = []
    decode = cutting.decode
    monkeypatch.setattr(cutting, "decode", lambda data, **more: decoded.append(data) or decode(data, **more))
    monkeypatch.setattr(cutting, "_partner", lambda read, place: None)  # those are decoded one by one
    monkeypatch.setattr(cutting, "render", lambda *_, size_px, **more: torch.zeros(3, size_px, size_px))
    batches(store)
    assert set(Counter(decoded).values()) <= {1, 2}  # two visits an image; two that begin in one step share it
    assert 40 <= len(decoded) <= 48


def test_nothing_waits_after_an_epoch_and_a_bounded_number_in_it(store):
    replay = Replay(store, batch_size=12, size_px=8, seed=0, views_per_visit=4)
    waiting = []
    for step in range(replay.steps_per_epoch):
        replay[step]
        waiting.append(len(replay._waiting))
    assert waiting[-1] == 0
    assert 12 < max(waiting) <= 16 * 12


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_one_sequence(store, world_size):
    ranks = [batches(store, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = batches(store)
    assert [keys(list(shares)) for shares in zip(*ranks, strict=True)] == [keys([batch]) for batch in alone]
    assert by_view([batch for rank in ranks for batch in rank]) == by_view(alone)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_cut_parts_of_steps_change_nothing(store, num_workers):
    alone, shared = batches(store), batches(store, num_workers=num_workers)
    assert keys(shared) == keys(alone)
    assert by_view(shared) == by_view(alone)
    assert [len(batch) for batch in shared] == [len(batch) for batch in alone]
    assert [batch.step_rows for batch in shared] == [batch.step_rows for batch in alone]
    assert len(loader(store, batch_size=12, size_px=8, views_per_visit=4, num_workers=num_workers)) == len(alone)


def test_a_later_start_gives_the_rest_and_steps_may_come_in_any_order(store):
    whole, rest = batches(store, epoch=2), batches(store, epoch=2, start_step=5, world_size=1)
    assert keys(rest) == keys(whole[5:])
    assert by_view(rest) == by_view(whole[5:])
    replay = Replay(store, batch_size=12, size_px=8, seed=0, teacher_px=12, views_per_visit=4)
    steps = [3, 1, 9, 9, 2]
    assert [by_view([replay[step]]) for step in steps] == [by_view([batches(store)[step]]) for step in steps]


def test_a_subset_is_visited_the_same_way(store):
    part, alone = batches(store, subset=0.5), batches(store, 1, subset=0.5)
    assert by_view(part) == by_view(alone)
    assert 0 < len(by_view(part)) < 192


@pytest.mark.parametrize("num_workers", [0, 2])
def test_views_together_are_side_by_side_in_a_step_and_the_same_as_alone(store, num_workers):
    pairs = batches(store, 1, views_together=2, num_workers=num_workers)
    assert by_view(pairs) == by_view(batches(store, 1))
    for batch in pairs:
        assert batch.image_ids[::2] == batch.image_ids[1::2]
        assert all(b == a + 1 for a, b in zip(batch.view_indices[::2], batch.view_indices[1::2], strict=True))
