"""Parquet sources: the forms that image columns take, and columns that do not fit."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from kddata.errors import SourceError
from kddata.images import open_source
from kddata.testing import encode, small_image

JPEG = encode(small_image(0, height_px=24, width_px=30))


def write_parquet(path: Path, columns: dict[str, pa.Array], *, rows: int = 3) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=rows)
    return str(path)


def images(count: int) -> list[bytes]:
    return [encode(small_image(i % 3, height_px=20 + i % 5, width_px=22, index=i), "png") for i in range(count)]


def test_hugging_face_columns_are_read(tmp_path: Path) -> None:
    data = images(10)
    column = pa.array([{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(data)])
    location = write_parquet(tmp_path / "x.parquet", {"image": column, "label": pa.array(range(10)), "id": column})
    source = open_source(location)
    refs = source.scan("x.parquet")[1]
    assert [ref.image_id for ref in refs] == [f"x.parquet/{i}" for i in range(10)]
    assert [ref.label for ref in refs] == list(range(10))
    assert [one for _, one in source.stream("x.parquet", refs)] == data
    backwards = list(reversed(refs))
    assert [one for _, one in source.stream("x.parquet", backwards)] == list(reversed(data))
    assert [source.fetch("x.parquet", ref) for ref in (refs[9], refs[3])] == [data[9], data[3]]


def test_named_columns_are_used(tmp_path: Path) -> None:
    data = images(4)
    columns = {
        "photo": pa.array(data, pa.large_binary()),
        "thumb": pa.array([b""] * 4),
        "fine": pa.array([3, None, -1, 0], pa.int8()),
        "number": pa.array([10, 11, 12, 13]),
    }
    location = write_parquet(tmp_path / "x.parquet", columns)
    source = open_source(location, image_column="photo", label_column="fine", id_column="number")
    refs = source.scan("x.parquet")[1]
    assert [(ref.image_id, ref.label) for ref in refs] == [("10", 3), ("11", None), ("12", None), ("13", 0)]
    assert [one for _, one in source.stream("x.parquet", refs)] == data
    assert [ref.label for ref in open_source(location, image_column="photo").scan("x.parquet")[1]] == [None] * 4


def test_text_ids_are_found_by_their_name(tmp_path: Path) -> None:
    columns = {"image": pa.array(images(2)), "image_id": pa.array(["b", "a"])}
    refs = open_source(write_parquet(tmp_path / "x.parquet", columns)).scan("x.parquet")[1]
    assert [ref.image_id for ref in refs] == ["b", "a"]


def test_a_null_image_is_a_bad_image(tmp_path: Path) -> None:
    for column in (
        pa.array([None, JPEG]),
        pa.array([None, {"bytes": JPEG}]),
        pa.array([{"bytes": None}, {"bytes": JPEG}]),
    ):
        source = open_source(write_parquet(tmp_path / "x.parquet", {"image": column}))
        assert [data for _, data in source.stream("x.parquet", source.scan("x.parquet")[1])] == [b"", JPEG]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"text": pa.array(["a"])},
            {},
            "image_column names a column of bytes, or of structs with bytes; got None; there",
        ),
        ({"a": pa.array([b""]), "b": pa.array([b""])}, {}, "there are a, b"),
        ({"a": pa.array([b""])}, {"image_column": "image"}, "got 'image'; there are a"),
        ({"a": pa.array([b""])}, {"label_column": "label"}, "label_column names a column of integers; got 'label'"),
        ({"a": pa.array([b""]), "x": pa.array([0.5])}, {"id_column": "x"}, "id_column names a column of text or"),
        ({"a": pa.array([b""]), "x": pa.array([None], pa.string())}, {"id_column": "x"}, "null in row 0"),
        ({"a": pa.array([b"", b""]), "id": pa.array(["k", "k"])}, {}, "got 'k' twice"),
        ({"a": pa.array([b""]), "label": pa.array([1 << 40])}, {}, "labels are class indices from 0"),
        ({"a": pa.array([], pa.binary())}, {}, "an image shard holds at least one image; got none"),
    ],
)
def test_unfit_columns_are_named(tmp_path: Path, columns: dict, options: dict, message: str) -> None:
    source = open_source(write_parquet(tmp_path / "x.parquet", columns), **options)
    with pytest.raises(SourceError) as caught:
        source.scan("x.parquet")
    assert message in str(caught.value)
    assert "x.parquet" in str(caught.value)


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for data in (b"", b"text" * 100, parquet_bytes(tmp_path)[:-20]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"image shards that end in .parquet are whole parquet files"):
            open_source(str(path)).scan("x.parquet")


def parquet_bytes(directory: Path) -> bytes:
    return Path(write_parquet(directory / "whole.parquet", {"image": pa.array(images(3))})).read_bytes()


def test_a_long_row_group_is_read_in_any_order(tmp_path: Path) -> None:
    data = images(50)
    location = write_parquet(tmp_path / "x.parquet", {"image": pa.array(data)}, rows=40)
    source = open_source(location)
    refs = source.scan("x.parquet")[1]
    order = [45, 2, 39, 3, 3, 20, 49, 0]
    found = [one for _, one in source.stream("x.parquet", [refs[row] for row in order])]
    assert found == [data[row] for row in order]
