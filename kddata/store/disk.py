"""A store on a local disk, or on a network disk that is mounted.

A file is written beside its place under a temporary name, synced, and then linked (put-if-absent) or renamed.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from kddata.errors import StoreError
from kddata.store.steps import REMOVED_AT_ONCE, Disk, HashingWriter, stepping

_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = Disk()


class LocalStorage:
    """A folder on disk. Put-if-absent is a hard link from a synced temporary file in the same folder."""

    def __init__(self, path: str) -> None:
        self._root = Path(path).expanduser().absolute()
        self.url = str(self._root)

    @property
    def _disk(self) -> Disk:
        return stepping(_DISK)

    def listing(self, folder: str = "") -> Iterator[tuple[str, int]]:
        below = f"{folder}/" if folder else ""
        return ((below + name, size) for name, size in self._disk.listing(self._root / folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        return dict(sorted(self.listing(folder)))

    def read(self, name: str) -> bytes:
        disk = self._disk
        with disk.open(self._root / name, "rb") as file:
            return disk.read(file)

    def chunks(self, name: str) -> Iterator[bytes]:
        disk = self._disk
        with disk.open(self._root / name, "rb") as file:
            while data := disk.read(file, _CHUNK_BYTES):
                yield data

    def create(self, name: str, data: bytes) -> bool:
        path, disk = self._root / name, self._disk
        with self._temporary(path) as (temporary, file):
            disk.write(file, data)
            self._finish(file)
            try:
                disk.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
                raise StoreError(
                    "a store lies on a disk that makes hard links, which publish a file once",
                    actual=error.strerror,
                    where=path,
                    fix="put the store on another disk, or on s3://",
                ) from error
            disk.remove(temporary)
            disk.sync_folder(path.parent)
        return True

    @contextmanager
    def replacing(self, name: str) -> Iterator[HashingWriter]:
        path, disk = self._root / name, self._disk
        with self._temporary(path) as (temporary, file):
            yield HashingWriter(lambda data: disk.write(file, data))
            self._finish(file)
            disk.replace(temporary, path)
            disk.sync_folder(path.parent)

    def remove(self, name: str) -> None:
        self._disk.remove(self._root / name)

    def remove_folder(self, folder: str) -> None:
        while names := [name for name, _ in islice(self.listing(folder), REMOVED_AT_ONCE)]:
            for name in names:
                self.remove(name)
        if (self._root / folder).is_dir():
            try:
                self._disk.remove_folder(self._root / folder)
            except FileNotFoundError:  # another has removed it
                return
            self._disk.sync_folder((self._root / folder).parent)

    @contextmanager
    def _temporary(self, path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
        """A new file beside `path`, removed at the end unless it was published. Raises StoreError for a full disk."""
        temporary, disk = path.parent / f".tmp-{secrets.token_hex(8)}", self._disk
        try:
            self._make_folder(path.parent)
            try:
                with disk.open(temporary, "xb") as file:
                    yield temporary, file
            finally:
                disk.remove(temporary)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise StoreError(
                "a store's disk has room",
                actual=error.strerror,
                where=path,
                fix="free some space and run the same command again; finished units are kept",
            ) from error

    def _finish(self, file: IO[bytes]) -> None:
        disk = self._disk
        disk.flush(file)
        disk.sync(file)
        disk.close(file)

    def _make_folder(self, folder: Path) -> None:
        """Makes a folder and those above it, each synced into its parent: power loss takes no published file."""
        if not folder.is_dir():
            self._make_folder(folder.parent)
            try:
                self._disk.make_folder(folder)
            except FileExistsError as error:
                raise StoreError(
                    "a store is a folder", actual="a file", where=folder, fix="name another place"
                ) from error
            self._disk.sync_folder(folder.parent)
