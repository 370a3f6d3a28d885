"""Folder sources: classes, links, and names that lead nowhere good."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kddata.errors import BadImageError, SourceError
from kddata.images import ImageRef, decode, open_source
from kddata.testing import encode, small_image

JPEG = encode(small_image(0, height_px=24, width_px=30))


def folder(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


def test_class_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    folder(tmp_path, ["b/1.jpg", "a/deep/er/0.PNG", "c/2.webp", "a/.hidden.jpg", ".git/x.jpg", "c/Thumbs.db", "r.jpg"])
    source = open_source(str(tmp_path))
    shard, refs = source.scan(".")
    assert [(ref.image_id, ref.label) for ref in refs] == [
        ("a/deep/er/0.PNG", 0),
        ("b/1.jpg", 1),
        ("c/2.webp", 2),
        ("r.jpg", None),
    ]
    assert shard.size_bytes == 4 * len(JPEG)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    folder(tmp_path, ["a/1.jpg", "c/1.jpg"])
    (tmp_path / "b").mkdir()
    with pytest.raises(SourceError, match=r"every folder at the root is a class and holds .* got none in 'b'"):
        open_source(str(tmp_path)).scan(".")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(SourceError, match="an image shard holds at least one image; got none"):
        open_source(str(tmp_path)).scan(".")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere", ["1.jpg"])
    folder(tmp_path / "images", ["a/0.jpg"])
    (tmp_path / "images" / "b").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(tmp_path / "images"))
    refs = source.scan(".")[1]
    assert [(ref.image_id, ref.label) for ref in refs] == [("a/0.jpg", 0), ("b/1.jpg", 1)]
    assert source.fetch(".", refs[1]) == JPEG
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "images")
    with pytest.raises(SourceError, match="folders do not hold themselves"):
        source.scan(".")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fine.jpg").write_bytes(JPEG)
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(JPEG)
    with pytest.raises(SourceError, match="image names are UTF-8 text"):
        open_source(str(tmp_path)).scan(".")


def test_no_reference_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder(tmp_path, ["secret.jpg", "images/a.jpg"])
    source = open_source(str(tmp_path / "images"))
    for image_id in ("../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg"):
        with pytest.raises(SourceError, match="stay inside their source"):
            source.fetch(".", ImageRef(image_id=image_id, label=None, offset=0, length=len(JPEG)))


def test_unreadable_files_stay_in_the_scan(tmp_path: Path) -> None:
    folder(tmp_path, ["good.jpg"])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("a text with an image's name")
    source = open_source(str(tmp_path))
    refs = source.scan(".")[1]
    assert len(refs) == 3
    reasons = {}
    for ref, data in source.stream(".", refs):
        try:
            decode(data, max_pixels=10_000)
        except BadImageError as error:
            reasons[ref.image_id] = str(error)
    assert "zero bytes" in reasons["empty.jpg"]
    assert "no known image format" in reasons["text.jpg"]
    assert set(reasons) == {"empty.jpg", "text.jpg"}
