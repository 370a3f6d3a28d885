"""Columns: label rows as Arrow record batches and back, by the codec of a spec. Pure functions.

What every format of shard files stores. Rows are cut into batches of whole images and of a size that depends on the
spec alone, whatever the pieces in which they arrive, so equal rows give equal bytes. Codec `exact` has one record a
view, `compact` one an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from kddata.cards import StoreSpec
from kddata.errors import LabelError, StoreDamagedError
from kddata.store import codecs, compact, outputs, recipes
from kddata.store.rows import LabelRows

_BATCH_ROWS = 8192
_BATCH_VALUES = 1 << 22  # of one column: k = C = 21841 gives batches of 192 rows

_BEFORE = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("view", pa.int32(), nullable=False),
    pa.field("label", pa.int32()),
]
_AFTER = [
    pa.field("resize", pa.list_(pa.int32(), 2)),
    pa.field("box", pa.list_(pa.int32(), 4), nullable=False),
    pa.field("flip", pa.bool_(), nullable=False),
    pa.field("source", pa.int32(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("length", pa.int64(), nullable=False),
    pa.field("image_hash", pa.uint64(), nullable=False),
    pa.field("pixel_hash", pa.uint64()),
]


def schema(spec: StoreSpec, num_views: int) -> pa.Schema:
    """The columns of the label shard of a unit with so many views of each image."""
    if spec.codec == "compact":
        return pa.schema(
            [
                *compact.fields(spec, num_views),
                *recipes.fields(spec, nested=num_views),
                *outputs.fields(spec, num_views),
            ]
        )
    return pa.schema([*_BEFORE, *codecs.fields(spec), *_AFTER, *recipes.fields(spec), *outputs.fields(spec)])


def batch_rows(spec: StoreSpec, num_views: int) -> int:
    """How many rows, of whole images, a record batch of a label shard has; only its last one may have fewer."""
    widest = max([spec.k, *(output.size for output in spec.outputs)])
    rows = max(1, min(_BATCH_ROWS, _BATCH_VALUES // widest))
    return max(1, rows // num_views) * num_views


def rebatch(parts: Iterable[LabelRows], num_rows: int) -> Iterator[LabelRows]:
    """The same rows in batches of `num_rows`; only the last one may have fewer, and none is empty."""
    held: list[LabelRows] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= num_rows:
            rows = LabelRows.concat(held)
            for start in range(0, size - num_rows + 1, num_rows):
                yield rows.take(slice(start, start + num_rows))
            held, size = [rows.take(slice(size - size % num_rows, size))], size % num_rows
    if size:
        yield LabelRows.concat(held)


def encode(rows: LabelRows, spec: StoreSpec, num_views: int) -> pa.RecordBatch:
    """Rows as a batch of `schema`. Raises LabelError for what breaks its rules or the codec cannot hold."""
    if spec.codec == "compact":
        arrays = [*compact.encode(rows, spec, num_views), *recipes.encode(rows, spec, nested=num_views)]
        arrays += outputs.encode(rows, spec, num_views)
        return pa.record_batch(arrays, schema=schema(spec, num_views))
    resize = np.zeros((len(rows), 2), np.int32) if rows.resize is None else rows.resize
    no_resize = np.full(len(rows), rows.resize is None)
    arrays = [
        pa.array(rows.image_id, pa.string()),
        pa.array(rows.view),
        pa.array(np.maximum(rows.label, -1), pa.int32(), mask=rows.label < 0),
        *codecs.encode(rows.labels, spec),
        pa.FixedSizeListArray.from_arrays(pa.array(resize.reshape(-1)), 2, mask=pa.array(no_resize)),
        pa.FixedSizeListArray.from_arrays(pa.array(rows.box.reshape(-1)), 4),
        *(pa.array(getattr(rows, name)) for name in ("flip", "source", "offset", "length", "image_hash")),
        # What a null hides is part of the bytes.
        pa.array(np.where(rows.has_pixel_hash, rows.pixel_hash, 0).astype(np.uint64), mask=~rows.has_pixel_hash),
        *recipes.encode(rows, spec),
        *outputs.encode(rows, spec),
    ]
    return pa.record_batch(arrays, schema=schema(spec, num_views))


def decode(
    table: pa.Table, spec: StoreSpec, *, views: range, source: int, where: str, kept: Sequence[str] | None = None
) -> LabelRows:
    """The rows of a table of `schema`, with the rounding of their codec.

    Args:
        views, source: the views and the image shard of the unit.
        kept: names of the outputs that the rows are to have; None for all.

    Raises StoreDamagedError for values that no labels have.
    """
    unread = outputs.unread(spec, kept)
    columns = {name: table[name].combine_chunks() for name in table.column_names if name not in unread}
    held = outputs.decode(columns, spec, kept)
    resize = columns["resize"]
    if resize.null_count not in (0, len(resize)):
        raise StoreDamagedError("all views of a unit are resized, or none is", where=where)
    try:
        if spec.codec == "compact":
            rows = compact.decode(columns, spec, views=views, source=source)
            return replace(rows, outputs=held, **recipes.decode(columns, spec, where=where))
        labels = codecs.decode([columns[field.name] for field in codecs.fields(spec)], spec)
    except LabelError as error:
        raise StoreDamagedError(error.rule, actual=error.actual, where=where) from error
    pixel_hash = columns["pixel_hash"]
    return LabelRows(
        image_id=_strings(columns["image_id"]),
        view=_numbers(columns["view"]),
        label=_numbers(columns["label"].fill_null(-1)),
        labels=labels,
        box=columns["box"].flatten().to_numpy().reshape(-1, 4),
        flip=_numbers(columns["flip"]),
        resize=None if resize.null_count else resize.flatten().to_numpy().reshape(-1, 2),
        source=_numbers(columns["source"]),
        offset=_numbers(columns["offset"]),
        length=_numbers(columns["length"]),
        image_hash=_numbers(columns["image_hash"]),
        pixel_hash=_numbers(pixel_hash.fill_null(0)),
        has_pixel_hash=_numbers(pixel_hash.is_valid()),
        outputs=held,
        **recipes.decode(columns, spec, where=where),
    )


def _numbers(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _strings(column: pa.Array) -> list[str]:
    """As Python strings, one object for each distinct text: a unit repeats an image's id in each of its views."""
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    return [texts[i] for i in encoded.indices.to_numpy().tolist()]
