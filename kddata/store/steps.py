"""Steps: the single calls by which a storage touches the outside, and the place where faults are put around them.

A step is a method of `Disk` or of an fsspec file system. Storages reach them through `stepping` alone, so that the
chaos layer in kddata.testing can count every one, and fail, tear or kill at any. Trade-off: one global seam, since a
fault is of the machine and not of one storage; nothing but tests sets it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

REMOVED_AT_ONCE = 4096  # files of a folder that is removed: names are listed again, and never all held
_T = TypeVar("_T")
_around: Callable[[Any], Any] | None = None


def stepping(target: _T) -> _T:
    """The object whose methods are steps: as it is, or with faults around them."""
    return target if _around is None else _around(target)


@contextmanager
def faults(around: Callable[[Any], Any]) -> Iterator[None]:
    """A block in which every step of this process goes through `around(target)` instead of `target`."""
    global _around
    before, _around = _around, around
    try:
        yield
    finally:
        _around = before


class Disk:
    """The steps of a local disk."""

    def listing(self, folder: Path) -> Iterator[tuple[str, int]]:
        """(path below the folder, bytes) of every file below it, one after the other; none is held."""
        folders = [""]
        while folders:
            below = folders.pop()
            try:
                with os.scandir(folder / below) as entries:
                    for entry in entries:
                        name = f"{below}{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(f"{name}/")
                            continue
                        try:
                            yield name, entry.stat(follow_symlinks=False).st_size
                        except FileNotFoundError:  # a temporary file of another writer, published meanwhile
                            continue
            except (FileNotFoundError, NotADirectoryError):  # no such folder, or removed meanwhile
                continue

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def remove_folder(self, folder: Path) -> None:
        folder.rmdir()

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def open(self, path: Path, mode: str) -> IO[bytes]:
        return open(path, mode)

    def read(self, file: IO[bytes], num_bytes: int = -1) -> bytes:
        return file.read(num_bytes)

    def write(self, file: IO[bytes], data: bytes | memoryview) -> None:
        file.write(data)

    def flush(self, file: IO[bytes]) -> None:
        file.flush()

    def sync(self, file: IO[bytes]) -> None:
        os.fsync(file.fileno())

    def close(self, file: IO[bytes]) -> None:
        file.close()

    def link(self, path: Path, name: Path) -> None:
        os.link(path, name)

    def replace(self, path: Path, name: Path) -> None:
        path.replace(name)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class HashingWriter(io.RawIOBase):
    """A stream that counts and hashes what passes, so that no second read is needed.

    Args:
        write: takes what passes.

    Attributes:
        num_bytes: written so far.
        sha256: hex, of what was written so far.
    """

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._write, self._hash, self.num_bytes = write, hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        self._write(view)
        self._hash.update(view)
        self.num_bytes += len(view)
        return len(view)
