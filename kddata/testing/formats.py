"""The contract of shard formats, as checks to be run for each format and codec.

    @pytest.mark.parametrize("check", CONTRACT)
    @pytest.mark.parametrize("spec", contract_specs(), ids=spec_name)
    def test_a_format_keeps_its_contract(check, spec): check(spec)

Each check takes a spec, works in memory, and raises AssertionError for what is broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import uuid
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from kddata.cards import Output, StoreSpec
from kddata.errors import StoreDamagedError, StoreVersionError
from kddata.store import LabelRows, LabelStore, Unit
from kddata.store.columns import batch_rows, decode, encode, rebatch
from kddata.store.formats import FORMATS, read_labels, write_labels
from kddata.store.naming import labels_name
from kddata.store.rows import objects
from kddata.store.steps import HashingWriter
from kddata.testing import begin_small_store, made_up_image, made_up_rows, small_spec, small_store
from kddata.views import ViewPlan

_IDS = (
    "plain",
    "in/a.folder/n.01.x",
    "../up",
    "/absolute",
    "__meta__",
    "50%",
    "50%25",
    "a b",
    "bild-\u00e9",
    "n" * 300,
)


def contract_specs() -> list[StoreSpec]:
    """A spec for every format and codec: plain, sampled, and with mixed views and outputs of several shapes."""
    mixed = ViewPlan(policy="randaugment", erase_p=0.5, mix="cutmix")
    outputs = (Output(name="embedding", shape=(5,)), Output(name="features:body.2", shape=(2, 3, 2)))
    base = small_spec(unit_views=None)
    return [
        dataclasses.replace(spec, format=format, codec=codec)  # type: ignore[arg-type]
        for format in FORMATS
        for codec in ("exact", "compact")
        for spec in (
            base,
            dataclasses.replace(base, plan=mixed, outputs=outputs),
            dataclasses.replace(base, keep="sampled", temperatures=(1.0,)),
        )
    ]


def spec_name(spec: StoreSpec) -> str:
    """Such as "tar-compact-mixed"."""
    kinds = "-mixed" * spec.plan.has_mix + "-sampled" * (spec.keep == "sampled")
    return f"{spec.format}-{spec.codec}{kinds}"


def check_round_trip(spec: StoreSpec) -> None:
    """What is read is what was written, with the rounding of the codec and no other; and that is what is counted."""
    store = _store(spec)
    for unit in store.units():
        rows = made_up_rows(store, unit)
        if len(rows):
            _assert_equal(store.read(unit.number), _rounded(rows, spec, unit))
    assert store.verify() == []
    again = _begin(spec)
    for unit in again.units():
        again.write_unit(unit, [store.read(unit.number)], image_bytes=made_up_image)
    assert again.commit() == store.manifest, "rows that are read and written again give another store"


def check_image_ids(spec: StoreSpec) -> None:
    """Any image id is kept, of names that no file should have too, and none is taken for another."""
    store = _begin(spec, images=(0,))
    unit = Unit(number=0, shard=0, piece=0, start=0, stop=len(_IDS), view_start=0, view_stop=1)
    whole = _begin(spec)
    one = made_up_rows(whole, whole.units()[0]).take(slice(0, 1))
    if spec.plan.has_mix:
        one = dataclasses.replace(one, mix=objects([None]))  # it would name a partner that is not there
    parts = [dataclasses.replace(one, image_id=[image_id], view=np.array([0])) for image_id in _IDS]
    data = _written(spec, unit, parts)
    found = _read(store, unit, data)
    assert found.image_id == list(_IDS)


def check_bytes(spec: StoreSpec) -> None:
    """Equal rows give equal bytes, in whatever pieces they come."""
    store = _begin(spec)
    unit = store.units()[0]
    rows = made_up_rows(store, unit)
    one = _written(spec, unit, [rows])
    assert one == _written(spec, unit, [rows])
    for size in (1, 2, 5):
        assert one == _written(spec, unit, [rows.take(slice(i, i + size)) for i in range(0, len(rows), size)]), size


def check_streaming(spec: StoreSpec) -> None:
    """A batch is written before the next one is asked for, so that memory does not grow with the unit."""
    store = _begin(spec)
    unit = store.units()[0]
    data = io.BytesIO()
    out = HashingWriter(data.write)
    sizes = []

    def batches() -> Iterator[LabelRows]:
        for image in range(unit.stop - unit.start):
            sizes.append(out.num_bytes)
            yield rows.take(slice(image * unit.num_views, (image + 1) * unit.num_views))

    rows = made_up_rows(store, unit)
    write_labels(out, spec, unit, batches(), image_bytes=made_up_image)
    assert len(sizes) > 2
    assert sorted(set(sizes)) == sizes, f"bytes written when each batch was asked for: {sizes}"


def check_damage(spec: StoreSpec) -> None:
    """A flipped byte is found by the hash. Without it, a file of damaged bytes raises a StoreError, or is read."""
    store = _store(spec)
    name = labels_name(0, spec.format)
    data = store.storage.read(name)
    for at in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        _replace(store, name, bytes(flipped))
        _refused(lambda: store.read(0), name)
        _harmless(lambda: store.read(0, verify=False))
    for stop in np.linspace(0, len(data) - 1, 25).astype(int).tolist():
        _replace(store, name, data[:stop])
        _refused(lambda: store.read(0, verify=False), name)
    store.storage.remove(name)
    _refused(lambda: store.read(0), name)


def check_foreign_files(spec: StoreSpec) -> None:
    """Another unit's file, another store's, another format's, and none at all are refused, even unhashed."""
    store = _store(spec)
    name = labels_name(0, spec.format)
    other = {"exact": "compact", "compact": "exact"}[spec.codec]
    foreign = [
        _store(dataclasses.replace(spec, codec=other)),  # type: ignore[arg-type]
        *(_store(dataclasses.replace(spec, format=format)) for format in FORMATS if format != spec.format),  # type: ignore[arg-type]
    ]
    files = [other.storage.read(labels_name(0, other.spec.format)) for other in foreign]
    files += [store.storage.read(labels_name(1, spec.format)), store.storage.read("store.json"), b"", bytes(10240)]
    for data in files:
        _replace(store, name, data)
        _refused(lambda: store.read(0, verify=False), name)


