"""Images as files in a folder, labelled by the names of their class folders.

The convention is torchvision's ImageFolder: sub-folders of the root in sorted order are classes 0, 1, ..., with images
at any depth. Images that lie at the root itself have no label. Names that start with a dot are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kddata.errors import SourceError
from kddata.images import files
from kddata.images.source import MAX_IMAGE_BYTES, ImageRef, ImageShard, check_image_id, check_unique, is_image_suffix

_AHEAD = 16  # remote files under way at once


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A folder as one image shard, named ".". See `open_source`. An image id is a path below the root.

    Attributes:
        location: as given, a local path made absolute.
        root: the one folder that it stands for.
    """

    location: str | tuple[str, ...]
    root: str
    kind: Literal["folder"] = "folder"

    def shard_names(self) -> list[str]:
        """["."]. Raises SourceError where the folder is missing."""
        if files.list_directory(self.root) is None:
            raise files.missing_file(self.root)
        return ["."]

    def scan(self, shard_name: str) -> tuple[ImageShard, list[ImageRef]]:
        """Every image file, sorted by id.

        Raises SourceError for a class folder without images (it would shift or hide a class), or none at all.
        """
        files.path_of(dict.fromkeys(self.shard_names(), self.root), shard_name, self.location)
        found = _walk_local(self.root) if files.is_local(self.root) else _walk_remote(self.root)
        found = {name: size for name, size in found.items() if is_image_suffix(name.rpartition(".")[2])}
        classes = _classes(self.root, found)
        refs = []
        for name, size in sorted(found.items()):
            check_image_id(name, self.root)
            top, slash, _ = name.partition("/")
            length = size if size <= MAX_IMAGE_BYTES else 0
            refs.append(ImageRef(image_id=name, label=classes[top] if slash else None, offset=0, length=length))
        check_unique(refs, self.root)
        return ImageShard(name=".", size_bytes=sum(found.values()), num_images=len(refs)), refs

    def stream(self, shard_name: str, refs: Sequence[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        """The images of these references, remote ones several at once."""
        ahead = 0 if files.is_local(self.root) else _AHEAD
        yield from zip(refs, files.in_order(lambda ref: self.fetch(shard_name, ref), refs, ahead=ahead), strict=True)

    def fetch(self, shard_name: str, ref: ImageRef) -> bytes:
        """One image, a whole file."""
        root = files.path_of({".": self.root}, shard_name, self.location)
        # A store made elsewhere names the file: it must not lead out of the folder.
        return files.read_range(f"{root}/{check_image_id(ref.image_id, root)}", 0, ref.length)


def _classes(root: str, found: dict[str, int]) -> dict[str, int]:
    """Index of each class folder."""
    names = sorted({name.partition("/")[0] for name in found if "/" in name})
    if files.is_local(root):
        for entry in Path(root).iterdir():
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in names and names:
                raise SourceError(
                    "every folder at the root is a class and holds at least one image",
                    actual=f"none in {entry.name!r}",
                    where=root,
                    fix="move it out of the images, or fill it",
                )
    return {name: index for index, name in enumerate(names)}


def _walk_local(root: str) -> dict[str, int]:
    """Path below the root to size of every file, links followed."""
    found: dict[str, int] = {}
    above: dict[str, tuple[tuple[int, int], ...]] = {}
    for directory, folders, names in os.walk(root, followlinks=True):
        status = Path(directory).stat()
        inode, parents = (status.st_dev, status.st_ino), above.get(str(Path(directory).parent), ())
        if inode in parents:
            raise SourceError(
                "folders do not hold themselves", actual="a link to a folder above it", where=directory, fix="remove it"
            )
        above[directory] = (*parents, inode)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(directory) / name
            if not name.startswith(".") and path.is_file():
                found[path.relative_to(root).as_posix()] = path.stat().st_size
    return found


def _walk_remote(root: str) -> dict[str, int]:
    """Path below the root to size of every object."""
    system, path = files.file_system(root)
    system.invalidate_cache()
    start = len(path.strip("/")) + 1
    listed = ((name.strip("/")[start:], info["size"]) for name, info in system.find(path, detail=True).items())
    return {name: size for name, size in listed if not any(part.startswith(".") for part in name.split("/"))}
