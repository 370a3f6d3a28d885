"""Unpacking: how many bytes an Arrow IPC file says that it unpacks to, read from its headers before anything is.

Arrow allocates what each compressed buffer declares, so that a file of some KB may ask for all memory there is; its
footer may also name one batch many times. pyarrow shows neither, so the few flatbuffer tables that say it are read here
(Arrow's format/File.fbs and Message.fbs). Trade-off: only what `kddata.store.arrow` writes is understood, which is
compressed.
"""

from __future__ import annotations

import struct

_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff" * 4
_DICTIONARY, _RECORD_BATCH = 2, 3  # kinds of message
_BLOCK_BYTES, _BUFFER_BYTES = 24, 16
MOST_TIMES = 100  # real columns of labels are packed to a half or a twentieth; LZ4 packs zeros to 1 in 255
FREE_BYTES = 64 << 20  # a file may unpack to so much however small it is


def allowed_bytes(file_bytes: int) -> int:
    """Most bytes that a file of this size may unpack to."""
    return max(FREE_BYTES, MOST_TIMES * file_bytes)


def unpacked_bytes(data: bytes) -> int:
    """The sum of the lengths that the buffers of all record batches and dictionaries declare.

    Raises ValueError for a file that is cut, or that `kddata.store.arrow` does not write.
    """
    try:
        return _unpacked_bytes(memoryview(data))
    except (struct.error, IndexError) as error:
        raise ValueError("a place that it names lies outside it") from error


def _unpacked_bytes(data: memoryview) -> int:
    if bytes(data[-6:]) != _MAGIC:
        raise ValueError("it does not end as Arrow files do")
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - 10)
    if not 0 < footer_bytes <= len(data) - 10:
        raise ValueError(f"its footer has {footer_bytes} bytes")
    footer = data[len(data) - 10 - footer_bytes : len(data) - 10]
    root = _root(footer)
    total = 0
    for kind, blocks in ((_DICTIONARY, 2), (_RECORD_BATCH, 3)):
        start, count = _vector(footer, root, blocks)
        for i in range(count):
            total += _of_block(data, kind, *struct.unpack_from("<qi4xq", footer, start + _BLOCK_BYTES * i))
    return total


def _of_block(data: memoryview, kind: int, offset: int, metadata_bytes: int, body_bytes: int) -> int:
    """Bytes that one record batch, or dictionary, unpacks to."""
    if min(offset, metadata_bytes - 8, body_bytes) < 0 or offset + metadata_bytes + body_bytes > len(data):
        raise ValueError("a record batch lies outside it")
    if bytes(data[offset : offset + 4]) != _CONTINUATION:
        raise ValueError("a record batch is of an older form")
    message, body = data[offset + 8 : offset + metadata_bytes], data[offset + metadata_bytes :][:body_bytes]
    root = _root(message)
    found, header = _field(message, root, 1), _field(message, root, 2)
    if found is not None and header is not None and message[found] == kind == _DICTIONARY:
        header = _field(message, _follow(message, header), 1)  # its record batch
    if found is None or message[found] != kind or header is None:
        raise ValueError("a block is of another kind")
    batch = _follow(message, header)
    if _field(message, batch, 3) is None:
        raise ValueError("a record batch is not compressed")
    start, count = _vector(message, batch, 2)
    total = 0
    for i in range(count):
        place, num_bytes = struct.unpack_from("<qq", message, start + _BUFFER_BYTES * i)
        if min(place, num_bytes) < 0 or place + num_bytes > body_bytes:
            raise ValueError("a buffer lies outside its record batch")
        if num_bytes:
            (declared,) = struct.unpack_from("<q", body, place)
            if declared < -1:
                raise ValueError(f"a buffer of {declared} bytes")
            total += num_bytes if declared == -1 else declared  # -1: as it is
    return total


def _root(buffer: memoryview) -> int:
    return _follow(buffer, 0)


def _follow(buffer: memoryview, place: int) -> int:
    """The place that the offset at a place refers to; offsets are unsigned and lead on."""
    return place + int(struct.unpack_from("<I", buffer, place)[0])


def _field(buffer: memoryview, table: int, number: int) -> int | None:
    """Where a field of a table lies; None where it is left out."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    if vtable < 0:
        raise ValueError("a table lies outside it")
    entry = 4 + 2 * number
    if entry >= struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    offset = int(struct.unpack_from("<H", buffer, vtable + entry)[0])
    return table + offset if offset else None


def _vector(buffer: memoryview, table: int, number: int) -> tuple[int, int]:
    """(place of the first item, how many) of a field that is a vector; (0, 0) where it is left out."""
    field = _field(buffer, table, number)
    if field is None:
        return 0, 0
    start = _follow(buffer, field)
    return start + 4, int(struct.unpack_from("<I", buffer, start)[0])