def check_empty_unit(spec: StoreSpec) -> None:
    """A unit whose images are all bad has a file, without rows."""
    store = _begin(spec)
    for unit in store.units():
        ids = store.read_index(unit)[0] if unit.number == 0 else []
        rows = made_up_rows(store, unit, leave_out=tuple(ids))
        store.write_unit(unit, [rows], bad=[(image_id, "none") for image_id in ids], image_bytes=made_up_image)
    store.commit()
    assert len(store.read(0)) == 0
    assert len(LabelRows.concat([store.read(0), store.read(1)])) == store.rows_per_unit[1] > 0


def check_resume(spec: StoreSpec) -> None:
    """What a dead writer left is written again; finished units stay; the store is that of an undisturbed run."""
    undisturbed, url = _store(spec), f"memory://{uuid.uuid4().hex}"
    store = begin_small_store(url, spec=spec)
    first, second, *_ = store.units()
    store.write_unit(first, [made_up_rows(store, first)], image_bytes=made_up_image)
    _replace(store, labels_name(second.number, spec.format), b"finished, and its writer died before the receipt")

    def dies() -> Iterator[LabelRows]:
        yield made_up_rows(store, second).take(slice(0, second.num_views))
        raise RuntimeError("killed")

    with contextlib.suppress(RuntimeError):
        store.write_unit(second, dies(), image_bytes=made_up_image)
    again = small_store(url, spec=spec)
    names = undisturbed.storage.sizes()
    assert again.storage.sizes() == names
    assert all(again.storage.read(name) == undisturbed.storage.read(name) for name in names)


CONTRACT: tuple[Callable[[StoreSpec], None], ...] = (
    check_round_trip,
    check_image_ids,
    check_bytes,
    check_streaming,
    check_damage,
    check_foreign_files,
    check_empty_unit,
    check_resume,
)


def _begin(spec: StoreSpec, images: tuple[int, ...] = (6, 0, 3)) -> LabelStore:
    return begin_small_store(f"memory://{uuid.uuid4().hex}", spec=spec, images=images)


def _store(spec: StoreSpec) -> LabelStore:
    return small_store(f"memory://{uuid.uuid4().hex}", spec=spec)


def _written(spec: StoreSpec, unit: Unit, parts: Iterable[LabelRows]) -> bytes:
    data = io.BytesIO()
    batches = rebatch(parts, batch_rows(spec, unit.num_views))
    write_labels(HashingWriter(data.write), spec, unit, batches, image_bytes=made_up_image)
    return data.getvalue()


def _read(store: LabelStore, unit: Unit, data: bytes) -> LabelRows:
    return read_labels(data, store.spec, unit.number, where="shard")


def _rounded(rows: LabelRows, spec: StoreSpec, unit: Unit) -> LabelRows:
    table = pa.Table.from_batches([encode(rows, spec, unit.num_views)])
    return decode(table, spec, views=range(unit.view_start, unit.view_stop), source=unit.shard, where="rows")


def _assert_equal(found: LabelRows, wanted: LabelRows) -> None:
    assert found.image_id == wanted.image_id
    for field in dataclasses.fields(wanted):
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "labels":
            for name in ("ids_BK", "log_p_BK", "log_tail_BT"):
                np.testing.assert_array_equal(getattr(mine, name).numpy(), getattr(theirs, name).numpy(), err_msg=name)
        elif field.name == "outputs":
            assert mine.keys() == theirs.keys()
            for name in theirs:
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
        elif field.name != "image_id":
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


def _replace(store: LabelStore, name: str, data: bytes) -> None:
    with store.storage.replacing(name) as out:
        out.write(data)


def _refused(read: Callable[[], object], name: str) -> None:
    message = None
    try:
        read()
    except StoreDamagedError as error:
        message = str(error)
    assert message is not None, f"{name} was read"
    assert name in message, f"the error does not name the file: {message}"


def _harmless(read: Callable[[], object]) -> None:
    with contextlib.suppress(StoreDamagedError, StoreVersionError):
        read()
