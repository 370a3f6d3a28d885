"""Storage: where a store's files lie. Every operation by which a store touches the outside goes through here.

A file appears under its name whole or not at all, and is synced before it does. `create` is put-if-absent: of several
writers one wins, which is what a store's promises rest on. No object store rename is relied on.

Deliberately not here: what the files mean, retries, and other schemes than the three whose put-if-absent is known.
Trade-off: small files pass as bytes; only label shards stream.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from kddata.errors import ConfigError, StoreError

TEMPORARY = re.compile(r"(^|/)\.tmp-[0-9a-f]+$")
_CHUNK_BYTES = 1 << 20
_MEMORY_LOCK = threading.Lock()
_CONFLICT = ("PreconditionFailed", "412", "ConditionalRequestConflict")  # S3's answers to a key that is taken


class HashingWriter(io.RawIOBase):
    """A stream that counts and hashes what passes, so that no second read is needed.

    Attributes:
        num_bytes: written so far.
        sha256: hex, of what was written so far.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._hash, self.num_bytes = raw, hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._hash.update(view)
        self.num_bytes += len(view)
        return len(view)


class Storage(Protocol):
    """A folder of files with relative names, `/` between their parts. Safe to pickle and to share between threads."""

    url: str

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by name, in order of names. Empty where there is no such folder."""
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


class LocalStorage:
    """A folder on disk. Put-if-absent is a hard link from a synced temporary file in the same folder."""

    def __init__(self, path: str) -> None:
        self._root = Path(path).expanduser().absolute()
        self.url = str(self._root)

    def sizes(self, folder: str = "") -> dict[str, int]:
        root = self._root / folder
        found = {}
        for parent, _, names in os.walk(root):
            for name in names:
                path = Path(parent, name)
                try:
                    found[path.relative_to(self._root).as_posix()] = path.lstat().st_size
                except FileNotFoundError:  # a temporary file of another writer, published meanwhile
                    continue
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def chunks(self, name: str) -> Iterator[bytes]:
        with open(self._root / name, "rb") as file:
            while data := file.read(_CHUNK_BYTES):
                yield data

    def create(self, name: str, data: bytes) -> bool:
        path = self._root / name
        with self._temporary(path) as (temporary, file):
            file.write(data)
            _sync(file)
            try:
                os.link(temporary, path)
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
            temporary.unlink()
            _sync_folder(path.parent)
        return True

    @contextmanager
    def replacing(self, name: str) -> Iterator[HashingWriter]:
        path = self._root / name
        with self._temporary(path) as (temporary, file):
            yield HashingWriter(file)
            _sync(file)
            temporary.replace(path)
            _sync_folder(path.parent)

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        for name in self.sizes(folder):
            self.remove(name)
        if (self._root / folder).is_dir():
            (self._root / folder).rmdir()
            _sync_folder(self._root)

    @contextmanager
    def _temporary(self, path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
        """A new file beside `path`, removed at the end unless it was published."""
        _make_folder(path.parent)
        temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:
                yield temporary, file
        finally:
            temporary.unlink(missing_ok=True)


class MemoryStorage:
    """Files in this process, for tests and small work (fsspec's memory file system, which other code can read)."""

    def __init__(self, path: str) -> None:
        self._root = "/" + path.strip("/")
        self.url = f"memory:/{self._root}"

    @property
    def _fs(self):  # type: ignore[no-untyped-def]
        import fsspec

        return fsspec.filesystem("memory")

    def sizes(self, folder: str = "") -> dict[str, int]:
        with _MEMORY_LOCK:
            return _sizes(self._fs, self._root, folder)

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
        yield HashingWriter(file)
        with _MEMORY_LOCK:
            self._fs.pipe_file(f"{self._root}/{name}", file.getvalue())

    def remove(self, name: str) -> None:
        with _MEMORY_LOCK:
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm_file(f"{self._root}/{name}")

    def remove_folder(self, folder: str) -> None:
        for name in self.sizes(folder):  # fsspec's recursive rm reads [ and * in a path as patterns
            self.remove(name)


class S3Storage:
    """A prefix of an S3 bucket. Put-if-absent is a conditional request (If-None-Match); shards are spooled to disk.

    Endpoint and credentials are those of the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
    """

    def __init__(self, path: str) -> None:
        self._root = path.strip("/")
        self.url = f"s3://{self._root}"

    @property
    def _fs(self):  # type: ignore[no-untyped-def]
        import fsspec

        try:
            return fsspec.filesystem("s3", use_listings_cache=False)
        except ImportError as error:
            raise ConfigError("s3:// needs s3fs", actual=str(error), fix="pip install 'kddata[s3]'") from error

    def sizes(self, folder: str = "") -> dict[str, int]:
        return _sizes(self._fs, self._root, folder)

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self._root}/{name}")

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._fs.open(f"{self._root}/{name}", "rb", cache_type="readahead") as file:
            while data := file.read(_CHUNK_BYTES):
                yield data

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(f"{self._root}/{name}", data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            response = getattr(error.__cause__, "response", None) or {}
            if response.get("Error", {}).get("Code") in _CONFLICT:
                return False
            raise
        return True

    @contextmanager
    def replacing(self, name: str) -> Iterator[HashingWriter]:
        with tempfile.NamedTemporaryFile(prefix="kddata-") as file:
            yield HashingWriter(file)
            file.flush()
            self._fs.put_file(file.name, f"{self._root}/{name}")

    def remove(self, name: str) -> None:
        # Deleting a key that is not there is no error on S3.
        self._fs.rm_file(f"{self._root}/{name}")

    def remove_folder(self, folder: str) -> None:
        for name in self.sizes(folder):
            self.remove(name)


def _sizes(fs, root: str, folder: str) -> dict[str, int]:  # type: ignore[no-untyped-def]
    found = fs.find(f"{root}/{folder}".rstrip("/"), detail=True)
    return {path[len(root) + 1 :]: int(info["size"]) for path, info in sorted(found.items()) if path != root}


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each synced into its parent, so that power loss takes no published file."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise StoreError("a store is a folder", actual="a file", where=folder, fix="name another place") from error
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
