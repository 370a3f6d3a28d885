"""The compact codec: what it keeps exactly, and how far its rounding goes."""

import dataclasses
import io
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kddata import errors
from kddata.cards import StoreSpec, TeacherCard
from kddata.labels import SoftLabels
from kddata.store import LabelRows, Unit, columns, compact, formats
from kddata.store.storage import HashingWriter
from kddata.testing import small_spec, soft_labels
from kddata.views import ViewPlan


def spec_for(labels: SoftLabels) -> StoreSpec:
    card = TeacherCard(
        arch="a", weights_sha256="b", num_classes=labels.num_classes, size_px=8, mean=(0, 0, 0), std=(1, 1, 1)
    )
    return StoreSpec(plan=ViewPlan(), teacher=card, k=labels.k, temperatures=labels.temperatures, codec="compact")


def make_rows(labels: SoftLabels, num_views: int, *, view_start: int = 0, seed: int = 0, resized=False) -> LabelRows:
    """Made-up rows of len(labels) / num_views images."""
    random = np.random.default_rng(seed)
    num_rows, images = len(labels), np.arange(len(labels)) // num_views
    has = random.random(num_rows) < 0.3
    return LabelRows(
        image_id=[f"bild-\u00e9-{i}" for i in images],
        view=view_start + np.arange(num_rows) % num_views,
        label=(images % 5) - 1,
        labels=labels,
        box=random.integers(0, 65536, (num_rows, 4)),
        flip=random.random(num_rows) < 0.5,
        resize=np.stack([images + 256, images + 300], axis=1) if resized else None,
        source=np.full(num_rows, 3),
        offset=images * 1000,
        length=images + 900,
        image_hash=images.astype(np.uint64) * np.uint64(2**60 + 1),
        pixel_hash=np.where(has, random.integers(0, 2**63, num_rows), 0),
        has_pixel_hash=has,
    )


def round_trip(rows: LabelRows, spec: StoreSpec, num_views: int, view_start: int = 0) -> tuple[LabelRows, bytes]:
    stop = view_start + num_views
    unit = Unit(number=7, shard=3, piece=0, start=0, stop=1, view_start=view_start, view_stop=stop)
    data = io.BytesIO()
    formats.write_labels(
        HashingWriter(data.write), spec, unit, columns.rebatch([rows], columns.batch_rows(spec, num_views))
    )
    return formats.read_labels(data.getvalue(), spec, 7, where="shard"), data.getvalue()


def assert_rounded(found: SoftLabels, labels: SoftLabels) -> None:
    """ids exact; sqrt(-log p) within half a step of 1/16 up to 255 steps; logit of the tail within 1/8 up to 31.75."""
    found.validate()
    assert found.ids_BK.tolist() == labels.ids_BK.tolist()
    roots = (-labels.log_p_BK.double()).clamp(min=0).sqrt().clamp(max=255 / 16)
    assert float(((-found.log_p_BK.double()).sqrt() - roots).abs().max()) <= 1 / 32 + 1e-6
    if labels.k == labels.num_classes:
        assert bool(found.log_tail_BT.isneginf().all())
        return
    before, after = (x.log_tail_BT.double().clamp(max=-1e-15) for x in (labels, found))
    logits = [x - torch.log(-torch.expm1(x)) for x in (before, after)]
    assert torch.equal(before.isneginf(), after.isneginf())
    error = (logits[0].clamp(-31.75, 31.75) - logits[1].clamp(-31.75, 31.75)).nan_to_num(0)
    assert float(error.abs().max()) <= 1 / 8 + 0.05 * (
        float(logits[0].max()) > 10
    )  # float32 log tails near 0 are coarse


