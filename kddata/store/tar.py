"""Tar: label shards as WebDataset files, which the stock webdataset library decodes with its default decoders.

    __kddata__/about.json   what the file belongs to; webdataset passes over it
    KEY.json                of the image: image_id, label, source, offset, length, image_hash, resize; and every column
                            that is not of plain numbers, as a list: pixel_hash, ops, mix
    KEY.npy                 all other columns, one record a view: a structured array, sample["npy"]["log_p"]
    KEY.jpg, KEY.cls        the image's bytes and its class, in format tar+images alone

KEY is the image id, as in the images' own tars: dots of its last part are %2E, and an id that would be no safe relative
name is percent-encoded whole. Under codec compact the columns are the packed ones, one record an image.

A reader takes nothing but what the writer writes: each header is written again and compared, array headers are
compared and never evaluated, names must be those of their image ids. Nothing is unpacked, unpickled or run. Trade-off:
headers and padding cost about 2.5 kB an image; for the least bytes there is Arrow.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from kddata.cards import canonical_json
from kddata.errors import StoreDamagedError, StoreError
from kddata.store.steps import HashingWriter

_ABOUT = "__kddata__/about.json"
_IMAGE = ("image_id", "label", "source", "offset", "length", "image_hash", "resize")  # equal for all views of an image
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_MAX_NAME_BYTES = 1 << 16
_UNSAFE = re.compile(r"(^|/)\.{0,2}(/|$)|^__|[%\\\x00-\x1f\x7f]")


class ImageBytes(Protocol):
    """Gives the encoded image of a sample, as (file name ending, bytes). Raises for one that has changed."""

    def __call__(self, image_id: str, *, offset: int, length: int, image_hash: int) -> tuple[str, bytes]: ...


@dataclass(frozen=True)
class TarFormat:
    """Label shards as WebDataset tars. See `kddata.store.formats.ShardFormat`."""

    with_images: bool = False

    def write(
        self,
        out: HashingWriter,
        schema: pa.Schema,
        about: dict[str, Any],
        batches: Iterable[pa.RecordBatch],
        image_bytes: ImageBytes | None,
    ) -> None:
        if self.with_images and image_bytes is None:
            raise StoreError("format tar+images is given the images", fix="use format tar, or pass image_bytes")
        _write_member(out, _ABOUT, canonical_json(about).encode())
        for batch in batches:
            for facts, array in _samples(batch, _record(schema)):
                key = key_of(facts["image_id"])
                _write_member(out, f"{key}.json", canonical_json(facts).encode())
                _write_member(out, f"{key}.npy", _npy_header(array.dtype, len(array)) + array.tobytes())
                if not self.with_images:
                    continue
                assert image_bytes is not None
                place = {name: facts[name] for name in ("offset", "length", "image_hash")}
                suffix, data = image_bytes(facts["image_id"], **place)
                assert suffix in _IMAGE_SUFFIXES, suffix
                _write_member(out, f"{key}.{suffix}", data)
                if facts.get("label") is not None:
                    _write_member(out, f"{key}.cls", str(facts["label"]).encode())
        out.write(_END)

    def read(self, data: bytes, schema_of: Callable[[dict[str, Any]], pa.Schema], *, where: str) -> pa.Table:
        members = _members(memoryview(data), where=where)
        name, about = next(members, ("nothing", memoryview(b"")))
        if name != _ABOUT:
            raise StoreDamagedError("a file of a store says what it is", actual=f"{name!r} first", where=where)
        schema = schema_of(_json(about, where=f"{where}: {name}"))
        dtype = _record(schema)
        in_json: dict[str, list[Any]] = {field.name: [] for field in schema if field.name not in (dtype.names or ())}
        counts, bodies = [], []
        for key, group in groupby(members, key=lambda member: member[0].rpartition(".")[0]):
            sample = list(group)
            at = f"{where}: {key}"
            facts = self._facts(key, sample, set(in_json), where=at)
            body = _npy_body(sample[1][1], dtype, where=f"{at}.npy")
            bodies.append(body)
            counts.append(len(body) // dtype.itemsize)
            for column, values in in_json.items():
                value = facts[column]
                if column in _IMAGE:
                    value = [value] * counts[-1]
                elif not isinstance(value, list) or len(value) != counts[-1]:
                    raise StoreDamagedError(f"{column} has one value a record", actual=value, where=f"{at}.json")
                values += value
        array = np.frombuffer(b"".join(bodies), dtype)
        return _table(schema, in_json, array, np.array(counts, np.int64), where=where)

    def _facts(
        self, key: str, sample: list[tuple[str, memoryview]], columns: set[str], *, where: str
    ) -> dict[str, Any]:
        """What KEY.json says, of a sample with just the members that it should have."""
        wanted = [f"{key}.json", f"{key}.npy"]
        names = [name for name, _ in sample]
        facts = _json(sample[0][1], where=where) if names[:2] == wanted else {}
        if self.with_images:
            if len(names) > 2 and names[2].rpartition(".")[2] in _IMAGE_SUFFIXES:
                wanted.append(names[2])
            if facts.get("label") is not None:
                wanted.append(f"{key}.cls")
        if names != wanted or (self.with_images and len(names) < 3):
            kept = "KEY.json, KEY.npy and its image" if self.with_images else "KEY.json and KEY.npy alone"
            raise StoreDamagedError(f"a sample of a label shard has {kept}", actual=names[:5], where=where)
        if facts.keys() != columns or type(facts["image_id"]) is not str or key_of(facts["image_id"]) != key:
            raise StoreDamagedError(
                "a sample of a label shard says what its format says, and has the key of its image id",
                actual=f"{sorted(facts)}, image id {facts.get('image_id')!r}",
                where=where,
            )
        return facts


def key_of(image_id: str) -> str:
    """The WebDataset key of an image id: a safe relative name without dots in its last part. No two ids share one."""
    if _UNSAFE.search(image_id):
        return quote(image_id, safe="", errors="surrogatepass").replace(".", "%2E").replace("_", "%5F")
    folder, slash, name = image_id.rpartition("/")
    return folder + slash + name.replace(".", "%2E")


def _samples(batch: pa.RecordBatch, dtype: np.dtype) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(content of KEY.json, array of KEY.npy) of each image."""
    array = np.empty(len(batch), dtype)
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in (dtype.names or ()):
            array[name] = _plain(column).reshape(array[name].shape)
        else:
            columns[name] = column.to_pylist()
    start = 0
    for image_id, group in groupby(columns["image_id"]):
        stop = start + len(list(group))
        facts: dict[str, Any] = {}
        for name, values in columns.items():
            facts[name] = values[start:stop]
            if name in _IMAGE:
                if facts[name].count(values[start]) != stop - start:
                    raise StoreError(f"all views of an image have one {name}", actual=facts[name][:4], where=image_id)
                facts[name] = values[start]
        yield facts, array[start:stop]
        start = stop


