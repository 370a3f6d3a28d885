"""Images in parquet files: a column of encoded bytes, or of Hugging Face's struct of bytes and path.

Trade-off: parquet has no byte ranges for single values, so one image costs its row group up to its row; reading in
the order of rows costs each group once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

from kddata.errors import SourceError
from kddata.images import files
from kddata.images.source import ImageRef, ImageShard, check_image_id, check_label, check_unique

_BATCH_ROWS = 16  # images decoded from parquet pages at once
_BUFFER_BYTES = 4 << 20  # read at once
_LABEL = "label"
_IDS = ("image_id", "id")


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Parquet files as image shards. See `open_source`. A null image reads as zero bytes, and is a bad image.

    Attributes:
        location: as given, local paths made absolute.
        paths: shard name to URL.
        image_column: of encoded bytes, or of structs with a field `bytes`. None: the only one, or the one named image.
        label_column: of integers. None: the column `label` where it holds integers, else no labels.
        id_column: of text or integers, unique over all files. None: the text column `image_id` or `id` where there is
            one, else SHARD/ROW.
    """

    location: str | tuple[str, ...]
    paths: dict[str, str]
    image_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None
    kind: Literal["parquet"] = "parquet"

    def shard_names(self) -> list[str]:
        """Names of the parquet files. Raises SourceError naming those that are missing."""
        files.check_present(list(self.paths.values()))
        return list(self.paths)

    def scan(self, shard_name: str) -> tuple[ImageShard, list[ImageRef]]:
        """Every row of one file. Reads its labels and ids, not its images.

        Raises SourceError for a file that is no parquet, a column that is missing or of another type, a null or
        repeated id, or a label that is no class index.
        """
        url = files.path_of(self.paths, shard_name, self.location)
        with _opened(url) as file:
            num_rows, schema = file.metadata.num_rows, file.schema_arrow
            _image_leaf(schema, self.image_column, url)
            labels = _column(file, _label_column(schema, self.label_column, url))
            ids = _column(file, _id_column(schema, self.id_column, url))
        refs = []
        for row in range(num_rows):
            image_id = f"{shard_name}/{row}"
            if ids is not None:
                if ids[row] is None:
                    raise SourceError("every image has an id", actual=f"null in row {row}", where=url)
                image_id = check_image_id(str(ids[row]), f"{url}, row {row}")
            label = None if labels is None or labels[row] is None else check_label(labels[row], image_id, url)
            refs.append(ImageRef(image_id=image_id, label=label, offset=row, length=0))
        check_unique(refs, url)
        return ImageShard(name=shard_name, size_bytes=files.file_size(url), num_images=num_rows), refs

    def stream(self, shard_name: str, refs: Sequence[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        """The images of these references; a row that comes after a later one reads its row group again."""
        url = files.path_of(self.paths, shard_name, self.location)
        with _opened(url) as file:
            leaf = _image_leaf(file.schema_arrow, self.image_column, url)
            starts = [0, *accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))]
            batches: Iterator[pa.RecordBatch] = iter(())
            batch, first, group = None, 0, -1
            for ref in refs:
                if not 0 <= ref.offset < starts[-1]:
                    raise SourceError(
                        "parquet files stay as they were when they were scanned",
                        actual=f"row {ref.offset} of {starts[-1]}",
                        where=url,
                        fix="bring the former file back, or start again with the new one",
                    )
                needed = bisect_right(starts, ref.offset) - 1
                if needed != group or ref.offset < first:
                    group, first, batch = needed, starts[needed], None
                    batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[leaf], use_threads=False)
                while batch is None or ref.offset >= first + len(batch):
                    first += 0 if batch is None else len(batch)
                    batch = next(batches)
                yield ref, _bytes(batch, ref.offset - first)

    def fetch(self, shard_name: str, ref: ImageRef) -> bytes:
        """One image; costs reading its row group up to its row."""
        ((_, data),) = self.stream(shard_name, [ref])
        return data


@contextmanager
def _opened(url: str) -> Iterator[parquet.ParquetFile]:
    """The file, read with bounded buffers; what pyarrow finds wrong with it becomes a SourceError."""
    with files.open_file(url) as raw:
        try:
            with parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                "image shards that end in .parquet are whole parquet files",
                actual=" ".join(str(error).split()),
                where=url,
                fix="make it again, or leave it out",
            ) from error


def _image_leaf(schema: pa.Schema, name: str | None, url: str) -> str:
    """The column path of the encoded bytes."""
    leaves = {}
    for field in schema:
        if _is_binary(field.type):
            leaves[field.name] = field.name
        elif pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            leaves[field.name] = f"{field.name}.bytes"
    if name is None:
        name = "image" if "image" in leaves else next(iter(leaves), "") if len(leaves) == 1 else None
    if name is None or name not in leaves:
        raise _wrong_column("image_column", "of bytes, or of structs with bytes", name, list(leaves), url)
    return leaves[name]


def _label_column(schema: pa.Schema, name: str | None, url: str) -> str | None:
    found = [field.name for field in schema if pa.types.is_integer(field.type)]
    if name is not None and name not in found:
        raise _wrong_column("label_column", "of integers", name, found, url)
    return name or (_LABEL if _LABEL in found else None)


def _id_column(schema: pa.Schema, name: str | None, url: str) -> str | None:
    text = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    found = text + [field.name for field in schema if pa.types.is_integer(field.type)]
    if name is not None and name not in found:
        raise _wrong_column("id_column", "of text or integers", name, found, url)
    return name or next((one for one in _IDS if one in text), None)


def _wrong_column(argument: str, kind: str, name: str | None, found: list[str], url: str) -> SourceError:
    return SourceError(
        f"{argument} names a column {kind}",
        actual=f"{name!r}; there are {', '.join(found) or 'none'}",
        where=url,
        fix=f"pass {argument}",
    )


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _column(file: parquet.ParquetFile, name: str | None) -> list[Any] | None:
    return None if name is None else file.read(columns=[name], use_threads=False).column(0).to_pylist()


def _bytes(batch: pa.RecordBatch, row: int) -> bytes:
    """The bytes in one row, empty for a null."""
    value = batch.column(0)[row].as_py()
    return (value["bytes"] if isinstance(value, dict) else value) or b""
