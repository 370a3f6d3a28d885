"""Arrow: label shards and image indexes as Arrow IPC files, which any Arrow reader opens.

Equal rows give equal bytes: rows are cut into record batches of a size that depends on the spec alone, whatever the
pieces in which they arrive. Buffers are compressed with zstd. The schema's metadata, key `kddata`, says in JSON what
the file belongs to. Arrow has no checksum: hashes are the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from kddata.cards import StoreSpec, canonical_json
from kddata.errors import LabelError, StoreDamagedError
from kddata.store import codecs, compact, recipes
from kddata.store.manifest import Unit
from kddata.store.rows import LabelRows
from kddata.store.storage import HashingWriter

_BATCH_ROWS = 8192
_BATCH_VALUES = 1 << 22  # of one column: k = C = 21841 gives batches of 192 rows
_KEY = b"kddata"

INDEX_FIELDS = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("label", pa.int32()),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("length", pa.int64(), nullable=False),
]
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


def label_fields(spec: StoreSpec, num_views: int) -> list[pa.Field]:
    """The columns of the label shard of a unit with so many views of each image."""
    if spec.codec == "compact":
        return [*compact.fields(spec, num_views), *recipes.fields(spec, nested=num_views)]
    return [*_BEFORE, *codecs.fields(spec), *_AFTER, *recipes.fields(spec)]


def batch_rows(spec: StoreSpec, num_views: int) -> int:
    """How many rows a record batch of a label shard has; only its last one may have fewer. Compact: whole images."""
    rows = max(1, min(_BATCH_ROWS, _BATCH_VALUES // spec.k))
    return max(1, rows // num_views) * num_views if spec.codec == "compact" else rows


def write_labels(out: HashingWriter, spec: StoreSpec, unit: Unit, batches: Iterable[LabelRows]) -> None:
    """Writes a label shard, one record batch for each of `rebatch(parts, batch_rows(spec, unit.num_views))`."""
    about = {
        "codec": spec.codec,
        "fingerprint": spec.fingerprint,
        "format_version": spec.format_version,
        "num_classes": spec.teacher.num_classes,
        "source": unit.shard,
        "temperatures": spec.temperatures,
        "unit": unit.number,
        "views": [unit.view_start, unit.view_stop],
    }
    schema = label_fields(spec, unit.num_views)
    with _writer(out, schema, about) as writer:
        for rows in batches:
            if spec.codec == "compact":
                arrays = compact.encode(rows, spec, unit.num_views)
                arrays += recipes.encode(rows, spec, nested=unit.num_views)
                writer.write_batch(pa.record_batch(arrays, schema=pa.schema(schema)))
            else:
                writer.write_batch(_to_batch(rows, schema, spec))


def read_labels(data: bytes, spec: StoreSpec, unit_number: int, *, where: str) -> LabelRows:
    """The rows of a label shard. Raises StoreDamagedError for one that is not this unit of this store."""
    table, about = _read(data, where=where)
    if about.get("fingerprint") != spec.fingerprint or about.get("unit") != unit_number:
        raise StoreDamagedError(
            f"a label shard belongs to its store and its place, unit {unit_number}",
            actual=f"unit {about.get('unit')} of spec {about.get('fingerprint')}",
            where=where,
        )
    views = _views(about, where=where)
    _require_fields(table, label_fields(spec, len(views)), where=where)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    resize = columns["resize"]
    if resize.null_count not in (0, len(resize)):
        raise StoreDamagedError("all views of a unit are resized, or none is", where=where)
    try:
        if spec.codec == "compact":
            rows = compact.decode(columns, spec, views=views, source=about["source"])
            return replace(rows, **recipes.decode(columns, spec, where=where))
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
        **recipes.decode(columns, spec, where=where),
    )


def write_index(out: HashingWriter, about: dict[str, Any], columns: Sequence[Sequence[Any]], piece_images: int) -> None:
    """Writes an image index: one record batch for each piece of `piece_images` images."""
    schema = pa.schema(INDEX_FIELDS)
    with _writer(out, INDEX_FIELDS, about) as writer:
        for start in range(0, len(columns[0]), piece_images):
            piece = [column[start : start + piece_images] for column in columns]
            arrays = [pa.array(column, field.type) for column, field in zip(piece, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def read_index(data: bytes, *, where: str) -> tuple[pa.Table, dict[str, Any]]:
    """An image index as a table of `INDEX_FIELDS`, and what it says about itself."""
    table, about = _read(data, where=where)
    _require_fields(table, INDEX_FIELDS, where=where)
    return table, about


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


def _to_batch(rows: LabelRows, fields: list[pa.Field], spec: StoreSpec) -> pa.RecordBatch:
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
    ]
    return pa.record_batch(arrays, schema=pa.schema(fields))


def _writer(out: HashingWriter, fields: list[pa.Field], about: dict[str, Any]) -> pa.RecordBatchFileWriter:
    schema = pa.schema(fields, metadata={_KEY: canonical_json(about).encode()})
    return pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False))


def _read(data: bytes, *, where: str) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        table.validate(full=True)
        about = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
        raise StoreDamagedError("a file of a store is readable Arrow", actual=str(error), where=where) from error
    if not isinstance(about, dict):
        raise StoreDamagedError("a file of a store says what it is", actual=about, where=where)
    return table, about


def _views(about: dict[str, Any], *, where: str) -> range:
    start, stop, source = (*about.get("views", ()), about.get("source"), None, None)[:3]
    if not (isinstance(start, int) and isinstance(stop, int) and isinstance(source, int) and 0 <= start < stop):
        raise StoreDamagedError(
            "a label shard says which views of which image shard it holds", actual=about, where=where
        )
    return range(start, stop)


def _require_fields(table: pa.Table, fields: list[pa.Field], *, where: str) -> None:
    if not table.schema.equals(pa.schema(fields)):
        raise StoreDamagedError("a file of a store has its format's columns", actual=table.schema.names, where=where)


def _numbers(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _strings(column: pa.Array) -> list[str]:
    """As Python strings, one object for each distinct text: a unit repeats an image's id in each of its views."""
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    return [texts[i] for i in encoded.indices.to_numpy().tolist()]