def _record(schema: pa.Schema) -> np.dtype:
    """The dtype of KEY.npy: every column of plain numbers, save those of the image, little-endian, without gaps."""
    fields: list[Any] = []
    for field in schema:
        kind, shape = field.type, []
        if pa.types.is_fixed_size_list(kind):
            kind, shape = kind.value_type, [(kind.list_size,)]
        plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        if plain and not field.nullable and field.name not in _IMAGE:
            fields.append((field.name, np.dtype(kind.to_pandas_dtype()).newbyteorder("<"), *shape))
    return np.dtype(fields)


def _plain(column: pa.Array) -> np.ndarray:
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    return values.to_numpy(zero_copy_only=False)


def _table(
    schema: pa.Schema, in_json: dict[str, list[Any]], array: np.ndarray, counts: np.ndarray, *, where: str
) -> pa.Table:
    columns = []
    try:
        for field in schema:
            if field.name in in_json:
                columns.append(pa.array(in_json[field.name], field.type))
                continue
            values = pa.array(np.ascontiguousarray(array[field.name]).reshape(-1))
            if pa.types.is_fixed_size_list(field.type):
                values = pa.FixedSizeListArray.from_arrays(values, type=field.type)
            columns.append(values)
        table = pa.table(columns, schema=schema)
        table.validate(full=True)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise StoreDamagedError("a label shard has its format's columns", actual=error, where=where) from error
    nulls = [field.name for field in schema if not field.nullable and table[field.name].null_count]
    if nulls:
        raise StoreDamagedError("a label shard has its format's columns", actual=f"null in {nulls}", where=where)
    return table


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    """What `numpy.lib.format` 1.0 puts before an array of one dimension, written here so that it never changes."""
    text = f"{{'descr': {dtype.descr!r}, 'fortran_order': False, 'shape': ({count},), }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


