"""Replay: the stored views, bit for bit, shared out evenly, for evaluation too."""

from __future__ import annotations

import pickle

import pytest
import torch

from kddata.errors import ConfigError, KddataError, StoreMismatchError
from kddata.images import decode, open_source
from kddata.replay import Batch, Replay, evaluation_loader, evaluation_view, loader
from kddata.store import LabelStore
from kddata.testing import make_images, make_store
from kddata.views import View, ViewPlan, pixel_hash, render

# 13 images x 4 views: 52 rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    return make_store(tmp_path_factory.mktemp("replay"), num_images=13, views_per_image=4, unit_images=4)


def keys(batches: list[Batch]) -> list[tuple[str, int]]:
    return [key for batch in batches for key in zip(batch.image_ids, batch.view_indices, strict=True)]


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.pixels_u8_B3SS, b.pixels_u8_B3SS)
        and torch.equal(a.labels.log_p_BK, b.labels.log_p_BK)
        and torch.equal(a.labels.ids_BK, b.labels.ids_BK)
        and torch.equal(a.targets_B, b.targets_B)
        and keys([a]) == keys([b])
        and a.step_rows == b.step_rows
    )


def test_pixels_labels_and_targets_are_those_of_the_stored_views(store):
    source = open_source(store.location)
    images, truth = {}, {}
    for name in source.shard_names():
        for ref, data in source.stream(name, source.scan(name)[1]):
            images[ref.image_id], truth[ref.image_id] = decode(data, max_pixels=10**6), ref.label
    stored = {}
    for unit in range(len(store.rows_per_unit)):
        rows = store.read(unit)
        stored |= {(rows.image_id[i], int(rows.view[i])): (rows, i) for i in range(len(rows))}
    plan, proven = store.spec.plan, 0
    for batch in loader(store, batch_size=16, size_px=24, teacher_px=store.spec.teacher.size_px):
        for i, key in enumerate(keys([batch])):
            rows, row = stored[key]
            image = images[key[0]]
            view = plan.draw(*key, image.shape[1], image.shape[2])
            assert view == rows.view_at(row)
            wanted = render(image, view, size_px=24, interpolation=plan.interpolation)
            assert torch.equal(batch.pixels_u8_B3SS[i], wanted)
            if rows.has_pixel_hash[row]:
                assert batch.teacher_pixels_u8 is not None
                assert pixel_hash(batch.teacher_pixels_u8[i]) == rows.pixel_hash[row]
                proven += 1
            assert torch.equal(batch.labels.ids_BK[i], rows.labels.ids_BK[row])
            assert torch.equal(batch.labels.log_tail_BT[i], rows.labels.log_tail_BT[row])
            assert batch.targets_B[i] == truth[key[0]]
    assert proven >= 1


def test_every_view_comes_once_an_epoch_and_epochs_differ(store):
    first, second = (keys(list(loader(store, batch_size=16, size_px=8, epoch=epoch))) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 52
    assert first != second
    assert keys(list(loader(store, batch_size=16, size_px=8, epochs=2))) == first + second


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_step_of_the_one_sequence(store, world_size):
    alone = list(loader(store, batch_size=16, size_px=8))
    ranks = [list(loader(store, batch_size=16, size_px=8, rank=r, world_size=world_size)) for r in range(world_size)]
    for step, shares in enumerate(zip(*ranks, strict=True)):
        assert keys(list(shares)) == keys([alone[step]])
        assert {share.step_rows for share in shares} == {len(alone[step])}
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_later_start_gives_the_rest(store):
    whole = list(loader(store, batch_size=16, size_px=8, epoch=3))
    rest = list(loader(store, batch_size=16, size_px=8, epoch=3, start_step=2))
    assert all(same(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_worker_processes_change_nothing(store):
    here = list(loader(store, batch_size=16, size_px=8))
    there = list(loader(store, batch_size=16, size_px=8, num_workers=2))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_a_replay_can_be_pickled(store):
    replay = Replay(store, batch_size=16, size_px=8, seed=0)
    assert same(pickle.loads(pickle.dumps(replay))[1], replay[1])


def test_classes_that_the_teacher_does_not_have_are_refused(tmp_path):
    store = make_store(tmp_path, num_images=6, num_classes=2, image_classes=3, k=2)
    with pytest.raises(StoreMismatchError, match=r"below the teacher's 2; got class 2 of image 'image-0000[25]'"):
        list(loader(store, batch_size=16, size_px=8))


def test_unlabelled_images_have_target_minus_one(tmp_path):
    store = make_store(tmp_path, num_images=4, labelled=False)
    (batch,) = loader(store, batch_size=16, size_px=8)
    assert set(batch.targets_B.tolist()) == {-1}


def test_a_batch_size_below_one_is_refused(store):
    with pytest.raises(ConfigError, match=r"batch_size is at least 1"):
        loader(store, batch_size=0, size_px=8)


@pytest.mark.parametrize(
    ("size", "view"),
    [
        ((28, 28), View(box=(0, 0, 28, 28))),  # as it is
        ((20, 28), View(box=(0, 4, 20, 20))),  # the middle square, not enlarged before
        ((100, 64), ViewPlan(policy="center", center_px=28).draw("", 0, 100, 64)),
    ],
)
def test_the_evaluation_view(size, view):
    assert evaluation_view(*size, 28) == view


def test_evaluation_images_come_in_order_with_their_labels(tmp_path):
    source = open_source(make_images(tmp_path, num_images=11, num_classes=3, min_px=28, max_px=28, encoding="png"))
    batches = list(evaluation_loader(source, size_px=28, batch_size=4))
    assert [i for batch in batches for i in batch.image_ids] == [f"image-{i:05d}" for i in range(11)]
    assert torch.cat([batch.targets_B for batch in batches]).tolist() == [i % 3 for i in range(11)]
    name = source.shard_names()[0]
    data = next(source.stream(name, source.scan(name)[1]))[1]
    assert torch.equal(batches[0].pixels_u8_B3SS[0], decode(data, max_pixels=10**6))


def test_an_evaluation_image_that_cannot_be_read_is_an_error(tmp_path):
    location = make_images(tmp_path, num_images=4, form="folder")
    (tmp_path / "class-000" / "text.jpg").write_text("no image")
    with pytest.raises(KddataError, match="of a known format"):
        list(evaluation_loader(open_source(location), size_px=8))
