"""Recipes: the ops and mixes of views as Arrow columns. A shard has them only where its plan draws any. Pure functions.

`ops` is a list of (name, magnitudes) for each view; `mix` is null for a view that is not mixed. The compact codec,
whose record is an image, nests each of them in a list of its views. All their numbers are exact in float32.

Letters: B rows, V views of an image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from kddata import ops
from kddata.cards import StoreSpec
from kddata.errors import StoreDamagedError, StoreVersionError
from kddata.store.rows import LabelRows, objects
from kddata.views import Mix

_OPS = pa.list_(
    pa.struct(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("magnitudes", pa.list_(pa.float32()), nullable=False),
        ]
    )
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
        values = [[{"name": name, "magnitudes": list(x)} for name, x in drawn] for drawn in rows.ops]
        arrays.append(pa.array(values, _OPS))
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


class _UnknownOp(Exception):
    pass


def _ops(value: list[dict[str, Any]]) -> tuple[ops.Op, ...]:
    drawn = tuple((op["name"], tuple(op["magnitudes"])) for op in value)
    for name, magnitudes in drawn:
        if name not in ops.NAMES:
            raise _UnknownOp(name)
        ops.check(name, magnitudes)
    return drawn


def _mix(value: dict[str, Any] | None) -> Mix | None:
    if value is None:
        return None
    return Mix(**{**value, "box": None if value["box"] is None else tuple(value["box"])})