def _npy_body(data: memoryview, dtype: np.dtype, *, where: str) -> memoryview:
    start = 10 + int.from_bytes(data[8:10], "little")
    count, rest = divmod(len(data) - start, dtype.itemsize)
    if count < 1 or rest or data[:start] != _npy_header(dtype, count):
        raise StoreDamagedError(f"KEY.npy is an array of {dtype.names}", actual=f"{bytes(data[:128])!r}", where=where)
    return data[start:]


def _json(data: memoryview, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise StoreDamagedError("a label shard has readable JSON", actual=error, where=where) from error
    if not isinstance(value, dict):
        raise StoreDamagedError("a label shard has JSON objects", actual=type(value).__name__, where=where)
    return value


def _write_member(out: HashingWriter, name: str, data: bytes) -> None:
    out.write(_header(name, len(data)))
    out.write(data)
    out.write(bytes(-len(data) % _BLOCK))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # time 0, owner 0 without a name, mode 0644
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _members(data: memoryview, *, where: str) -> Iterator[tuple[str, memoryview]]:
    """(name, bytes) of each member of a tar that `_write_member` wrote. Raises StoreDamagedError for any other."""
    position = 0
    while data[position:] != _END:
        try:
            name, size = _name_and_size(data[position : position + 2 * _BLOCK + _MAX_NAME_BYTES])
            header = _header(name, size)
        except (tarfile.HeaderError, ValueError) as error:
            raise _damaged(error, position, where) from error
        start = position + len(header)
        if data[position:start] != header:
            raise _damaged(f"{name!r}, no plain file of this format", position, where)
        position = start + size + -size % _BLOCK
        if position > len(data) - len(_END) or any(data[start + size : position]):
            raise _damaged(f"{name!r} of {size} bytes, where {len(data) - start} are left", start, where)
        yield name, data[start : start + size]


def _name_and_size(data: memoryview) -> tuple[str, int]:
    """Of the member whose header, with a GNU long name or without, begins here. Raises HeaderError or ValueError."""
    info = tarfile.TarInfo.frombuf(bytes(data[:_BLOCK]), "utf-8", "strict")
    if info.type != tarfile.GNUTYPE_LONGNAME:
        return _checked(info.name, info.size)
    start = _BLOCK + info.size + -info.size % _BLOCK
    if not 0 < info.size <= _MAX_NAME_BYTES:
        raise ValueError(f"a name of {info.size} bytes")
    name = bytes(data[_BLOCK : _BLOCK + info.size - 1]).decode()
    return _checked(name, tarfile.TarInfo.frombuf(bytes(data[start : start + _BLOCK]), "utf-8", "strict").size)


def _checked(name: str, size: int) -> tuple[str, int]:
    if size < 0 or "\0" in name:
        raise ValueError(f"{name!r} of {size} bytes")
    return name, size


def _damaged(actual: object, position: int, where: str) -> StoreDamagedError:
    return StoreDamagedError(
        "a label shard holds what its format writes", actual=actual, where=f"{where}, byte {position}"
    )
