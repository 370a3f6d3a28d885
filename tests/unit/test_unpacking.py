"""What an Arrow file unpacks to is known before it is unpacked, and a file that asks for too much is refused."""

from __future__ import annotations

import contextlib
import io
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kddata.errors import StoreDamagedError, StoreError
from kddata.store import arrow
from kddata.store.steps import HashingWriter
from kddata.store.unpacking import FREE_BYTES, allowed_bytes, unpacked_bytes

SCHEMA = pa.schema([("number", pa.int64()), ("text", pa.string()), ("list", pa.list_(pa.int32()))])


def ipc(batches: list[pa.RecordBatch], schema: pa.Schema = SCHEMA, compression: str | None = "zstd") -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return out.getvalue()


def a_batch(rows: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array(range(rows)), pa.array(["x"] * rows), pa.array([[1, 2]] * rows)], schema=SCHEMA)


def zeros(num_bytes: int) -> bytes:
    schema = pa.schema([("zero", pa.int64(), False)])
    return ipc([pa.record_batch([np.zeros(num_bytes // 8, np.int64)], schema=schema)], schema)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("batches", [[], [0], [5], [1000, 3]])
def test_it_is_the_size_of_the_columns(compression, batches):
    columns = [a_batch(rows) for rows in batches]
    found = unpacked_bytes(ipc(columns, compression=compression))
    assert (
        sum(batch.nbytes for batch in columns) <= found <= sum(batch.nbytes for batch in columns) + 128 * len(columns)
    )


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = zeros(FREE_BYTES + (1 << 20))
    assert len(bomb) < FREE_BYTES // 1000
    before = pa.total_allocated_bytes()
    peak = pa.default_memory_pool().max_memory()
    with pytest.raises(StoreDamagedError, match=r"bytes that unpack to \d+; at most 67108864 are taken.*labels/x"):
        arrow.read_index(bomb, where="labels/x")
    assert pa.total_allocated_bytes() == before
    assert pa.default_memory_pool().max_memory() == peak


def test_dictionaries_count():
    words = pa.array(["x" * 100_000, "y" * 100_000]).dictionary_encode()
    schema = pa.schema([("word", words.type)])
    assert 200_000 <= unpacked_bytes(ipc([pa.record_batch([words], schema=schema)], schema)) <= 200_300


def test_a_batch_that_is_named_twice_counts_twice():
    """The list of batches at the end of a file is anyone's to write, at 24 bytes a batch."""
    large, small = a_batch(1000), a_batch(1)
    data = bytearray(ipc([large, small]))
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - 10)
    places = range(len(data) - 10 - footer_bytes, len(data) - 10 - 24)
    first, second = (at for at in places if _is_block(data, at))
    data[second : second + 24] = data[first : first + 24]
    assert pa.ipc.open_file(bytes(data)).read_all().num_rows == 2000
    assert unpacked_bytes(bytes(data)) == 2 * unpacked_bytes(ipc([large]))


def _is_block(data: bytearray, at: int) -> bool:
    offset, metadata_bytes, body_bytes = struct.unpack_from("<qi4xq", data, at)
    inside = 0 < offset < len(data) and 8 < metadata_bytes < len(data) and 0 < body_bytes < len(data)
    return inside and data[offset : offset + 4] == b"\xff" * 4


@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_a_number_or_one_error(at, value):
    data = bytearray(ipc([a_batch(5)]))
    data[at % len(data)] = value
    with contextlib.suppress(ValueError):
        assert unpacked_bytes(bytes(data)) >= 0


@pytest.mark.parametrize("data", [b"", b"ARROW1", bytes(100), b"\xff" * 50 + b"ARROW1", ipc([a_batch(5)])[:-7]])
def test_what_is_no_arrow_file_is_one_error(data):
    with pytest.raises(ValueError):  # noqa: PT011  # any text: the caller says where
        unpacked_bytes(data)


def test_what_this_library_does_not_write_is_refused():
    with pytest.raises(ValueError, match="not compressed"):
        unpacked_bytes(ipc([a_batch(5)], compression=None))


def test_what_no_reader_would_take_is_not_written():
    schema = pa.schema([("zero", pa.int64(), False)])
    batch = pa.record_batch([np.zeros(FREE_BYTES // 8 + 1024, np.int64)], schema=schema)
    out = HashingWriter(io.BytesIO().write)
    with pytest.raises(StoreError, match=r"at most 100 times smaller.*unit 3.*always zero"):
        arrow.ArrowFormat().write(out, schema, {"unit": 3}, [batch])
    assert allowed_bytes(out.num_bytes) < batch.nbytes
