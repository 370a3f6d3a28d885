"""Locations: what they stand for, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from kddata.errors import SourceError
from kddata.images import files as image_files
from kddata.images import open_source
from kddata.testing import encode, make_images, small_image

JPEG = encode(small_image(0, height_px=24, width_px=30))


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a/{08..11}.tar", ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]),
        ("{9..10}.tar", ["9.tar", "10.tar"]),
        ("{0..10}.tar", [f"{i}.tar" for i in range(11)]),
        ("{0..1}/{a,b}.tar", ["0/a.tar", "0/b.tar", "1/a.tar", "1/b.tar"]),
        ("s3://b/x.tar", ["s3://b/x.tar"]),
        ("{00000..00000}.tar", ["00000.tar"]),
        ("odd{name.tar", ["odd{name.tar"]),
    ],
)
def test_braces_stand_for_names_in_order(location: str, expected: list[str]) -> None:
    assert image_files.expand(location) == expected


@pytest.mark.parametrize("location", ["{3..1}.tar", "{0..99999999}.tar", "{0..9999}{0..9999}.tar"])
def test_brace_ranges_are_bounded(location: str) -> None:
    with pytest.raises(SourceError, match="a brace range rises and names at most 10000000 files"):
        image_files.expand(location)


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat /etc/passwd",
        "PIPE:id",
        "pipe:curl http://host/x.tar",
        "simplecache::s3://bucket/x.tar",
        "tar://a.jpg::file:///x.tar",
        "memory://a::s3://bucket/x.tar",
        "x.tar::memory://a",
        "zip://x.zip",
        "ssh://host/x.tar",
        "reference://x",
        "github://a:b@c/x.tar",
        "",
    ],
)
def test_commands_chains_and_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source([location])
    assert "commands and chained URLs are refused" in str(caught.value)
    assert repr(location) in str(caught.value)


@pytest.mark.parametrize("read", [image_files.list_directory, image_files.file_size, image_files.open_file])
def test_a_scheme_whose_package_is_missing_is_told_once(read: Callable[[str], object], monkeypatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(SourceError) as caught:
        read("s3://bucket/x.tar")
    assert str(caught.value) == (
        "the fsspec package for a URL's scheme is installed; got Please install s3fs to access S3 "
        "(in s3://bucket/x.tar). Next: pip install it."
    )


def test_local_locations_are_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    source = open_source("shards/../shards/{00000..00001}.tar")
    assert source.location == str(tmp_path / "shards" / "{00000..00001}.tar")
    assert open_source(f"file://{tmp_path}/shards").location == str(tmp_path / "shards")
    assert open_source(["shards/00001.tar", "shards/00000.tar"]).shard_names() == ["00001.tar", "00000.tar"]


def test_a_directory_of_shards_is_its_shards(tmp_path: Path) -> None:
    for form in ("tar", "parquet"):
        make_images(tmp_path / form, form=form)
        (tmp_path / form / "README.md").write_text("notes")
        source = open_source(str(tmp_path / form))
        assert source.kind == form
        assert source.shard_names() == [f"00000.{form}", f"00001.{form}"]


def test_shards_of_several_directories_keep_unique_names(tmp_path: Path) -> None:
    for part in ("a", "b"):
        make_images(tmp_path / part, shards=1)
    source = open_source([str(tmp_path / "a"), str(tmp_path / "b" / "00000.tar")])
    assert source.shard_names() == ["a/00000.tar", "b/00000.tar"]


def test_locations_that_mean_nothing_are_named(tmp_path: Path) -> None:
    make_images(tmp_path / "tar")
    make_images(tmp_path / "parquet", form="parquet")
    make_images(tmp_path / "folder", form="folder")
    (tmp_path / "images.tar.gz").write_bytes(b"x")
    cases = [
        ([], "got nothing"),
        ([str(tmp_path / "tar"), str(tmp_path / "parquet")], "got 2 parquet, 2 tar"),
        ([str(tmp_path / "folder"), str(tmp_path / "folder")], "got 2 folder"),
        ([str(tmp_path / "tar"), str(tmp_path / "tar" / "00000.tar")], "00000.tar twice"),
        (str(tmp_path / "images.tar.gz"), "a file of another kind"),
        (str(tmp_path / "none"), "nothing there"),
    ]
    for location, message in cases:
        with pytest.raises(SourceError) as caught:
            open_source(location)
        assert message in str(caught.value)
    with pytest.raises(SourceError) as caught:
        open_source(str(tmp_path / "tar" / "{00000..00007}.tar")).shard_names()
    assert "00002.tar" in str(caught.value)
    assert "and 3 more" in str(caught.value)
