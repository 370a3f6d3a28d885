"""Export: the rows of a store as one Parquet file, for DuckDB, Polars, Hugging Face `datasets` and the like.

A row is one view of one image. Columns, in this order:

    image_id, view, label                     string; int32; int32 or null
    ids, log_p                                lists of k: class ids int32, log-probabilities float32, falling; of
                                              sampled labels log(draws / k), -inf for the classes that fill a row up
    log_tail                                  list: float32, one for each temperature that the file's metadata names
    top, left, height, width, flip            the crop, int32, in px of the image (or of the resized one); bool
    resize_height, resize_width               int32 or null: what the whole image is first resized to
    ops, mix                                  where the plan draws any: names, and the magnitudes of all; or null
    image_shard, offset, length, image_hash   where the image lies: string, int64, int64, uint64
    pixel_hash                                uint64 or null

The file's metadata, key `kddata`, says in JSON what it is of. Deliberately not here: reading it back. Trade-off: floats
are 32 bits wide, since few readers know half floats, so that a file is larger than its store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from kddata.cards import StoreSpec, canonical_json
from kddata.errors import ConfigError
from kddata.store import LabelRows, LabelStore, open_storage
from kddata.store.columns import rebatch
from kddata.store.recipes import encode as recipe_arrays
from kddata.store.recipes import fields as recipe_fields

_GROUP_ROWS = 1 << 16
_GROUP_VALUES = 1 << 22  # of one column


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A Parquet file that was written."""

    url: str
    rows: int
    row_groups: int
    num_bytes: int


def export_parquet(
    store: LabelStore, out: str, *, on_rows: Callable[[int, int], None] = lambda done, total: None
) -> Exported:
    """Writes all rows of a store into one Parquet file, a row group at a time; it appears whole or not at all.

    Args:
        out: path or URL of the file, which ends in .parquet and is replaced if it is there.
        on_rows: called with (rows written so far, all rows), for progress.

    Raises ConfigError for another name, StoreDamagedError for a damaged shard.
    """
    folder, _, name = out.rpartition("/")
    if not name.endswith(".parquet") or name == ".parquet":
        raise ConfigError("an export is written to a file that ends in .parquet", actual=repr(out))
    spec = store.spec
    schema, done, groups = _schema(store), 0, 0
    with (
        open_storage(folder or ("/" if out.startswith("/") else ".")).replacing(name) as file,
        parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for rows in rebatch(
            _units(store), max(1, min(_GROUP_ROWS, _GROUP_VALUES // max([spec.k, *(o.size for o in spec.outputs)])))
        ):
            writer.write_batch(_to_batch(store, rows, schema), row_group_size=len(rows))
            done, groups = done + len(rows), groups + 1
            on_rows(done, store.num_rows)
    return Exported(url=out, rows=done, row_groups=groups, num_bytes=file.num_bytes)


def _units(store: LabelStore) -> Iterator[LabelRows]:
    for unit in range(len(store.rows_per_unit)):
        yield store.read(unit)


def _schema(store: LabelStore) -> pa.Schema:
    spec: StoreSpec = store.spec
    about = {
        "fingerprint": spec.fingerprint,
        "k": spec.k,
        "num_classes": spec.teacher.num_classes,
        "teacher": spec.teacher.arch,
        "temperatures": spec.temperatures,
        **({"keep": spec.keep} if spec.keep != "top" else {}),
    }
    fields = [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("view", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("log_p", pa.list_(pa.float32()), nullable=False),
        pa.field("log_tail", pa.list_(pa.float32()), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("top", "left", "height", "width")),
        pa.field("flip", pa.bool_(), nullable=False),
        pa.field("resize_height", pa.int32()),
        pa.field("resize_width", pa.int32()),
        *recipe_fields(spec),
        pa.field("image_shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("image_hash", pa.uint64(), nullable=False),
        pa.field("pixel_hash", pa.uint64()),
        *(pa.field(f"output.{output.name}", pa.list_(pa.float32()), nullable=False) for output in spec.outputs),
    ]
    return pa.schema(fields, metadata={b"kddata": canonical_json(about).encode()})


def _to_batch(store: LabelStore, rows: LabelRows, schema: pa.Schema) -> pa.RecordBatch:
    labels = rows.labels
    no_resize = np.full(len(rows), rows.resize is None)
    resize = np.zeros((len(rows), 2), np.int32) if rows.resize is None else rows.resize
    arrays = [
        pa.array(rows.image_id, pa.string()),
        pa.array(rows.view),
        pa.array(rows.label, pa.int32(), mask=rows.label < 0),
        *(_lists(x.numpy()) for x in (labels.ids_BK, labels.log_p_BK, labels.log_tail_BT)),
        *(pa.array(np.ascontiguousarray(rows.box[:, i])) for i in range(4)),
        pa.array(rows.flip),
        *(pa.array(np.ascontiguousarray(resize[:, i]), mask=no_resize) for i in range(2)),
        *recipe_arrays(rows, store.spec),
        pa.array([store.images[shard].name for shard in rows.source.tolist()], pa.string()),
        *(pa.array(getattr(rows, name)) for name in ("offset", "length", "image_hash")),
        pa.array(rows.pixel_hash, mask=~rows.has_pixel_hash),
        *(_lists(rows.outputs[o.name].reshape(len(rows), -1).astype(np.float32)) for o in store.spec.outputs),
    ]
    return pa.record_batch(arrays, schema=schema)


def _lists(values_BN: np.ndarray) -> pa.ListArray:
    num_rows, width = values_BN.shape
    offsets = np.arange(0, num_rows * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values_BN).reshape(-1)))
