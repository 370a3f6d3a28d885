"""Stores under arbitrary input: codec, rows, units, resume, and a flip of any bit."""

import io
import uuid
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kddata import errors
from kddata.cards import StoreSpec, TeacherCard
from kddata.labels import SoftLabels
from kddata.store import LabelRows, LabelStore, Unit, codecs, columns, formats, verify_store
from kddata.store.manifest import plan_units
from kddata.store.naming import MANIFEST
from kddata.store.sealing import seal, unseal
from kddata.store.storage import HashingWriter
from kddata.testing import begin_small_store, made_up_rows, small_store, soft_labels
from kddata.views import ViewPlan

TEMPERATURES = (1.0, 2.0)
UNIT = Unit(number=7, shard=0, piece=0, start=0, stop=1, view_start=0, view_stop=1)


def _spec(labels):
    card = TeacherCard(
        arch="a", weights_sha256="b", num_classes=labels.num_classes, size_px=8, mean=(0, 0, 0), std=(1, 1, 1)
    )
    return StoreSpec(plan=ViewPlan(), teacher=card, k=labels.k, temperatures=labels.temperatures)


def _round_trip(labels):
    spec = _spec(labels)
    return codecs.decode(codecs.encode(labels, spec), spec)


def _assert_exact(found, labels):
    """ids as they were; log_p rounded to float16; log_tail in float32; order kept."""
    found.validate()
    assert found.ids_BK.dtype == torch.int32
    assert found.ids_BK.tolist() == labels.ids_BK.tolist()
    before, after = labels.log_p_BK.double(), found.log_p_BK.double()
    assert torch.equal(before.isneginf(), after.isneginf()), "only probability 0 is stored as -inf"
    error = (after - before.clamp(min=-65504.0)).abs().nan_to_num(0.0)
    assert bool((error <= torch.maximum(before.abs() * 2.0**-11, torch.tensor(2.0**-25))).all())
    assert bool((after[:, 1:] <= after[:, :-1]).all())
    assert torch.equal(found.log_tail_BT, labels.log_tail_BT.float())
    assert (found.temperatures, found.num_classes) == (labels.temperatures, labels.num_classes)


@given(labels=soft_labels(temperatures=TEMPERATURES))
def test_exact_gives_labels_back_up_to_float16(labels):
    _assert_exact(_round_trip(labels), labels)


@pytest.mark.parametrize("num_classes", [1, 2, 65535, 65536, 65537, 100_000])
@pytest.mark.parametrize("k", [1, 7, None])
def test_exact_at_the_border_of_two_byte_ids(num_classes, k):
    """The highest id is among the kept ones on either side of C = 65536; k = None keeps all classes."""
    k = num_classes if k is None else min(k, num_classes)
    logits_BC = torch.randn(2, num_classes, generator=torch.Generator().manual_seed(num_classes))
    logits_BC[0, -1] = 30.0
    labels = SoftLabels.from_logits(logits_BC, k=k, temperatures=TEMPERATURES)
    assert int(labels.ids_BK[0, 0]) == num_classes - 1
    _assert_exact(_round_trip(labels), labels)


def test_exact_keeps_what_is_finite_finite():
    logits_BC = torch.tensor([[0.0, -65504.0, -65519.9, -1e6, -3e38, -torch.inf]])
    labels = SoftLabels.from_logits(logits_BC, k=6, temperatures=TEMPERATURES)
    assert _round_trip(labels).log_p_BK.tolist() == [[0.0, *[-65504.0] * 4, -torch.inf]]


@given(labels=soft_labels())
def test_exact_takes_float64_labels_too(labels):
    double = SoftLabels(
        ids_BK=labels.ids_BK.long(),
        log_p_BK=labels.log_p_BK.double(),
        log_tail_BT=labels.log_tail_BT.double(),
        temperatures=labels.temperatures,
        num_classes=labels.num_classes,
    )
    _assert_exact(_round_trip(double), labels)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
int32s, int64s, uint64s = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1)


