"""Arrow: label shards and image indexes as Arrow IPC files, which any Arrow reader opens.

Buffers are compressed with zstd. The schema's metadata, key `kddata`, says in JSON what the file belongs to. Arrow has
no checksum: hashes are the caller's. What a file says that it unpacks to is checked before it is unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kddata.cards import canonical_json
from kddata.errors import StoreDamagedError, StoreError
from kddata.store import unpacking
from kddata.store.steps import HashingWriter

_KEY = b"kddata"

INDEX_FIELDS = [
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("label", pa.int32()),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("length", pa.int64(), nullable=False),
]


@dataclass(frozen=True)
class ArrowFormat:
    """Label shards as Arrow IPC files. See `kddata.store.formats.ShardFormat`."""

    def write(
        self,
        out: HashingWriter,
        schema: pa.Schema,
        about: dict[str, Any],
        batches: Iterable[pa.RecordBatch],
        image_bytes: object = None,
    ) -> None:
        num_bytes = 0
        with _writer(out, schema, about) as writer:
            for batch in batches:
                writer.write_batch(batch)
                num_bytes += batch.nbytes
        if num_bytes > unpacking.allowed_bytes(out.num_bytes):  # no reader would take it
            raise StoreError(
                f"a label shard is at most {unpacking.MOST_TIMES} times smaller than its labels and outputs",
                actual=f"{num_bytes} bytes in {out.num_bytes}: nearly all are equal",
                where=f"unit {about.get('unit')}",
                fix="look at the teacher's outputs, leave out those that are always zero, or make units smaller",
            )

    def read(self, data: bytes, schema_of: Callable[[dict[str, Any]], pa.Schema], *, where: str) -> pa.Table:
        table, about = _read(data, where=where)
        _require_schema(table, schema_of(about), where=where)
        return table


def write_index(out: HashingWriter, about: dict[str, Any], columns: Sequence[Sequence[Any]], piece_images: int) -> None:
    """Writes an image index: one record batch for each piece of `piece_images` images."""
    schema = pa.schema(INDEX_FIELDS)
    with _writer(out, schema, about) as writer:
        for start in range(0, len(columns[0]), piece_images):
            piece = [column[start : start + piece_images] for column in columns]
            arrays = [pa.array(column, field.type) for column, field in zip(piece, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def read_index(data: bytes, *, where: str) -> tuple[pa.Table, dict[str, Any]]:
    """An image index as a table of `INDEX_FIELDS`, and what it says about itself."""
    return read_table(data, pa.schema(INDEX_FIELDS), where=where)


def write_table(
    out: HashingWriter, schema: pa.Schema, about: dict[str, Any], batches: Iterable[pa.RecordBatch]
) -> None:
    """Writes any table, batch by batch."""
    with _writer(out, schema, about) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_table(data: bytes, schema: pa.Schema, *, where: str) -> tuple[pa.Table, dict[str, Any]]:
    """A table of these columns, and what it says about itself. Raises StoreDamagedError for any other."""
    table, about = _read(data, where=where)
    _require_schema(table, schema, where=where)
    return table, about


def _writer(out: HashingWriter, schema: pa.Schema, about: dict[str, Any]) -> pa.RecordBatchFileWriter:
    schema = schema.with_metadata({_KEY: canonical_json(about).encode()})
    return pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False))


def _read(data: bytes, *, where: str) -> tuple[pa.Table, dict[str, Any]]:
    try:
        claimed, allowed = unpacking.unpacked_bytes(data), unpacking.allowed_bytes(len(data))
        if claimed > allowed:
            raise ValueError(f"{len(data)} bytes that unpack to {claimed}; at most {allowed} are taken")
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        table.validate(full=True)
        about = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
    except (pa.ArrowException, OSError, ValueError) as error:  # a size that lies is asked of malloc: ArrowMemoryError
        raise StoreDamagedError("a file of a store is readable Arrow", actual=str(error), where=where) from error
    if not isinstance(about, dict):
        raise StoreDamagedError("a file of a store says what it is", actual=about, where=where)
    return table, about


def _require_schema(table: pa.Table, schema: pa.Schema, *, where: str) -> None:
    if not table.schema.equals(schema):
        raise StoreDamagedError("a file of a store has its format's columns", actual=table.schema.names, where=where)
