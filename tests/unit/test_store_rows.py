"""Rows of a store: what a unit takes, what a shard is refused for, what a store says about itself."""

import dataclasses
import io

import numpy as np
import pytest
import torch

from kddata import errors
from kddata.labels import SoftLabels
from kddata.store import LabelRows, LabelStore, codecs, columns, formats
from kddata.store.naming import labels_name
from kddata.store.storage import HashingWriter
from kddata.testing import begin_small_store, made_up_rows, small_spec, small_store
from kddata.views import View


@pytest.fixture
def store(request):
    return begin_small_store(f"memory://rows/{request.node.name}")


_replaced = dataclasses.replace


def _of_other_classes(rows):
    return _replaced(rows, labels=SoftLabels.from_logits(torch.randn(len(rows), 11), k=3, temperatures=(1.0, 4.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.take(slice(1, None)), r"image after image, each with views 0 to 1.*got views \[1, 0"),
        (lambda rows: rows.take(slice(0, -1)), "each image of a unit has 2 rows; got 7 rows of 4 images"),
        (lambda rows: rows.take(slice(0, -2)), "each of a unit's 4 images is labelled or bad, once; got 3 labelled"),
        (lambda rows: rows.take([0, 1, 0, 1, 4, 5, 6, 7]), "an image comes once in a unit; got '0/bild-é-0'"),
        (lambda rows: rows.take([0, 3, 2, 1, 4, 5, 6, 7]), "views of one image stand together; got '0/bild-é-0', '0/b"),
        (lambda rows: _replaced(rows, source=rows.source + 1), r"from image shard 0; got .* image shards \[1\]"),
        (_of_other_classes, r"\(classes, k, temperatures, sampled\) = \(10, 3, .*; got \(11, 3"),
    ],
)
def test_rows_that_are_not_the_units_are_refused_and_nothing_is_written(store, change, message):
    unit = store.units()[0]
    with pytest.raises((errors.StoreError, errors.LabelError), match=message):
        store.write_unit(unit, [change(made_up_rows(store, unit))])
    assert list(store.receipts()) == []
    assert labels_name(0) not in store.storage.sizes()


def test_labels_that_break_their_rules_are_refused(store):
    unit = store.units()[0]
    rows = made_up_rows(store, unit)
    rows.labels.log_p_BK[3, 1] = float("nan")
    with pytest.raises(errors.LabelError, match="log-probabilities"):
        store.write_unit(unit, [rows])


def test_an_image_is_not_labelled_and_bad(store):
    unit = store.units()[0]
    with pytest.raises(errors.StoreError, match="labelled or bad, once; got 4 labelled, 1 bad"):
        store.write_unit(unit, [made_up_rows(store, unit)], bad=[("0/bild-é-0", "truncated")])


def test_columns_have_the_shapes_that_they_say(store):
    rows = made_up_rows(store, store.units()[0])
    with pytest.raises(ValueError, match=r"LabelRows.box is int32 \[8, 4\]; got \[8, 3\]"):
        _replaced(rows, box=rows.box[:, :3])
    with pytest.raises(ValueError, match=r"LabelRows.labels has 8 rows; got 2"):
        _replaced(rows, labels=rows.labels.rows(slice(2)))


def test_a_row_gives_its_view_back(store):
    rows = made_up_rows(store, store.units()[0])
    for row in range(len(rows)):
        assert rows.view_at(row) == store.spec.plan.draw(rows.image_id[row], int(rows.view[row]), 40, 60)
    resized = _replaced(rows, resize=np.full((len(rows), 2), (256, 300)))
    assert resized.view_at(2).resize == (256, 300)
    assert isinstance(resized.view_at(2), View)
    with pytest.raises(ValueError, match="all have a resize, or none does"):
        LabelRows.concat([rows, resized])


def test_resized_views_come_back_from_a_shard(store):
    rows = made_up_rows(store, store.units()[0])
    resized = _replaced(rows, resize=np.arange(16).reshape(8, 2))
    data = io.BytesIO()
    formats.write_labels(HashingWriter(data.write), store.spec, store.units()[0], [resized])
    found = formats.read_labels(data.getvalue(), store.spec, 0, where="shard")
    np.testing.assert_array_equal(found.resize, resized.resize)


def test_what_a_null_hides_is_no_part_of_a_shards_bytes(store):
    rows = made_up_rows(store, store.units()[0])
    files = []
    for hidden in (0, 7):
        data = io.BytesIO()
        change = {
            "label": np.where(rows.label < 0, -1 - hidden, rows.label),
            "pixel_hash": np.where(rows.has_pixel_hash, rows.pixel_hash, hidden),
        }
        formats.write_labels(HashingWriter(data.write), store.spec, store.units()[0], [_replaced(rows, **change)])
        files.append(data.getvalue())
    assert files[0] == files[1]