@given(
    labels=soft_labels(12),
    num_views=st.integers(1, 9),
    images=st.integers(1, 4),
    start=st.integers(0, 50),
    data=st.data(),
)
@settings(max_examples=60)
def test_everything_but_values_comes_back_exactly(labels, num_views, images, start, data):
    repeat = SoftLabels.cat([labels] * (num_views * images)).rows(slice(num_views * images))
    rows = make_rows(
        repeat, num_views, view_start=start, seed=data.draw(st.integers(0, 99)), resized=data.draw(st.booleans())
    )
    spec = spec_for(labels)
    found, _ = round_trip(rows, spec, num_views, start)
    assert found.image_id == rows.image_id
    for field in dataclasses.fields(LabelRows):
        if field.name not in ("image_id", "labels"):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(rows, field.name), err_msg=field.name)
    assert_rounded(found.labels, rows.labels)


@pytest.mark.parametrize("num_classes", [65536, 65537, 100_000])
def test_more_than_255_classes_of_an_image_are_kept(num_classes):
    """70 views of one image that name 700 classes: the rarer ones have no place and are listed."""
    ids = torch.arange(700).flip(0).reshape(70, 10) + num_classes - 700
    labels = SoftLabels(
        ids_BK=ids.to(torch.int32),
        log_p_BK=torch.full((70, 10), math.log(0.05)),
        log_tail_BT=torch.full((70, 1), math.log(0.5)),
        temperatures=(1.0,),
        num_classes=num_classes,
    )
    found, _ = round_trip(make_rows(labels, 70), spec_for(labels), 70)
    assert torch.equal(found.labels.ids_BK, labels.ids_BK)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
def test_mean_kl_stays_within_the_promise(temperature, scale):
    """KL(exact || compact) over kept classes plus bucket, mean over rows: at most 2e-3 nat at each temperature."""
    logits = scale * torch.randn(2000, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = SoftLabels.from_logits(logits, k=10, temperatures=(1.0, 2.0, 4.0))
    found, _ = round_trip(make_rows(exact, 20), spec_for(exact), 20)
    log_p, log_tail = exact.at(temperature)
    log_q, log_q_tail = (x.double() for x in found.labels.at(temperature))
    kl = (log_p.exp() * (log_p - log_q)).sum(1) + log_tail.exp() * (log_tail - log_q_tail)
    assert float(kl.mean()) <= 2e-3
    assert float(kl.min()) >= -1e-6


def test_no_image_is_a_shard_too():
    labels = SoftLabels.from_logits(torch.randn(6, 20), k=3, temperatures=(1.0, 2.0))
    spec = spec_for(labels)
    found, _ = round_trip(make_rows(labels.rows(slice(0)), 2), spec, 2)
    assert len(found) == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ids", [[200] * 6], "names a class"),
        ("rare", [[1]], "names a class"),
        ("classes", [[9999] * 20], "class ids are between 0 and 19; got 9999 to 9999"),
        ("hashed", [[2]], "of one of 2 views"),
    ],
)
def test_hostile_codes_are_refused(name, value, message):
    labels = SoftLabels.from_logits(torch.randn(2, 20), k=3, temperatures=(1.0, 2.0))
    spec = spec_for(labels)
    rows = dataclasses.replace(make_rows(labels, 2), has_pixel_hash=np.array([True, False]))
    schema = pa.schema(compact.fields(spec, 2))
    columns = dict(zip(schema.names, compact.encode(rows, spec, 2), strict=True))
    columns[name] = pa.array(value, schema.field(name).type)
    with pytest.raises(errors.LabelError, match=message):
        compact.decode(columns, spec, views=range(2), source=0)


def test_what_compact_cannot_hold_is_refused():
    with pytest.raises(errors.ConfigError, match="compact keeps at most 255 classes; got k = 300"):
        dataclasses.replace(small_spec(num_classes=400), codec="compact", k=300)
    labels = SoftLabels.from_logits(torch.randn(2, 20), k=3)
    rows = dataclasses.replace(make_rows(labels, 2), box=np.full((2, 4), 70_000))
    with pytest.raises(errors.LabelError, match="boxes of up to 65535 px; got 70000"):
        compact.encode(rows, spec_for(labels), 2)
