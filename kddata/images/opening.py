"""From a location to the source that it names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from kddata.errors import SourceError
from kddata.images import files
from kddata.images.folder import FolderSource
from kddata.images.parquet import ParquetSource
from kddata.images.source import ImageSource
from kddata.images.tar import TarSource


def open_source(
    location: str | Sequence[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
) -> ImageSource:
    """The images at a location: tar files, parquet files, or a folder of image files.

    A location is a local path or an fsspec URL, or a list of them, with brace ranges such as {00000..00003}: files
    that end in .tar or .parquet, a directory of such files, or, alone, a folder of images. Nothing is scanned; a
    directory is listed once to see what it holds. Shards are named by their paths below the deepest directory that
    holds all of them, so that their names stay when they move together.

    Args:
        image_column, label_column, id_column: of parquet files; see `ParquetSource`.

    Raises SourceError for a missing or empty place, a scheme that is not allowed, a mix of kinds, or a file twice.
    """
    given = (location,) if isinstance(location, str) else tuple(location)
    stored = tuple(files.normalise(one) for one in given)
    stored_as = stored[0] if isinstance(location, str) else stored
    found = [pair for one in stored for url in files.expand(one) for pair in _files(url)]
    kinds = {kind for kind, _ in found}
    urls = [url for _, url in found]
    if len(kinds) != 1 or (kinds == {"folder"} and len(urls) > 1):
        raise SourceError(
            "images are tar files, or parquet files, or one folder",
            actual=", ".join(f"{sum(kind == one for kind, _ in found)} {one}" for one in sorted(kinds)) or "nothing",
            where=stored_as,
            fix="name one kind; `kddata pack` turns any of them into tar files",
        )
    if kinds == {"folder"}:
        return FolderSource(location=stored_as, root=urls[0])
    paths = dict(zip(_names(urls), urls, strict=True))
    if len(paths) < len(urls):
        twice = next(url for i, url in enumerate(urls) if url in urls[:i])
        raise SourceError("an image shard is named once", actual=f"{twice} twice", fix="leave one of them out")
    if kinds == {"parquet"}:
        return ParquetSource(
            location=stored_as,
            paths=paths,
            image_column=image_column,
            label_column=label_column,
            id_column=id_column,
        )
    return TarSource(location=stored_as, paths=paths)


def _files(url: str) -> list[tuple[str, str]]:
    """(kind, URL) of each shard that one expanded location stands for."""
    for kind in ("tar", "parquet"):
        if url.endswith(f".{kind}"):
            return [(kind, url)]
    names = files.list_directory(url)
    if names is None:
        if files.exists(url):
            raise SourceError(
                "image files are .tar or .parquet files, or lie in a folder",
                actual="a file of another kind",
                where=url,
                fix="unpack a compressed tar; put single images in a folder",
            )
        raise files.missing_file(url)
    shards = [(kind, f"{url}/{name}") for kind in ("tar", "parquet") for name in names if name.endswith(f".{kind}")]
    return shards or [("folder", url)]


def _names(urls: Sequence[str]) -> list[str]:
    """Each URL below the deepest directory that holds all of them."""
    parts = [url.split("/") for url in urls]
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*[part[:-1] for part in parts], strict=False))))
    return ["/".join(part[shared:]) for part in parts]