@st.composite
def label_rows(draw, max_rows=30):
    one = draw(soft_labels(12))
    num_rows = draw(st.integers(0, max_rows))
    some = SoftLabels.cat([one] * (num_rows // len(one) + 1)).rows(slice(num_rows))

    def column(values, *width):
        flat = draw(st.lists(values, min_size=num_rows * int(np.prod(width)), max_size=num_rows * int(np.prod(width))))
        return flat, (num_rows, *width)

    def array(dtype, values, *width):
        flat, shape = column(values, *width)
        return np.array(flat, dtype=dtype).reshape(shape)

    has = array(bool, st.booleans())
    return LabelRows(
        image_id=column(texts)[0],
        view=array(np.int32, int32s),
        label=array(np.int64, st.integers(-1, 2**31 - 1)),
        labels=some,
        box=array(np.int32, int32s, 4),
        flip=array(bool, st.booleans()),
        resize=draw(st.sampled_from([None, array(np.int32, int32s, 2)])),
        source=array(np.int32, int32s),
        offset=array(np.int64, int64s),
        length=array(np.int64, int64s),
        image_hash=array(np.uint64, uint64s),
        pixel_hash=np.where(has, array(np.uint64, uint64s), 0),
        has_pixel_hash=has,
    )


def _shard(rows, spec, cuts, batch_rows):
    data = io.BytesIO()
    ends = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [rows.take(slice(start, stop)) for start, stop in pairwise(ends)]
    formats.write_labels(HashingWriter(data.write), spec, UNIT, columns.rebatch(parts, batch_rows))
    return data.getvalue()


@given(rows=label_rows(), cuts=st.lists(st.integers(0, 30), max_size=4), batch_rows=st.integers(1, 40))
def test_a_shard_gives_rows_back_and_its_bytes_do_not_depend_on_the_pieces(rows, cuts, batch_rows):
    spec = _spec(rows.labels)
    data = _shard(rows, spec, cuts, batch_rows)
    assert data == _shard(rows, spec, [], batch_rows)
    found = formats.read_labels(data, spec, 7, where="shard")
    assert found.image_id == rows.image_id
    for name in ("view", "label", "box", "flip", "source", "offset", "length", "image_hash", "pixel_hash"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name), err_msg=name)
    np.testing.assert_array_equal(found.has_pixel_hash, rows.has_pixel_hash)
    if len(rows):
        assert (found.resize is None) == (rows.resize is None)
        np.testing.assert_array_equal(found.resize, rows.resize)
        _assert_exact(found.labels, rows.labels)


@given(rows=label_rows(), cuts=st.lists(st.integers(0, 30), max_size=4), data=st.data())
def test_taking_and_joining_are_inverse(rows, cuts, data):
    ends = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [rows.take(np.arange(start, stop)) for start, stop in pairwise(ends)]
    joined = LabelRows.concat(parts)
    order = data.draw(st.permutations(range(len(rows))))
    moved = joined.take(order)
    assert moved.image_id == [rows.image_id[i] for i in order]
    np.testing.assert_array_equal(moved.box, rows.box[order])
    assert moved.labels.ids_BK.tolist() == rows.labels.ids_BK[torch.tensor(order, dtype=torch.long)].tolist()
    for i, row in enumerate(order):
        assert moved.view_at(i) == rows.view_at(row)


@given(
    counts=st.lists(st.integers(0, 9), max_size=4),
    views=st.integers(1, 7),
    unit_images=st.integers(1, 10),
    unit_views=st.none() | st.integers(1, 9),
)
def test_units_cover_every_view_of_every_image_once(counts, views, unit_images, unit_views):
    units = plan_units(counts, views=(0, views), unit_images=unit_images, unit_views=unit_views)
    covered = [
        (unit.shard, image, view)
        for unit in units
        for image in range(unit.start, unit.stop)
        for view in range(unit.view_start, unit.view_stop)
    ]
    assert sorted(covered) == [(s, i, v) for s, count in enumerate(counts) for i in range(count) for v in range(views)]
    assert [unit.number for unit in units] == list(range(len(units)))
    assert all(unit.stop - unit.start <= unit_images and unit.start == unit.piece * unit_images for unit in units)
    assert [(u.shard, u.piece, u.view_start) for u in units] == sorted((u.shard, u.piece, u.view_start) for u in units)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    value=st.dictionaries(st.text().filter(lambda x: x not in ("seal", "format_version")), json_values, max_size=4),
    position=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_sealed_record_reads_back_and_any_flipped_bit_breaks_the_seal(value, position, bit):
    data = bytearray(seal(value))
    assert unseal(bytes(data), where="record") == value
    data[int(position * len(data))] ^= 1 << bit
    with pytest.raises(errors.StoreDamagedError, match=r"record"):
        unseal(bytes(data), where="record")


@given(finished=st.permutations(range(6)), number=st.integers(0, 6))
@settings(max_examples=25)
def test_any_units_may_be_finished_in_any_order_before_a_stop(finished, number):
    place = f"memory://{uuid.uuid4().hex}"
    store = begin_small_store(place)
    for unit in finished[:number]:
        store.write_unit(store.units()[unit], [made_up_rows(store, store.units()[unit])])
    again = begin_small_store(place)
    assert [receipt.unit for receipt in again.receipts()] == sorted(finished[:number])
    for unit in again.units():
        if unit.number not in [receipt.unit for receipt in again.receipts()]:
            again.write_unit(unit, [made_up_rows(again, unit)])
    again.commit()
    undisturbed = small_store(f"memory://{uuid.uuid4().hex}").storage
    assert again.storage.sizes() == undisturbed.sizes()
    assert all(again.storage.read(name) == undisturbed.read(name) for name in undisturbed.sizes())


@pytest.fixture(scope="module")
def whole():
    return small_store(f"memory://{uuid.uuid4().hex}")


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=400)
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(whole, position, bit):
    """Places are even over all bytes of all files; labels and index are never used with a flip in them."""
    storage = whole.storage
    sizes = storage.sizes()
    ends = np.cumsum(list(sizes.values()))
    at = int(position * ends[-1])
    number = int(np.searchsorted(ends, at, side="right"))
    name = list(sizes)[number]
    at -= int(ends[number]) - sizes[name]
    data = storage.read(name)
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    try:
        with storage.replacing(name) as out:
            out.write(flipped)
        assert [problem.file for problem in verify_store(whole.url)] == [name]
        if name == MANIFEST:
            with pytest.raises((errors.StoreDamagedError, errors.StoreVersionError), match=MANIFEST):
                LabelStore.open(whole.url)
        elif name.startswith("labels/"):
            with pytest.raises(errors.StoreDamagedError, match=name):
                whole.read(int(name[7:13]))
        elif name.startswith("index/"):
            with pytest.raises(errors.StoreDamagedError, match=name):
                LabelStore.open(whole.url).find("no such image")
    finally:
        with storage.replacing(name) as out:
            out.write(data)
