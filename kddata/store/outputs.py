"""Outputs: tensors of the teacher as Arrow columns of float16, one a view, or V a record under codec compact.

A column `output.NAME` is a list of fixed length; the shape stands in the field's metadata and in the store's spec.
Pure functions.

Letters: B rows, V views of an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from kddata.cards import StoreSpec
from kddata.store.rows import LabelRows


def fields(spec: StoreSpec, nested: int = 1) -> list[pa.Field]:
    """The columns, of records that hold `nested` views each."""
    return [
        pa.field(
            _column(output.name),
            pa.list_(pa.float16(), nested * output.size),
            nullable=False,
            metadata={b"shape": json.dumps([nested, *output.shape] if nested > 1 else output.shape).encode()},
        )
        for output in spec.outputs
    ]


def encode(rows: LabelRows, spec: StoreSpec, nested: int = 1) -> list[pa.Array]:
    """Rows as the arrays of `fields`. Raises ValueError for rows whose outputs are not those of the spec."""
    wanted = {output.name: output.shape for output in spec.outputs}
    found = {name: value.shape[1:] for name, value in rows.outputs.items()}
    if found != wanted:
        raise ValueError(f"label rows have the outputs of their store, {wanted}; got {found}")
    return [
        pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(rows.outputs[output.name]).reshape(-1)), nested * output.size
        )
        for output in spec.outputs
    ]


def decode(columns: dict[str, pa.Array], spec: StoreSpec, kept: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The outputs by name, float16 [B, ...]: those that are `kept`, or all."""
    return {
        output.name: columns[_column(output.name)].flatten().to_numpy(zero_copy_only=False).reshape(-1, *output.shape)
        for output in spec.outputs
        if kept is None or output.name in kept
    }


def unread(spec: StoreSpec, kept: Sequence[str] | None) -> set[str]:
    """The columns of outputs that are not kept."""
    return set() if kept is None else {_column(output.name) for output in spec.outputs if output.name not in kept}


def _column(name: str) -> str:
    return f"output.{name}"
