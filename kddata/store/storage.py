"""Storage: where a store's files lie. Every operation by which a store touches the outside goes through here.

A file appears under its name whole or not at all, and is synced before it does. `create` is put-if-absent: of several
writers one wins, which is what a store's promises rest on. No object store rename is relied on.

Deliberately not here: what the files mean, and other schemes than the three whose put-if-absent is known. Every single
call to the outside is a step (`kddata.store.steps`). Trade-off: small files pass as bytes; only label shards stream.
"""

from __future__ import annotations

import hashlib
import io
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from kddata.errors import ConfigError, StoreDamagedError, StoreError
from kddata.store.disk import LocalStorage
from kddata.store.s3 import S3Storage
from kddata.store.steps import HashingWriter, stepping

__all__ = [
    "TEMPORARY",
    "HashingWriter",
    "Storage",
    "open_storage",
    "read_checked",
    "read_or_none",
    "require_create_once",
]

TEMPORARY = re.compile(r"(^|/)\.tmp-[0-9a-f]+$")
_MEMORY_LOCK = threading.Lock()


class Storage(Protocol):
    """A folder of files with relative names, `/` between their parts. Safe to pickle and to share between threads."""

    url: str

    def listing(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file below a folder, in any order, as they are found: none is held, where it can be.

        Nothing where there is no such folder. Files that come or go meanwhile may be left out.
        """
        ...

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The same by name, in order of names."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file, a piece at a time. Raises FileNotFoundError."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Publishes a file unless one of that name is there: True for the one writer that did."""
        ...

    @contextmanager
    def replacing(self, name: str) -> Iterator[HashingWriter]:
        """A stream that becomes the file of that name when the block ends well, and leaves nothing when it raises."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file; it may be gone already."""
        ...

    def remove_folder(self, folder: str) -> None:
        """Removes a folder and every file in it; it may be gone already."""
        ...


def open_storage(url: str) -> Storage:
    """The storage at a path, file://, memory:// or s3:// URL. Nothing is read or made.

    Raises ConfigError for any other scheme, and for URLs that chain file systems.
    """
    scheme, separator, rest = url.partition("://")
    if not url or "::" in url or url.startswith("pipe:"):
        raise ConfigError("a store lies at one path or URL", actual=repr(url))
    if not separator:
        return LocalStorage(url)
    if scheme == "file":
        return LocalStorage(rest)
    if scheme == "memory":
        return MemoryStorage(rest)
    if scheme == "s3":
        return S3Storage(rest)
    raise ConfigError("a store lies on local disk, memory:// or s3://", actual=repr(url))


def require_create_once(storage: Storage) -> None:
    """Raises StoreError where a second writer of a name would win too: some S3 servers ignore conditions."""
    name = f".tmp-{secrets.token_hex(8)}"
    once = storage.create(name, b"1")
    try:
        once = once and not storage.create(name, b"2")
    finally:
        storage.remove(name)
    if not once:
        raise StoreError(
            "a store lies where a file can be created once (put-if-absent)",
            actual="a server that ignores If-None-Match and overwrites",
            where=storage.url,
            fix="upgrade the server, or label on a disk and copy the finished store",
        )


def read_or_none(storage: Storage, name: str) -> bytes | None:
    """The whole file; None where there is none."""
    try:
        return storage.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_checked(storage: Storage, name: str, sha256: str | None) -> bytes:
    """A file with this hash. The bytes that are hashed are the bytes that are used."""
    where = f"{storage.url}/{name}"
    data = read_or_none(storage, name)
    if data is None:
        raise StoreDamagedError("every file of a store is there", actual="no such file", where=where)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise StoreDamagedError(
            "a file of a store has the bytes that were written",
            actual="another SHA-256",
            where=where,
            fix="`kddata verify` lists all damage; restore the file from a copy, or label again",
        )
    return data


class MemoryStorage:
    """Files in this process, for tests and small work (fsspec's memory file system, which other code can read)."""

    def __init__(self, path: str) -> None:
        self._root = "/" + path.strip("/")
        self.url = f"memory:/{self._root}"

    @property
    def _fs(self):  # type: ignore[no-untyped-def]
        import fsspec

        return stepping(fsspec.filesystem("memory"))

    def listing(self, folder: str = "") -> Iterator[tuple[str, int]]:
        return iter(self.sizes(folder).items())

    def sizes(self, folder: str = "") -> dict[str, int]:
        with _MEMORY_LOCK:
            found = self._fs.find(f"{self._root}/{folder}".rstrip("/"), detail=True)
        sizes = {path[len(self._root) + 1 :]: int(info["size"]) for path, info in found.items() if path != self._root}
        return dict(sorted(sizes.items()))

    def read(self, name: str) -> bytes:
        with _MEMORY_LOCK:
            return self._fs.cat_file(f"{self._root}/{name}")

    def chunks(self, name: str) -> Iterator[bytes]:
        yield self.read(name)

    def create(self, name: str, data: bytes) -> bool:
        path = f"{self._root}/{name}"
        with _MEMORY_LOCK:  # fsspec's own mode="create" looks and writes in two steps
            if self._fs.exists(path):
                return False
            self._fs.pipe_file(path, data)
            return True

    @contextmanager
    def replacing(self, name: str) -> Iterator[HashingWriter]:
        file = io.BytesIO()
        yield HashingWriter(file.write)
        with _MEMORY_LOCK:
            self._fs.pipe_file(f"{self._root}/{name}", file.getvalue())

    def remove(self, name: str) -> None:
        with _MEMORY_LOCK:
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm_file(f"{self._root}/{name}")

    def remove_folder(self, folder: str) -> None:
        for name in self.sizes(folder):  # fsspec's recursive rm reads [ and * in a path as patterns
            self.remove(name)
