"""Recipes: the ops and mixes of views as Arrow columns. A shard has them only where its plan draws any. Pure functions.

`ops` holds the names of each view's ops, and the magnitudes of all of them, one after the other, which
packs better than a list of (name, magnitudes). `mix` is null for a view that is not mixed. The compact codec, whose
record is an image, nests each of them in a list of its views. All numbers are exact in float32.

Letters: B rows, V views of an image.
"""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from kddata import ops
from kddata.cards import StoreSpec
from kddata.errors import StoreDamagedError, StoreVersionError
from kddata.store.rows import LabelRows, objects
from kddata.views import Mix

_NAMES = pa.array(ops.NAMES)
_NAME = pa.dictionary(pa.int8(), pa.string())
_OPS = pa.struct(
    [
        pa.field("names", pa.list_(_NAME), nullable=False),
        pa.field("magnitudes", pa.list_(pa.float32()), nullable=False),
    ]
)
_MIX = pa.struct(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("partner", pa.string(), nullable=False),
        pa.field("partner_view", pa.int32(), nullable=False),
        pa.field("lam", pa.float32(), nullable=False),
        pa.field("box", pa.list_(pa.float32())),
    ]
)


def fields(spec: StoreSpec, *, nested: int | None = None) -> list[pa.Field]:
    """The columns; with `nested`, of records that hold so many views each."""
    flat = [("ops", _OPS)] * spec.plan.has_ops + [("mix", _MIX)] * spec.plan.has_mix
    if nested is None:
        return [pa.field(name, kind, nullable=name == "mix") for name, kind in flat]
    return [pa.field(name, pa.list_(kind, nested), nullable=False) for name, kind in flat]


def encode(rows: LabelRows, spec: StoreSpec, *, nested: int | None = None) -> list[pa.Array]:
    """Rows as the arrays of `fields`. Raises ValueError for views that the spec's plan does not draw."""
    if (rows.ops is not None, rows.mix is not None) != (spec.plan.has_ops, spec.plan.has_mix):
        raise ValueError("label rows have ops where the store's plan draws ops, and a mix where it mixes")
    arrays = []
    if rows.ops is not None:
        arrays.append(_ops_array(rows.ops))
    if rows.mix is not None:
        arrays.append(pa.array([None if mix is None else dataclasses.asdict(mix) for mix in rows.mix], _MIX))
    if nested is None:
        return arrays
    return [
        pa.FixedSizeListArray.from_arrays(array, type=field.type)
        for array, field in zip(arrays, fields(spec, nested=nested), strict=True)
    ]


def decode(columns: dict[str, pa.Array], spec: StoreSpec, *, where: str) -> dict[str, Any]:
    """The columns `ops` and `mix` of LabelRows, as its arguments; nested columns are laid end to end.

    Raises StoreVersionError for an op of a newer library, StoreDamagedError for what is no op or mix.
    """
    found: dict[str, Any] = {"ops": None, "mix": None}
    try:
        for field in fields(spec):
            column = columns[field.name]
            values = (column if column.type == field.type else column.flatten()).to_pylist()
            found[field.name] = objects([(_ops if field.name == "ops" else _mix)(value) for value in values])
    except _UnknownOp as error:
        raise StoreVersionError(
            f"this library knows the ops {', '.join(ops.NAMES)}", actual=error, where=where, fix="upgrade kddata"
        ) from error
    except (TypeError, ValueError) as error:
        raise StoreDamagedError("views have ops and mixes as they are drawn", actual=error, where=where) from error
    return found


def _ops_array(drawn_B: np.ndarray) -> pa.StructArray:
    names = [[ops.NAMES.index(name) for name, _ in drawn] for drawn in drawn_B]
    magnitudes = [[x for _, found in drawn for x in found] for drawn in drawn_B]
    codes = pa.array(names, pa.list_(pa.int8()))
    # One dictionary for all batches of a file, whatever they hold.
    named = pa.ListArray.from_arrays(codes.offsets, pa.DictionaryArray.from_arrays(codes.values, _NAMES))
    return pa.StructArray.from_arrays([named, pa.array(magnitudes, pa.list_(pa.float32()))], fields=list(_OPS))


class _UnknownOp(Exception):
    pass


def _ops(value: dict[str, Any]) -> tuple[ops.Op, ...]:
    drawn, magnitudes = [], iter(value["magnitudes"])
    for name in value["names"]:
        if name not in ops.NAMES:
            raise _UnknownOp(name)
        drawn.append((name, tuple(islice(magnitudes, ops.num_magnitudes(name)))))
        ops.check(*drawn[-1])
    if next(magnitudes, None) is not None:
        raise ValueError("more magnitudes than the ops of a view have")
    return tuple(drawn)


def _mix(value: dict[str, Any] | None) -> Mix | None:
    if value is None:
        return None
    return Mix(**{**value, "box": None if value["box"] is None else tuple(value["box"])})
