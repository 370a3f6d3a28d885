"""Augmented and mixed views on their whole way: labelled, stored in both codecs, and replayed to the very pixels."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch

from kddata import care, errors, losses
from kddata.images import decode, open_source
from kddata.labelling import LabellingJob, label_store
from kddata.order import Order
from kddata.reader import Reader, open_images
from kddata.replay import loader
from kddata.store import LabelStore
from kddata.store.rows import objects
from kddata.teacher import build_network
from kddata.testing import (
    begin_small_store,
    fake_teacher,
    fake_teacher_args,
    made_up_rows,
    make_images,
    make_store,
    small_spec,
)
from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob, train
from kddata.views import Mix, ViewPlan, pixel_hash, render

PLANS = {
    "color": ViewPlan(seed=4, policy="color"),
    "mixup": ViewPlan(seed=4, policy="randaugment", erase_p=0.5, mix="mixup"),
    "cutmix": ViewPlan(seed=4, mix="cutmix"),
}


@pytest.fixture(scope="module", params=[("color", "exact"), ("mixup", "exact"), ("cutmix", "compact")], ids=str)
def store(request, tmp_path_factory) -> LabelStore:
    plan, codec = request.param
    return make_store(
        tmp_path_factory.mktemp(plan), num_images=10, views_per_image=4, plan=PLANS[plan], codec=codec, unit_images=4
    )


def whole_images(store: LabelStore) -> dict[str, torch.Tensor]:
    source, images = open_source(store.location), {}
    for name in source.shard_names():
        for ref, data in source.stream(name, source.scan(name)[1]):
            images[ref.image_id] = decode(data, max_pixels=10**6)
    return images


def clear_pixels(store: LabelStore, images: dict[str, torch.Tensor], unit: int, image_id: str, view: int, size_px: int):
    """The pixels of a view by the plan alone: what labelling and replay must both come to."""
    plan = store.spec.plan

    def cut(image_id: str, mix: Mix | None = None, partner: torch.Tensor | None = None) -> torch.Tensor:
        image = images[image_id]
        drawn = dataclasses.replace(plan.draw(image_id, view, *image.shape[1:]), mix=mix)
        return render(image, drawn, size_px=size_px, interpolation=plan.interpolation, partner=partner)

    mix = plan.draw_mix(store.read_index(store.units()[unit])[0], image_id, view)
    return cut(image_id, mix, None if mix is None else cut(mix.partner))


def test_the_teacher_saw_and_replay_renders_the_pixels_of_the_plan(store):
    images, proven = whole_images(store), 0
    unit_of, stored = {}, {}
    for unit in store.units():
        rows = store.read(unit.number)
        unit_of |= dict.fromkeys(rows.image_id, unit.number)
        stored |= {(rows.image_id[i], int(rows.view[i])): (rows, i) for i in range(len(rows))}
    teacher = fake_teacher()
    for batch in loader(store, batch_size=16, size_px=24, teacher_px=16):
        said = teacher(batch.teacher_pixels_u8).topk(3, dim=1).indices
        assert torch.equal(said.int(), batch.labels.ids_BK)
        for i, key in enumerate(zip(batch.image_ids, batch.view_indices, strict=True)):
            rows, row = stored[key]
            unit = unit_of[key[0]]
            assert torch.equal(batch.pixels_u8_B3SS[i], clear_pixels(store, images, unit, *key, 24))
            assert torch.equal(batch.teacher_pixels_u8[i], clear_pixels(store, images, unit, *key, 16))
            if rows.has_pixel_hash[row]:
                assert pixel_hash(batch.teacher_pixels_u8[i]) == rows.pixel_hash[row]
                proven += 1
    assert proven >= 3


def test_batches_carry_the_pair_of_a_mix(store):
    truth = {image_id: label for u in store.units() for image_id, label, *_ in zip(*store.read_index(u), strict=True)}
    rows = [store.read(unit.number) for unit in store.units()]
    mixes = {(r.image_id[i], int(r.view[i])): r.view_at(i).mix for r in rows for i in range(len(r))}
    for batch in loader(store, batch_size=16, size_px=8):
        if not store.spec.plan.has_mix:
            assert batch.targets2_B is batch.lam_B is None
            continue
        for i, key in enumerate(zip(batch.image_ids, batch.view_indices, strict=True)):
            assert batch.targets_B[i] == truth[key[0]]
            mix = mixes[key]  # None for the image that is alone in its unit
            assert batch.targets2_B[i] == truth[key[0] if mix is None else mix.partner]
            assert batch.lam_B[i] == torch.tensor(1.0 if mix is None else mix.lam)


def test_an_order_that_cuts_units_finds_every_partner(store):
    order = Order(rows_per_unit=store.rows_per_unit, seed=1, window_rows=7)
    whole = Reader(store, open_images(store), dataclasses.replace(order, window_rows=1000)).read(0, 0, 40)
    by_key = {(whole.rows.image_id[i], int(whole.rows.view[i])): data for i, data in enumerate(whole.images)}
    reader = Reader(store, open_images(store), order)
    for start in range(0, 40, 5):
        read = reader.read(0, start, start + 5)
        for i, data in enumerate(read.images):
            assert data == by_key[read.rows.image_id[i], int(read.rows.view[i])]
        if store.spec.plan.has_mix:
            mixes = [mix for mix in read.rows.mix if mix is not None]
            partners = list(zip(read.partner_rows.image_id, read.partner_rows.view.tolist(), strict=True))
            assert partners == [(mix.partner, mix.partner_view) for mix in mixes]
            assert [by_key[key] for key in partners] == read.partner_images


def test_a_partner_that_cannot_be_used_leaves_the_view_unmixed(tmp_path):
    location = make_images(tmp_path / "images", num_images=8, shards=1, form="folder", labelled=False)
    for name in ("image-00002", "image-00005"):
        (Path(location) / f"{name}.jpg").write_bytes(b"no image")
    job = LabellingJob(
        images=location,
        store=str(tmp_path / "store"),
        teacher=fake_teacher_args(),
        plan=ViewPlan(mix="mixup"),
        views_per_image=6,
        k=3,
        bad_images=0.5,
    )
    store = label_store(job).store
    rows, ids = store.read(0), store.read_index(store.units()[0])[0]
    unmixed = 0
    for i in range(len(rows)):
        drawn = job.plan.draw_mix(ids, rows.image_id[i], int(rows.view[i]))
        spoilt = drawn.partner in ("image-00002.jpg", "image-00005.jpg")
        assert rows.view_at(i).mix == (None if spoilt else drawn)
        unmixed += spoilt
    assert 1 <= unmixed < len(rows) == 36
    assert sorted(image_id for image_id, _ in store.info()["bad"]) == ["image-00002.jpg", "image-00005.jpg"]
    (batch,) = loader(store, batch_size=64, size_px=8)
    assert int((batch.lam_B == 1).sum()) == unmixed
    assert set(batch.targets2_B.tolist()) == {-1}


def test_images_decoded_for_mixing_are_bounded_and_change_nothing(tmp_path, monkeypatch):
    plan = ViewPlan(mix="cutmix")
    first = make_store(tmp_path / "a", num_images=6, views_per_image=3, plan=plan)
    monkeypatch.setattr("kddata.labelling.mixing._KEPT_BYTES", 1)
    again = make_store(tmp_path / "b", num_images=6, views_per_image=3, plan=plan)
    assert [unit["sha256"] for unit in first.manifest["units"]] == [unit["sha256"] for unit in again.manifest["units"]]


@pytest.mark.parametrize("codec", ["exact", "compact"])
@pytest.mark.parametrize("plan", PLANS)
def test_ops_and_mixes_come_back_as_they_were_written(codec, plan):
    spec = dataclasses.replace(small_spec(), plan=PLANS[plan], codec=codec)
    store = begin_small_store(f"memory://mixed/{codec}-{plan}", spec=spec)
    for unit in store.units():
        store.write_unit(
            unit,
            [made_up_rows(store, unit, leave_out=store.read_index(unit)[0][:1])],
            bad=[(image_id, "left out") for image_id in store.read_index(unit)[0][:1]],
        )
    store.commit()
    for unit in store.units():
        rows = made_up_rows(store, unit, leave_out=store.read_index(unit)[0][:1])
        back = store.read(unit.number)
        assert [back.view_at(i) for i in range(len(back))] == [rows.view_at(i) for i in range(len(rows))]
        assert (back.ops is None, back.mix is None) == (not spec.plan.has_ops, not spec.plan.has_mix)
        assert (back.partners() >= 0).tolist() == [back.view_at(i).mix is not None for i in range(len(back))]
    assert store.verify() == []


def test_a_plan_without_ops_and_mixes_stores_no_columns_for_them():
    store = begin_small_store("memory://mixed/plain")
    assert made_up_rows(store, store.units()[0]).ops is None
    rows = made_up_rows(store, store.units()[0])
    with pytest.raises(ValueError, match="ops where the store's plan draws ops"):
        store.write_unit(store.units()[0], [dataclasses.replace(rows, ops=objects([()] * len(rows)))])


def test_an_op_of_a_newer_library_and_a_broken_mix_are_named(monkeypatch):
    spec = dataclasses.replace(small_spec(), plan=PLANS["mixup"])
    store = begin_small_store("memory://mixed/newer", spec=spec, images=(3,), views_per_image=1)
    (unit,) = store.units()
    rows = made_up_rows(store, unit)
    store.write_unit(unit, [rows])
    store.commit()
    with monkeypatch.context() as older:
        older.setattr("kddata.ops.NAMES", ("erase/1",))
        with pytest.raises(errors.StoreVersionError, match=r"knows the ops erase/1; got [a-z]+/1 .*upgrade kddata"):
            store.read(0)
    lost = rows.take([0, 2])
    lost.mix[0] = Mix(kind="mixup", partner=rows.image_id[1], partner_view=0, lam=0.5)
    with pytest.raises(errors.StoreDamagedError, match="mixed with another one of its unit; got view 0 of"):
        lost.partners()


def test_a_unit_of_one_image_is_unmixed(tmp_path):
    store = make_store(tmp_path, num_images=4, unit_images=1, plan=ViewPlan(mix="mixup"))
    assert all(mix is None for unit in store.units() for mix in store.read(unit.number).mix)


def test_mixed_stores_are_extended_repaired_proven_and_audited(tmp_path):
    job = LabellingJob(
        images=make_images(tmp_path / "images", num_images=6, num_classes=10),
        store=str(tmp_path / "grown"),
        teacher=fake_teacher_args(),
        plan=PLANS["cutmix"],
        views_per_image=2,
        unit_views=2,
        k=3,
    )
    label_store(job)
    job = dataclasses.replace(job, views_per_image=4)
    grown = label_store(job, extend=True).store
    whole = label_store(dataclasses.replace(job, store=str(tmp_path / "whole"))).store
    hashes = [sorted(unit["sha256"] for unit in store.manifest["units"]) for store in (grown, whole)]
    for unit in whole.units():
        (same,) = [u for u in grown.units() if dataclasses.replace(u, number=unit.number) == unit]
        found, wanted = grown.read(same.number), whole.read(unit.number)
        assert [found.view_at(i) for i in range(len(found))] == [wanted.view_at(i) for i in range(len(wanted))]
        assert torch.equal(found.labels.log_p_BK, wanted.labels.log_p_BK)
    lost = tmp_path / "grown" / grown.manifest["units"][1]["file"]
    lost.unlink()
    assert list(care.repair(job).files) == [grown.manifest["units"][1]["file"]]
    again = LabelStore.open(job.store)
    assert sorted(unit["sha256"] for unit in again.manifest["units"]) == hashes[0]
    assert again.verify() == []
    assert care.check_pixels(again) == []
    said = care.audit(again, fake_teacher(), views=24)
    assert said.top1_match == 1.0


def flat_net(num_classes: int) -> torch.nn.Module:
    """Without BatchNorm and dropout, so that a loss can be recomputed from its weights alone."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, num_classes))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "kd", "temperature": 1.0, "alpha": 0.25, "label_smoothing": 0.1},
        {"name": "hard"},
        {"name": "dist", "tail": "renorm"},
    ],
    ids=lambda method: method["name"],
)
def test_the_hard_term_of_training_is_that_of_the_pair(tmp_path, monkeypatch, method):
    store = make_store(tmp_path, num_images=8, views_per_image=2, plan=PLANS["cutmix"])
    monkeypatch.setitem(sys.modules, "flat", types.SimpleNamespace(net=flat_net))
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch="python:flat:net", num_classes=10),
        method=method,
        data=DataArgs(batch_size=16, size_px=16),
        optimizer=OptimizerArgs(lr=0.1, epochs=1),
    )
    (found,) = train(job).loss_S
    (batch,) = loader(store, batch_size=16, size_px=16)
    logits = build_network("python:flat:net", num_classes=10, seed=0)(batch.pixels_u8_B3SS / 255).detach()
    each = [
        losses.hard_loss(logits, targets, label_smoothing=method.get("label_smoothing", 0.0), reduction="none")
        for targets in (batch.targets_B, batch.targets2_B)
    ]
    hard = float((batch.lam_B * each[0] + (1 - batch.lam_B) * each[1]).mean())
    if method["name"] == "hard":
        wanted = hard
    elif method["name"] == "kd":
        wanted = 0.25 * float(losses.kd_loss(logits, batch.labels, temperature=1.0)) + 0.75 * hard
    else:
        wanted = float(losses.make("dist", tail="renorm", hard_weight=0)(logits, batch.labels)) + hard
    assert found == pytest.approx(wanted, rel=1e-5)
    assert int((batch.targets_B != batch.targets2_B).sum()) > 0


def test_methods_that_need_one_class_a_view_refuse_mixed_views(store):
    has_mix = store.spec.plan.has_mix
    for name in ("dkd", "nkd", "wsld", "ofa"):
        method = losses.make(name, tail="renorm", temperature=1.0)
        asked = {"k": 3, "num_classes": 10, "temperatures": (1.0,), "has_targets": True, "mixed": has_mix}
        if not has_mix:
            method.check(**asked)
            continue
        match = rf"method {name} needs one class for each view; got views mixed of two images .*Next: use method kd"
        with pytest.raises(errors.ConfigError, match=match):
            method.check(**asked)
        targets = torch.zeros(2, dtype=torch.long)
        with pytest.raises(errors.ConfigError, match="has one target for each view; got a pair"):
            method(torch.zeros(2, 10), None, targets, targets2_B=targets, lam=0.5)
