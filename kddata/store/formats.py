"""Formats: how the columns of label shards lie in a file. One contract, kept by `kddata.testing.formats`.

    arrow        Arrow IPC, for any Arrow reader and the least bytes
    tar          WebDataset: one sample an image, for the stock webdataset library
    tar+images   the same with the bytes of each image beside its labels, and its class as KEY.cls

Deliberately not here: what the columns mean (`columns`), and hashes, which are the caller's. Image indexes are Arrow in
every store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from kddata.cards import StoreSpec
from kddata.errors import StoreDamagedError
from kddata.store import arrow, columns, tar
from kddata.store.rows import LabelRows
from kddata.store.steps import HashingWriter
from kddata.store.tar import ImageBytes
from kddata.store.units import Unit


class ShardFormat(Protocol):
    """Tables of label columns as files.

    Duties: equal batches give equal bytes; memory is bounded by one batch when writing; a reader executes nothing,
    writes nothing, allocates no more than a small multiple of the file, and gives back equal columns or raises.
    """

    def write(
        self,
        out: HashingWriter,
        schema: pa.Schema,
        about: dict[str, Any],
        batches: Iterable[pa.RecordBatch],
        image_bytes: ImageBytes | None,
    ) -> None:
        """Writes a file of these batches, each of whole images, that says `about` of itself."""
        ...

    def read(self, data: bytes, schema_of: Callable[[dict[str, Any]], pa.Schema], *, where: str) -> pa.Table:
        """The columns of a file, of the schema that `schema_of` gives for what the file says of itself.

        Raises StoreDamagedError for anything that `write` does not write, and what `schema_of` raises.
        """
        ...


_MOST = 1 << 20  # views of an image, and image shards

FORMATS: dict[str, ShardFormat] = {
    "arrow": arrow.ArrowFormat(),
    "tar": tar.TarFormat(),
    "tar+images": tar.TarFormat(with_images=True),
}


def write_labels(
    out: HashingWriter,
    spec: StoreSpec,
    unit: Unit,
    batches: Iterable[LabelRows],
    *,
    on_stored: Callable[[LabelRows], None] = lambda rows: None,
    image_bytes: ImageBytes | None = None,
) -> None:
    """Writes a label shard, one record batch for each of `rebatch(parts, batch_rows(spec, unit.num_views))`.

    Args:
        on_stored: called with the rows of each batch as they will be read: with the codec's rounding.
        image_bytes: where the format keeps images beside labels, what gives them.
    """
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

    def encoded() -> Iterator[pa.RecordBatch]:
        for rows in batches:
            batch = columns.encode(rows, spec, unit.num_views)
            views = range(unit.view_start, unit.view_stop)
            table = pa.Table.from_batches([batch])
            on_stored(columns.decode(table, spec, views=views, source=unit.shard, where="rows to be stored"))
            yield batch

    schema = columns.schema(spec, unit.num_views)
    FORMATS[spec.format].write(out, schema, about, encoded(), image_bytes)


def read_labels(
    data: bytes, spec: StoreSpec, unit_number: int, *, where: str, outputs: Sequence[str] | None = None
) -> LabelRows:
    """The rows of a label shard, with these outputs, or all.

    Raises StoreDamagedError for one that is not this unit of this store.
    """
    said: list[tuple[range, int]] = []

    def schema_of(about: dict[str, Any]) -> pa.Schema:
        if about.get("fingerprint") != spec.fingerprint or about.get("unit") != unit_number:
            raise StoreDamagedError(
                f"a label shard belongs to its store and its place, unit {unit_number}",
                actual=f"unit {about.get('unit')} of spec {about.get('fingerprint')}",
                where=where,
            )
        said.append(_place(about, where=where))
        return columns.schema(spec, len(said[0][0]))

    table = FORMATS[spec.format].read(data, schema_of, where=where)
    [(views, source)] = said
    return columns.decode(table, spec, views=views, source=source, where=where, kept=outputs)


def _place(about: dict[str, Any], *, where: str) -> tuple[range, int]:
    """(views, number of the image shard) that a label shard says it holds."""
    views, source = about.get("views"), about.get("source")
    numbers = [*views, source] if isinstance(views, list) and len(views) == 2 else []
    if not (numbers and all(type(n) is int and 0 <= n < _MOST for n in numbers) and numbers[0] < numbers[1]):
        raise StoreDamagedError(
            "a label shard says which views of which image shard it holds", actual=about, where=where
        )
    return range(numbers[0], numbers[1]), numbers[2]
