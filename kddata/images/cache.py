"""A bounded cache of encoded images on a local disk, before a source that is far away.

Every entry is a copy: the source keeps its own. An entry holds the SHA-256 of its bytes and is checked at each read; a
damaged one is removed and read from the source again. Only files that this cache has made are ever removed, by name, in
a folder that it has marked. Several processes may share a folder; each looks over it after writing 1/64 of the limit,
so that they pass the limit by so much each at most.

Trade-off: a file an image, so that one entry can be checked, written and dropped alone; and what is read again is
hashed twice, here and by the reader, at about 1 us per KiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kddata.errors import ConfigError
from kddata.images.source import ImageRef, ImageShard, ImageSource, SourceKind

_MARK = "kddata-image-cache"
_ENTRY = re.compile(r"^[0-9a-f]{64}$")
_ASIDE = re.compile(r"^\.[0-9a-f]{64}-[0-9a-f]{8}$")
_ABANDONED_S = 3600  # the writer of a file that was never put in its place is dead by then
_DIGEST_BYTES = hashlib.sha256().digest_size
_KEPT_SHARE = 0.9  # of the limit, after entries were dropped
_log = logging.getLogger(__name__)


class ImageCache:
    """Encoded images by key, at most so many bytes of them; the ones that were used longest ago are dropped first.

    Raises ConfigError for a folder that holds anything else, or a limit that is no positive number.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError("a cache has room for a byte at least", actual=max_bytes, where="cache.max_bytes")
        self._root, self._max_bytes = Path(folder).expanduser().absolute(), max_bytes
        self._unseen_bytes = max_bytes  # written since the folder was looked over: at first it never was
        self._works = True
        with contextlib.suppress(FileExistsError):
            self._root.mkdir(parents=True)
        mark = self._root / _MARK
        if not mark.exists():
            others = any(path.name != _MARK for path in self._root.iterdir())
            # Looked for once more: between the two looks another process may have begun this cache and filled it.
            if others and not mark.exists():
                raise ConfigError(
                    "a cache has a folder of its own",
                    actual="other files",
                    where=self._root,
                    fix="name an empty or new folder under cache.folder",
                )
            mark.touch()

    def get(self, key: str) -> bytes | None:
        """The bytes of an entry, or None where it is not there or damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        content = data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != data[:_DIGEST_BYTES]:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def put(self, key: str, data: bytes) -> None:
        """Keeps a copy, where there is room for it. A disk that fails is told of once, and then left alone."""
        size = len(data) + _DIGEST_BYTES
        if not self._works or size > self._max_bytes * (1 - _KEPT_SHARE):
            return
        path = self._path(key)
        aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(exist_ok=True)
            aside.write_bytes(hashlib.sha256(data).digest() + data)
            aside.replace(path)
            self._unseen_bytes += size
            if self._unseen_bytes > self._max_bytes // 64:
                self._make_room()
        except OSError as error:
            self._works = False
            _log.warning("the image cache in %s is not written any more: %s", self._root, error)
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Drops what was used longest ago, where all together are over the limit."""
        entries = []
        for path in self._root.glob("??/*"):
            with contextlib.suppress(OSError):  # another process has dropped it
                stat = path.stat()
                if _ENTRY.match(path.name):
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
                elif _ASIDE.match(path.name) and time.time() - stat.st_mtime > _ABANDONED_S:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        if total > self._max_bytes:
            for _, size, path in sorted(entries):
                path.unlink(missing_ok=True)
                total -= size
                if total <= self._max_bytes * _KEPT_SHARE:
                    break
        self._unseen_bytes = 0

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._root / name[:2] / name


class CachedSource:
    """A source whose images are read from a cache where they are in it, and put there where they are not."""

    def __init__(self, source: ImageSource, cache: ImageCache) -> None:
        self._source, self._cache = source, cache

    @property
    def kind(self) -> SourceKind:
        return self._source.kind

    @property
    def location(self) -> str | tuple[str, ...]:
        return self._source.location

    def shard_names(self) -> list[str]:
        return self._source.shard_names()

    def scan(self, shard_name: str) -> tuple[ImageShard, list[ImageRef]]:
        return self._source.scan(shard_name)

    def stream(self, shard_name: str, refs: Sequence[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        """As of the source; what is missing is read from it in one go, and held until it has been given."""
        found = [self._cache.get(self._key(shard_name, ref)) for ref in refs]
        missing = [ref for ref, data in zip(refs, found, strict=True) if data is None]
        read = self._source.stream(shard_name, missing)
        for ref, data in zip(refs, found, strict=True):
            if data is None:
                _, data = next(read)
                self._cache.put(self._key(shard_name, ref), data)
            yield ref, data

    def fetch(self, shard_name: str, ref: ImageRef) -> bytes:
        ((_, data),) = self.stream(shard_name, [ref])
        return data

    def _key(self, shard_name: str, ref: ImageRef) -> str:
        return "\0".join([repr(self.location), shard_name, ref.image_id, str(ref.offset), str(ref.length)])
