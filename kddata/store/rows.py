"""LabelRows: rows of a store in memory, one array a column. Pure values; nothing here reads or writes.

A row is one view of one image: where the image lies, how the view is cut, and what the teacher said about it.

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from kddata.errors import StoreDamagedError
from kddata.labels import SoftLabels
from kddata.views import View


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelRows:
    """B rows.

    Attributes:
        image_id: of the image, B strings.
        view: index of the view, int32 [B].
        label: ground truth, int64 [B]; -1 where there is none.
        labels: what the teacher said.
        box: of the view, int32 [B, 4]: top, left, height, width in pixels.
        flip: of the view, bool [B].
        resize: of the view, int32 [B, 2]: height and width in pixels; None where no view has one.
        ops: of the view, B tuples; None where no view of the store's plan has any.
        mix: of the view, B of Mix or None; None where no view of the store's plan is mixed.
        source: number of the image shard, int32 [B].
        offset, length: of the image in its shard, in bytes (parquet: row number, and bytes), int64 [B].
        image_hash: 64 bits of the hash of the encoded image, uint64 [B].
        pixel_hash: of the rendered view, uint64 [B]; it counts where `has_pixel_hash`, bool [B], is True.
        outputs: tensors of the teacher by name, float16 [B, ...].
    """

    image_id: list[str]
    view: np.ndarray
    label: np.ndarray
    labels: SoftLabels
    box: np.ndarray
    flip: np.ndarray
    resize: np.ndarray | None = None
    ops: np.ndarray | None = None
    mix: np.ndarray | None = None
    source: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    image_hash: np.ndarray
    pixel_hash: np.ndarray
    has_pixel_hash: np.ndarray
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is None:
                continue
            array = objects(value) if dtype is object else np.ascontiguousarray(value, dtype=dtype)
            shape = (len(self.image_id), *_WIDTHS.get(name, ()))
            if array.shape != shape:
                raise ValueError(f"LabelRows.{name} is {np.dtype(dtype)} {list(shape)}; got {list(array.shape)}")
            object.__setattr__(self, name, array)
        for name, value in self.outputs.items():
            if value.dtype != np.float16 or value.ndim < 2 or len(value) != len(self.image_id):
                raise ValueError(
                    f"output {name} is float16 [{len(self.image_id)}, ...]; got {value.dtype} {value.shape}"
                )
        if len(self.labels) != len(self.image_id):
            raise ValueError(f"LabelRows.labels has {len(self.image_id)} rows; got {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.image_id)

    def view_at(self, row: int) -> View:
        """The view of a row, as it was drawn."""
        top, left, height, width = (int(x) for x in self.box[row])
        resize = None if self.resize is None else (int(self.resize[row, 0]), int(self.resize[row, 1]))
        return View(
            box=(top, left, height, width),
            flip=bool(self.flip[row]),
            resize=resize,
            ops=() if self.ops is None else self.ops[row],
            mix=None if self.mix is None else self.mix[row],
        )

    def partners(self) -> np.ndarray:
        """int64 [B]: in rows of whole units, which row is the one that each is mixed with; -1 where it is not mixed.

        Raises StoreDamagedError for a partner that is not among these rows.
        """
        found = np.full(len(self), -1, dtype=np.int64)
        if self.mix is None:
            return found
        rows = {key: row for row, key in enumerate(zip(self.image_id, self.view.tolist(), strict=True))}
        for row, mix in enumerate(self.mix):
            if mix is not None:
                found[row] = rows.get((mix.partner, mix.partner_view), -1)
                if found[row] < 0:
                    raise StoreDamagedError(
                        "a view is mixed with another one of its unit",
                        actual=f"view {mix.partner_view} of {mix.partner!r}, which the unit does not hold",
                        where=f"view {self.view[row]} of {self.image_id[row]!r}",
                    )
        return found

    def take(self, index: slice | np.ndarray | Sequence[int]) -> LabelRows:
        """Some of the rows: a slice, or row numbers in any order."""
        if isinstance(index, slice):
            labels, image_id = self.labels.rows(index), self.image_id[index]
        else:
            index = np.asarray(index, dtype=np.int64)
            labels, image_id = self.labels.rows(torch.from_numpy(index)), [self.image_id[i] for i in index.tolist()]
        columns = ((name, getattr(self, name)) for name in _DTYPES)
        taken: dict[str, Any] = {name: None if x is None else x[index] for name, x in columns}
        outputs = {name: x[index] for name, x in self.outputs.items()}
        return LabelRows(image_id=image_id, labels=labels, outputs=outputs, **taken)

    @staticmethod
    def concat(parts: Sequence[LabelRows]) -> LabelRows:
        """All rows of at least one part, one part after the other."""
        parts = [part for part in parts if len(part)] or parts[:1]  # a part without rows does not say what it lacks
        joined: dict[str, Any] = {}
        for name in _DTYPES:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values) and not all(value is None for value in values):
                raise ValueError(f"LabelRows that are joined all have a {name}, or none does")
            joined[name] = None if values[0] is None else np.concatenate(values)
        if any(part.outputs.keys() != parts[0].outputs.keys() for part in parts):
            raise ValueError("LabelRows that are joined have the same outputs")
        return LabelRows(
            outputs={name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs},
            image_id=[image_id for part in parts for image_id in part.image_id],
            labels=SoftLabels.cat([part.labels for part in parts]),
            **joined,
        )


def objects(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """An array of objects, one an item: NumPy left to itself makes a matrix of equally long tuples."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


_DTYPES: dict[str, type] = {
    "view": np.int32,
    "label": np.int64,
    "box": np.int32,
    "flip": np.bool_,
    "resize": np.int32,
    "ops": object,
    "mix": object,
    "source": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "image_hash": np.uint64,
    "pixel_hash": np.uint64,
    "has_pixel_hash": np.bool_,
}
_WIDTHS = {"box": (4,), "resize": (2,)}
assert set(_DTYPES) | {"image_id", "labels", "outputs"} == {x.name for x in fields(LabelRows)}
