"""Parquet exports, read by the libraries that they are for."""

import dataclasses
import json
import uuid

import numpy as np
import pytest
from pyarrow import parquet

from kddata import errors
from kddata.care import export, export_parquet
from kddata.store import LabelRows, open_storage
from kddata.testing import make_store, small_spec, small_store
from kddata.views import ViewPlan


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(str(tmp_path_factory.mktemp("export") / "labels"))


@pytest.fixture(scope="module")
def rows(store):
    return LabelRows.concat([store.read(unit.number) for unit in store.units()])


@pytest.fixture(scope="module")
def path(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "labels.parquet"
    exported = export_parquet(store, str(path))
    assert (exported.rows, exported.row_groups) == (store.num_rows, 1)
    assert exported.num_bytes == path.stat().st_size
    return path


def test_duckdb_reads_an_export(path, rows):
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(
        f"select image_id, view, label, ids, log_p, log_tail[2], height, image_hash, pixel_hash from '{path}'"
    ).fetchall()
    assert [row[:2] for row in found] == list(zip(rows.image_id, rows.view.tolist(), strict=True))
    assert [row[2] for row in found] == [None if label < 0 else label for label in rows.label.tolist()]
    assert [row[3] for row in found] == rows.labels.ids_BK.tolist()
    np.testing.assert_array_equal(np.float32([row[4] for row in found]), rows.labels.log_p_BK.numpy())
    np.testing.assert_array_equal(np.float32([row[5] for row in found]), rows.labels.log_tail_BT[:, 1].numpy())
    assert [row[6] for row in found] == rows.box[:, 2].tolist()
    assert [row[7] for row in found] == rows.image_hash.tolist()
    assert [row[8] is not None for row in found] == rows.has_pixel_hash.tolist()
    [(agree,)] = duckdb.sql(f"select count(*) from '{path}' where ids[1] = label").fetchall()
    assert agree == int((rows.labels.ids_BK[:, 0].numpy() == rows.label).sum())


def test_polars_reads_an_export(path, rows):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(path)
    assert frame["image_id"].to_list() == rows.image_id
    assert frame["flip"].to_list() == rows.flip.tolist()
    assert frame["image_shard"].unique().sort().to_list() == ["00000.tar", "00002.tar"]
    np.testing.assert_array_equal(frame["log_p"].explode().to_numpy(), rows.labels.log_p_BK.numpy().reshape(-1))


def test_hugging_face_datasets_reads_an_export(path, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path))
    assert len(found) == len(rows)
    assert found["image_id"][:] == rows.image_id
    assert found[3]["ids"] == rows.labels.ids_BK[3].tolist()
    assert found[3]["image_hash"] == int(rows.image_hash[3])


def test_an_export_says_what_it_is_of_and_its_columns(path, store):
    schema = parquet.read_schema(path)
    assert schema.names == [
        "image_id",
        "view",
        "label",
        "ids",
        "log_p",
        "log_tail",
        "top",
        "left",
        "height",
        "width",
        "flip",
        "resize_height",
        "resize_width",
        "image_shard",
        "offset",
        "length",
        "image_hash",
        "pixel_hash",
    ]
    assert all(name in export.__doc__ for name in schema.names)
    assert json.loads(schema.metadata[b"kddata"]) == {
        "fingerprint": store.spec.fingerprint,
        "k": 3,
        "num_classes": 10,
        "teacher": "made up",
        "temperatures": [1.0, 4.0],
    }


@pytest.mark.parametrize("format", ["arrow", "tar"])
@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_stores_of_every_form_are_exported_with_their_recipes(format, codec, tmp_path):
    duckdb, plan = pytest.importorskip("duckdb"), ViewPlan(policy="color", mix="cutmix")
    spec = dataclasses.replace(small_spec(), format=format, codec=codec, plan=plan)
    store = small_store(f"memory://export/{uuid.uuid4().hex}", spec=spec)
    export_parquet(store, f"{tmp_path}/a.parquet")
    found = duckdb.sql(f"select ops.names[1], mix.partner, mix.lam from '{tmp_path}/a.parquet'").fetchall()
    views = [rows.view_at(i) for unit in store.units() for rows in [store.read(unit.number)] for i in range(len(rows))]
    assert [row[0] for row in found] == [view.ops[0][0] for view in views]
    assert [row[1] for row in found] == [None if view.mix is None else view.mix.partner for view in views]
    assert {row[2] for row in found} == {None if view.mix is None else view.mix.lam for view in views}


def test_resized_views_say_how(tmp_path):
    store = make_store(tmp_path, views_per_image=1, plan=ViewPlan(policy="center", center_px=16), num_images=3)
    export_parquet(store, f"{tmp_path}/a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    rows = LabelRows.concat([store.read(unit.number) for unit in store.units()])
    assert table["resize_height"].to_pylist() == rows.resize[:, 0].tolist()


def test_row_groups_are_bounded_and_bytes_depend_on_rows_alone(store, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_GROUP_ROWS", 8)
    seen = []
    exported = export_parquet(
        store, "memory://export/groups/a.parquet", on_rows=lambda done, total: seen.append((done, total))
    )
    assert seen == [(8, 27), (16, 27), (24, 27), (27, 27)]
    assert exported.row_groups == 4
    export_parquet(store, f"{tmp_path}/a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    assert data == open_storage("memory://export/groups").read("a.parquet")
    file = parquet.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8, 8, 8, 3]


def test_an_export_appears_whole_or_not_at_all(tmp_path):
    store = small_store(str(tmp_path / "labels"))
    with store.storage.replacing("labels/000003.arrow") as out:
        out.write(b"damaged")
    with pytest.raises(errors.StoreDamagedError, match=r"000003\.arrow"):
        export_parquet(store, str(tmp_path / "a.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]


@pytest.mark.parametrize("name", ["labels", "manifest-000001.json", ".parquet", "x.parquet/"])
def test_a_file_of_another_name_is_not_written(store, name):
    with pytest.raises(errors.ConfigError, match=r"ends in \.parquet; got"):
        export_parquet(store, f"{store.url}/{name}")
    assert store.verify() == []
