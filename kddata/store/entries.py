"""Entries: the units and image shards of a manifest, as dicts by their number; few are listed in it, many in its parts,
Arrow files beside it.

A manifest of up to 512 units is one JSON file that people read. Beyond that its JSON would cost whoever opens the store
more with every unit, so its units and image shards become columns, read at the first use. Each generation adds parts
for what it adds. Every part has a copy, like a manifest, from which it can be mended.

Letters: N entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from kddata.errors import StoreDamagedError
from kddata.store import arrow, naming, rules
from kddata.store.steps import HashingWriter
from kddata.store.storage import Storage, read_checked

INLINE_MOST = 512  # entries of either kind that a manifest holds itself
PARTS_VERSION = 2  # of the format, of a manifest that has parts
_BATCH_ENTRIES = 1 << 12

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What entries are of: `key` names them in a manifest, `stem` their parts."""

    key: str
    stem: str
    schema: pa.Schema


UNITS = Kind(
    key="units",
    stem="units",
    schema=pa.schema(
        [
            *(pa.field(name, pa.int64(), nullable=False) for name in rules.UNIT_NUMBERS),
            pa.field("sha256", pa.binary(32), nullable=False),
        ]
    ),
)
IMAGE_SHARDS = Kind(
    key="image_shards",
    stem="images",
    schema=pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("num_images", pa.int64(), nullable=False),
            pa.field("size_bytes", pa.int64()),
            pa.field("sha256", pa.binary(32), nullable=False),
        ]
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One Arrow file of entries."""

    file: str
    sha256: str
    entries: int


class Entries(Sequence[dict[str, Any]]):
    """The entries of some parts, read at the first use and made into dicts one by one. Cheap to pickle.

    Args:
        format: of the label shards that units name.
        num_shards: how many image shards there are for units to be of.
        salvage: reads the copy of a part that is damaged.

    Any use raises StoreDamagedError for parts that are not as they were written.
    """

    def __init__(
        self,
        storage: Storage,
        kind: Kind,
        parts: Sequence[Part],
        *,
        format: str,
        num_shards: int,
        salvage: bool = False,
    ) -> None:
        self._args = storage, kind, tuple(parts), format, num_shards, salvage
        self._columns: dict[str, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _entries, self._args

    @property
    def parts(self) -> tuple[Part, ...]:
        return self._args[2]

    def __eq__(self, other: object) -> bool:
        """Whether the parts are the same, by their hashes."""
        return isinstance(other, Entries) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __len__(self) -> int:
        return sum(part.entries for part in self.parts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        entry = {name: column[place] for name, column in self.columns().items()}
        for name, value in entry.items():
            if isinstance(value, np.integer):
                entry[name] = int(value) if value >= 0 else None
        if "number" in entry:
            entry["file"] = naming.labels_name(entry["number"], self._args[3])
        return entry

    def columns(self) -> dict[str, Any]:
        """Each [N]: whole numbers as int64, -1 for those that are not known; hashes and names as lists of str."""
        if self._columns is None:
            storage, kind, parts, _, num_shards, salvage = self._args
            tables = [_read_part(storage, kind, part, salvage=salvage) for part in parts]
            table = pa.concat_tables([kind.schema.empty_table(), *tables])
            columns: dict[str, Any] = {}
            for field in kind.schema:
                column = table[field.name]
                if field.type == pa.int64():
                    columns[field.name] = column.fill_null(-1).to_numpy()
                elif field.name == "sha256":
                    columns[field.name] = _hex(column)
                else:
                    columns[field.name] = column.to_pylist()
            where = f"{storage.url}/{', '.join(part.file for part in parts)}"
            if kind.key == UNITS.key:
                rules.check_unit_columns(columns, num_shards, where=where)
            else:
                rules.check_shard_columns(columns, where=where)
            self._columns = columns
        return self._columns


def mapped(entries: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], T]) -> Sequence[T]:
    """Entries as something else: made once where they are listed, each time that one is asked for in parts."""
    return _Mapped(entries, make) if isinstance(entries, Entries) else tuple(map(make, entries))


class _Mapped(Sequence[T], Generic[T]):
    def __init__(self, entries: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], T]) -> None:
        self._entries, self._make = entries, make

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(entry) for entry in self._entries[index]]
        return self._make(self._entries[index])


def numbers(entries: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """int64 [N]: a whole number of each entry."""
    if isinstance(entries, Entries):
        return entries.columns()[name]
    return np.array([entry[name] for entry in entries], dtype=np.int64)


def texts(entries: Sequence[dict[str, Any]], name: str) -> list[str]:
    """A name or hash of each entry."""
    return list(entries.columns()[name]) if isinstance(entries, Entries) else [entry[name] for entry in entries]


def write_part(
    storage: Storage,
    kind: Kind,
    entries: Iterable[dict[str, Any]],
    *,
    generation: int,
    about: dict[str, Any],
    before_publishing: Callable[[], None],
) -> Part:
    """Writes a part, its copy first; 4,096 entries are held. `before_publishing` raises where it came too late."""
    name = naming.part_name(kind.stem, generation)
    with storage.replacing(naming.twin(name)) as out:
        num_entries = _write(out, kind, entries, {**about, "generation": generation, "of": kind.key})
        before_publishing()
    with storage.replacing(name) as again:
        for data in storage.chunks(naming.twin(name)):
            again.write(data)
        before_publishing()
    if again.sha256 != out.sha256:
        raise StoreDamagedError("a file is read as it was written", where=f"{storage.url}/{naming.twin(name)}")
    return Part(file=name, sha256=out.sha256, entries=num_entries)


def _write(out: HashingWriter, kind: Kind, entries: Iterable[dict[str, Any]], about: dict[str, Any]) -> int:
    remaining, num_entries = iter(entries), 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal num_entries
        while batch := list(islice(remaining, _BATCH_ENTRIES)):
            num_entries += len(batch)
            rows = [{**entry, "sha256": bytes.fromhex(entry["sha256"])} for entry in batch]
            yield pa.RecordBatch.from_pylist(rows, schema=kind.schema)

    arrow.write_table(out, kind.schema, about, batches())
    return num_entries


def _read_part(storage: Storage, kind: Kind, part: Part, *, salvage: bool) -> pa.Table:
    where = f"{storage.url}/{part.file}"
    try:
        data = read_checked(storage, part.file, part.sha256)
    except StoreDamagedError:
        if not salvage:
            raise
        data = read_checked(storage, naming.twin(part.file), part.sha256)
    table = arrow.read_table(data, kind.schema, where=where)[0]
    if table.num_rows != part.entries:
        raise StoreDamagedError(f"this part has {part.entries} entries", actual=table.num_rows, where=where)
    return table


def _hex(column: pa.ChunkedArray) -> list[str]:
    """Of hashes of 32 bytes; to_pylist would take as long again as all else."""
    text = b"".join(chunk.buffers()[1][32 * chunk.offset :][: 32 * len(chunk)] for chunk in column.chunks).hex()
    return [text[i : i + 64] for i in range(0, len(text), 64)]


def _entries(
    storage: Storage, kind: Kind, parts: Sequence[Part], format: str, num_shards: int, salvage: bool
) -> Entries:
    return Entries(storage, kind, parts, format=format, num_shards=num_shards, salvage=salvage)
