"""A store in an S3 bucket, over a network that fails now and then.

Every step is tried again after a failure that may pass (server errors, time-outs, cut-off answers), with growing
pauses and an end. Trade-off: all retries are here and none below, so that the time until a clear error is bounded.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from kddata.errors import ConfigError, StoreError
from kddata.store.steps import REMOVED_AT_ONCE, HashingWriter, stepping

TRIES = 6
PAUSE_S = 0.2  # after the first failure; doubled after each
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 20
_CHUNK_BYTES = 8 << 20
_PAGE_NAMES = 1000  # of a listing; the most that S3 gives
_TAKEN = ("PreconditionFailed", "412")  # S3's answers to a key that is taken
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class S3Storage:
    """A prefix of an S3 bucket. Put-if-absent is a conditional request (If-None-Match); shards are spooled to disk.

    Endpoint and credentials are those of the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
    """

    def __init__(self, path: str) -> None:
        self._root = path.strip("/")
        self.url = f"s3://{self._root}"

    @property
    def _fs(self) -> Any:
        import fsspec

        try:
            fs = fsspec.filesystem(
                "s3",
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": READ_TIMEOUT_S,
                    "retries": {"total_max_attempts": 1},
                },
            )
        except ImportError as error:
            raise ConfigError("s3:// needs s3fs", actual=str(error), fix="pip install 'kddata[s3]'") from error
        fs.retries = 1
        return stepping(fs)

    def listing(self, folder: str = "") -> Iterator[tuple[str, int]]:
        bucket, _, prefix = self._root.partition("/")
        above = f"{prefix}/" if prefix else ""
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            wanted = {"Bucket": bucket, "Prefix": above + (f"{folder}/" if folder else ""), "MaxKeys": _PAGE_NAMES}
            if "NextContinuationToken" in page:
                wanted["ContinuationToken"] = page["NextContinuationToken"]
            try:
                page = self._page(folder, wanted)
            except FileNotFoundError:  # no such bucket
                return
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # a console marks empty folders so
                    yield found["Key"][len(above) :], int(found["Size"])

    def sizes(self, folder: str = "") -> dict[str, int]:
        return dict(sorted(self.listing(folder)))

    def read(self, name: str) -> bytes:
        # One stream and one request: with more, s3fs asks for the size first, and nearly all files are small.
        return self._patiently(name, lambda _: self._fs.cat_file(self._path(name), max_concurrency=1))

    def chunks(self, name: str) -> Iterator[bytes]:
        size = self._patiently(name, lambda _: self._fs.info(self._path(name))["size"])
        for start in range(0, size, _CHUNK_BYTES):
            yield self._piece(name, start, min(start + _CHUNK_BYTES, size))

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)

        def put(failures: int) -> bool:
            try:
                self._fs.pipe_file(path, data, mode="create")
                return True
            except FileExistsError:
                pass
            except OSError as error:
                if _code(error) not in _TAKEN:
                    raise
            if not failures:
                return False
            # An earlier try may have been done though its answer was lost, or done in part.
            found = self._fs.cat_file(path, max_concurrency=1)
            if found != data and data.startswith(found):
                self._fs.pipe_file(path, data)
                return True
            return found == data

        return self._patiently(name, put)

    @contextmanager
    def replacing(self, name: str) -> Iterator[HashingWriter]:
        with tempfile.TemporaryFile() as file:  # without a name: it goes with the process, however that ends
            yield HashingWriter(file.write)
            file.flush()
            file.seek(0)
            self._patiently(name, lambda _: self._fs.put_file(f"/dev/fd/{file.fileno()}", self._path(name)))

    def remove(self, name: str) -> None:
        # Deleting a key that is not there is no error on S3.
        self._patiently(name, lambda _: self._fs.rm_file(self._path(name)))

    def remove_folder(self, folder: str) -> None:
        while names := [name for name, _ in islice(self.listing(folder), REMOVED_AT_ONCE)]:
            for name in names:
                self.remove(name)

    def _page(self, folder: str, wanted: dict[str, Any]) -> dict[str, Any]:
        return self._patiently(folder, lambda _: self._fs.call_s3("list_objects_v2", **wanted))

    def _piece(self, name: str, start: int, stop: int) -> bytes:
        return self._patiently(name, lambda _: self._fs.cat_file(self._path(name), start=start, end=stop))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _patiently(self, name: str, step: Callable[[int], _T]) -> _T:
        """The result of a step, which is told how often it has failed. Raises StoreError when patience ends."""
        from botocore.exceptions import BotoCoreError, NoCredentialsError
        from s3fs.core import S3_RETRYABLE_ERRORS

        for failures in range(TRIES):
            if failures:
                time.sleep(PAUSE_S * 2 ** (failures - 1))
            try:
                return step(failures)
            except (FileNotFoundError, FileExistsError):
                raise
            except (PermissionError, NoCredentialsError) as error:
                raise StoreError(
                    "a store's bucket lets this process in",
                    actual=str(error),
                    where=f"{self.url}/{name}",
                    fix="check the credentials in the environment and the bucket's policy",
                ) from error
            except (OSError, BotoCoreError, *S3_RETRYABLE_ERRORS) as error:
                if _final(error):
                    raise
                _log.info("%s/%s, try %d of %d: %r", self.url, name, failures + 1, TRIES, error)
                last = error
        raise StoreError(
            f"an object store answers within {TRIES} tries",
            actual=repr(last),
            where=f"{self.url}/{name}",
            fix="check the network and the server, and run the same command again; finished units are kept",
        ) from last


def _response(error: BaseException) -> dict[str, Any]:
    return getattr(error.__cause__, "response", None) or {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code"))


def _final(error: BaseException) -> bool:
    """Whether the server has said that trying again is of no use: all of 4xx but time-outs, conflicts and haste."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 425, 429)
