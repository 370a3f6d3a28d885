"""Files of a source: which URLs are allowed, what a location stands for, and reading byte ranges through fsspec.

Local files are opened directly, all else by the fsspec file system of the URL's scheme, which is looked up at every
use: file systems do not survive a fork, and fsspec keeps one a process. Nothing here writes.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from kddata.errors import KddataError, SourceError

# An allow-list: fsspec also knows schemes that run commands, unpack archives or chain to others.
SCHEMES = ("file", "memory", "s3", "gs", "abfs", "http", "https")
_BRACE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MAX_FILES = 10_000_000
TRIES = 6  # of a read from remote storage
PAUSE_S = 0.1  # before the second; twice as long before each further one
_BLOCK_BYTES = 4 << 20  # of a remote file read at once while its headers are walked

Item = TypeVar("Item")
Result = TypeVar("Result")


def normalise(location: str) -> str:
    """The location with an allowed scheme; a local path is made absolute. Raises SourceError for any other scheme."""
    scheme, colon, rest = location.partition("://")
    refused = "::" in location or location.lower().startswith("pipe:")
    if refused or (colon and scheme not in SCHEMES) or not location:
        raise SourceError(
            f"images lie in local paths or URLs of {', '.join(SCHEMES)}; commands and chained URLs are refused",
            actual=repr(location),
            fix="copy the images to one of these places",
        )
    if not colon or scheme == "file":
        path = Path(rest if colon else location).expanduser()
        return os.path.abspath(path)  # noqa: PTH100  # resolve() would follow links
    return location.rstrip("/")


def expand(location: str) -> list[str]:
    """Every location that brace ranges ({00000..00003}, both ends in) and alternatives ({a,b}) stand for, in order."""
    parts, position, count = [], 0, 1
    for match in _BRACE.finditer(location):
        first, last, alternatives = match.groups()
        choices: Sequence[str] | Iterable[str]
        if alternatives is not None:
            choices = alternatives.split(",")
            count *= len(choices)
        else:
            padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
            width = max(len(first), len(last)) if padded else 0
            count *= max(0, int(last) - int(first) + 1)
            choices = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
        if not 1 <= count <= _MAX_FILES:
            raise SourceError(
                f"a brace range rises and names at most {_MAX_FILES} files", actual=match.group(), where=location
            )
        parts += [[location[position : match.start()]], choices]
        position = match.end()
    parts.append([location[position:]])
    return ["".join(choice) for choice in itertools.product(*parts)]


def is_local(url: str) -> bool:
    """Whether a normalised location is a local path."""
    return "://" not in url


def missing_file(url: str) -> SourceError:
    """The error for a file or folder that is not there."""
    return SourceError(
        "images exist where `images` says",
        actual="nothing there",
        where=url,
        fix="check the path; braces stand for ranges such as {00000..00003}, and relative paths start at "
        "the working directory",
    )


def list_directory(url: str) -> list[str] | None:
    """Names in a directory, sorted, or None where there is no such directory."""
    with _reading(url):
        if is_local(url):
            return sorted(entry.name for entry in Path(url).iterdir()) if Path(url).is_dir() else None
        system, path = file_system(url)
        system.invalidate_cache()  # listings that fsspec remembers may be older than the files
        try:
            found = system.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
    if [name.strip("/") for name in found] == [path.strip("/")]:
        return None  # a file is listed as itself
    return sorted({name.rstrip("/").rpartition("/")[2] for name in found})


def exists(url: str) -> bool:
    """Whether there is a file or directory. Costs a request where the file is remote."""
    if is_local(url):
        return Path(url).exists()
    system, path = file_system(url)
    system.invalidate_cache()
    return system.exists(path)


def check_present(urls: Sequence[str]) -> None:
    """Raises SourceError naming the first of these files that are missing. Costs one listing a remote directory."""
    found: dict[str, set[str]] = {}
    gone = []
    for url in urls:
        directory, _, name = url.rpartition("/")
        if is_local(url) or url.startswith("http"):  # a web server cannot be relied on to list
            there = exists(url)
        else:
            if directory not in found:
                found[directory] = set(list_directory(directory) or ())
            there = name in found[directory]
        if not there:
            gone.append(url)
    if gone:
        raise missing_file(", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else ""))


def file_size(url: str) -> int | None:
    """Bytes of a file, or None where its server does not say. Raises SourceError where it is missing."""
    with _reading(url):
        if is_local(url):
            return Path(url).stat().st_size
        system, path = file_system(url)
        return system.size(path)


def open_file(url: str) -> IO[bytes]:
    """A seekable file for reading. Raises SourceError where it is missing, or where a web server has no byte ranges."""
    if url.startswith("http"):
        read_range(url, 0, 1)
    with _reading(url):
        if is_local(url):
            return open(url, "rb")
        system, path = file_system(url)
        return system.open(path, "rb", block_size=_BLOCK_BYTES)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes start to stop of a file. Raises SourceError where it is missing or has fewer."""
    if start == stop:
        return b""
    with _reading(url):
        if is_local(url):
            with open(url, "rb", buffering=0) as file:
                file.seek(start)
                # Never more than there is: the range may come from a store that was made elsewhere.
                data = file.read(max(0, min(stop, os.fstat(file.fileno()).st_size) - start))
        else:
            system, path = file_system(url)
            data = _patiently(lambda: system.cat_file(path, start=start, end=stop))
    if len(data) != stop - start:
        raise SourceError(
            "image files stay as they were when they were scanned, and their servers honour byte ranges",
            actual=f"{len(data)} bytes instead of {stop - start} at byte {start}",
            where=url,
            fix="bring the former file back, or start again with the new one",
        )
    return data


def _patiently(call: Callable[[], Result]) -> Result:
    """What a call to a remote storage gives, tried again with growing pauses where the network or a server failed."""
    for number in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except Exception:  # of aiohttp, botocore and others: they share no base
            if number == TRIES - 1:
                raise
            time.sleep(PAUSE_S * 2**number)
    raise AssertionError


def in_order(function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[Result]:
    """function(item) of each item, in order, up to `ahead` of them under way in threads before they are asked for."""
    if ahead < 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(ahead, thread_name_prefix="kddata-read") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises SourceError where the package for its scheme is not installed."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SourceError(
            "the fsspec package for a URL's scheme is installed", actual=error, where=url, fix="pip install it"
        ) from error


def path_of(paths: dict[str, str], shard_name: str, location: object) -> str:
    """The URL of a shard. Raises SourceError for a name that the source does not have."""
    try:
        return paths[shard_name]
    except KeyError:
        raise SourceError(
            "an image shard is one of its source",
            actual=repr(shard_name),
            where=location,
            fix="point `images` at the place that holds it, under the name that it had",
        ) from None


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """What the storage cannot do becomes a SourceError that names the file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise missing_file(url) from None
    except KddataError:
        raise  # it says already what is wrong, and what next
    except Exception as error:  # of aiohttp, botocore and others: they share no base
        if is_local(url) and not isinstance(error, OSError):
            raise
        actual = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise SourceError(
            "images can be read", actual=actual, where=url, fix="check permissions, storage and network"
        ) from error