def test_batches_hold_fewer_rows_when_more_classes_are_kept():
    assert columns.batch_rows(small_spec(), 3) == 8190
    assert columns.batch_rows(small_spec(num_classes=21841, k=21841), 3) == 192


def test_compact_batches_hold_whole_images():
    spec = dataclasses.replace(small_spec(), codec="compact")
    assert columns.batch_rows(spec, 300) == 8100
    assert columns.batch_rows(spec, 10_000) == 10_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels/000001.arrow", "belongs to its store and its place, unit 0; got unit 1"),
        ("index/00000.arrow", "belongs to its store and its place, unit 0; got unit None"),
        ("store.json", "is readable Arrow"),
    ],
)
def test_another_file_in_a_shards_place_is_refused_even_unhashed(request, name, message):
    store = small_store(f"memory://rows/{request.node.name}")
    other = store.storage.read(name)
    with store.storage.replacing(labels_name(0)) as out:
        out.write(other)
    with pytest.raises(errors.StoreDamagedError, match=message):
        store.read(0, verify=False)


def test_class_ids_beyond_the_teachers_are_refused(store):
    """A shard whose hash is right can still be hostile: a class id indexes a tensor in every loss."""
    rows = made_up_rows(store, store.units()[0])
    data = io.BytesIO()
    formats.write_labels(HashingWriter(data.write), store.spec, store.units()[0], [rows])
    fewer = dataclasses.replace(store.spec, teacher=dataclasses.replace(store.spec.teacher, num_classes=4))
    with pytest.raises(errors.StoreDamagedError, match="belongs to its store"):
        formats.read_labels(data.getvalue(), fewer, 0, where="shard")
    wide = SoftLabels.from_logits(torch.arange(10.0)[None], k=3, temperatures=(1.0, 4.0))
    arrays = codecs.encode(wide, store.spec)
    with pytest.raises(errors.LabelError, match="class ids are between 0 and 3; got 7 to 9"):
        codecs.decode(arrays, fewer)


def test_a_store_describes_itself(request):
    store = small_store(f"memory://rows/{request.node.name}")
    rows = LabelRows.concat([store.read(unit.number) for unit in store.units()])
    known = rows.label >= 0
    info = LabelStore.open(store.url).info()
    assert {key: info[key] for key in ("units", "rows", "labelled", "labelled_images", "bad_images")} == {
        "units": 6,
        "rows": 27,
        "labelled": int(known.sum()),
        "labelled_images": 9,
        "bad_images": 0,
    }
    top1 = rows.labels.ids_BK[:, 0].numpy()
    assert info["teacher_accuracy"] == (top1 == rows.label)[known].mean()
    assert info["bytes"] == sum(store.storage.sizes("labels").values()) == info["bytes_per_view"] * 27
    tail = rows.labels.log_tail_BT[:, 0].exp()
    assert info["mean_tail_mass"] == pytest.approx(float(tail.mean()), rel=1e-6)
    p_all = torch.cat([rows.labels.log_p_BK.exp(), tail[:, None]], dim=1)
    assert info["mean_entropy_nats"] == pytest.approx(float(-(p_all * p_all.log()).sum(1).mean()), rel=1e-3)


def test_an_image_is_found_by_its_id(store):
    assert [(u.number, u.view_start) for u in store.find("0/bild-é-5")] == [(2, 0), (3, 2)]
    assert [(u.number, u.view_start) for u in store.find("2/bild-é-0")] == [(4, 0), (5, 2)]
    assert store.find("2/bild-é-3") == []


def test_units_wait_for_the_index(request):
    spec = small_spec()
    store = LabelStore.begin(
        f"memory://rows/{request.node.name}", spec=spec, location="x", kind="tar", views_per_image=1
    )
    with pytest.raises(errors.StoreMissingError, match="images are indexed before units are planned"):
        store.units()
    store.write_index(1, name="b", size_bytes=1, ids=["x"], labels=[None], offsets=[0], lengths=[1])
    with pytest.raises(errors.StoreError, match=r"every image shard is indexed; got \[1\]"):
        store.finish_index()
    assert store.indexed_shards() == {1}


def test_views_are_counted_from_one(request):
    arguments = {"spec": small_spec(), "location": "x", "kind": "tar"}
    with pytest.raises(errors.ConfigError, match=r"views.per_image is at least 1; got 0"):
        LabelStore.begin("memory://rows/none", views_per_image=0, **arguments)
    center = dataclasses.replace(arguments["spec"].plan, policy="center", center_px=16)
    with pytest.raises(errors.ConfigError, match=r"center has one view an image; got 2.*per_image: 1"):
        LabelStore.begin(
            "memory://rows/none",
            views_per_image=2,
            **arguments | {"spec": dataclasses.replace(arguments["spec"], plan=center)},
        )
