"""Images in WebDataset tar files: KEY.jpg beside KEY.cls, found by walking headers, read by byte ranges.

Nothing is ever unpacked: names are only ids, and every byte comes from a recorded range of the tar file. Trade-off:
an own walk over the headers instead of tarfile's, since tarfile passes over a cut or damaged end in silence, keeps
every header in memory and believes any length.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from kddata.errors import SourceError
from kddata.images import files
from kddata.images.source import (
    MAX_IMAGE_BYTES,
    ImageRef,
    ImageShard,
    check_image_id,
    check_label,
    check_unique,
    is_image_suffix,
)

_BLOCK = 512
_SPAN_BYTES = 8 << 20  # read at once
_GAP_BYTES = 64 << 10  # between two images that are still read at once
_REMOTE_GAP_BYTES = 1 << 20  # a request costs as much as so many bytes, so that dense reads stream the shard
_MAX_NAME_BYTES = 1 << 16  # of a long-name or pax header
_MAX_LABEL_BYTES = 32
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # as webdataset splits names: at the first dot
_CUT = "#cut"  # ends the id of the record that stands for what is missing at a truncated tar's end


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """Tar files as image shards. See `open_source`.

    Attributes:
        location: as given, local paths made absolute.
        paths: shard name to URL.
    """

    location: str | tuple[str, ...]
    paths: dict[str, str]
    kind: Literal["tar"] = "tar"

    def shard_names(self) -> list[str]:
        """Names of the tar files. Raises SourceError naming those that are missing."""
        files.check_present(list(self.paths.values()))
        return list(self.paths)

    def scan(self, shard_name: str) -> tuple[ImageShard, list[ImageRef]]:
        """Walks the headers of one tar by seeks. Labels come from KEY.cls, before or after the image.

        A truncated tar keeps its whole members. The image at the cut stays, with no bytes, so that it fails when it is
        decoded; where the cut is elsewhere, one empty image of the name `SHARD#cut` stands for what is lost.

        Raises SourceError for a file that is no tar, a damaged header, a hostile or repeated name, a link or sparse
        file in place of an image, or a label that is no class index.
        """
        url = files.path_of(self.paths, shard_name, self.location)
        with files.open_file(url) as file:
            size_bytes = file.seek(0, 2)
            images, labels = _walk(file, size_bytes, shard_name, url)
        refs = [
            ImageRef(image_id=key, label=labels.get(key), offset=offset, length=length)
            for key, offset, length in images
        ]
        check_unique(refs, url)
        return ImageShard(name=shard_name, size_bytes=size_bytes, num_images=len(refs)), refs

    def stream(self, shard_name: str, refs: Sequence[ImageRef]) -> Iterator[tuple[ImageRef, bytes]]:
        """The images of these references, read in spans of up to 8 MiB, remote ones one span ahead.

        What lies between two images is read too where that is cheaper than another request.
        """
        url = files.path_of(self.paths, shard_name, self.location)
        local = files.is_local(url)
        spans = list(_spans(refs, _GAP_BYTES if local else _REMOTE_GAP_BYTES))
        blocks = files.in_order(lambda span: files.read_range(url, *span[:2]), spans, ahead=0 if local else 1)
        for (start, _, members), block in zip(spans, blocks, strict=True):
            for ref in members:
                yield ref, block[ref.offset - start : ref.offset - start + ref.length]

    def fetch(self, shard_name: str, ref: ImageRef) -> bytes:
        """One image, by a range read."""
        url = files.path_of(self.paths, shard_name, self.location)
        return files.read_range(url, ref.offset, ref.offset + ref.length)


def _spans(refs: Sequence[ImageRef], gap_bytes: int = _GAP_BYTES) -> Iterator[tuple[int, int, list[ImageRef]]]:
    """(start, stop, references in it) of each read: neighbours that rise by offset are read at once."""
    members: list[ImageRef] = []
    start = stop = 0
    for ref in refs:
        end = max(stop, ref.offset + ref.length)
        joins = members and members[-1].offset <= ref.offset <= stop + gap_bytes and end - start <= _SPAN_BYTES
        if members and not joins:
            yield start, stop, members
            members = []
        if not members:
            start, end = ref.offset, ref.offset + ref.length
        members.append(ref)
        stop = end
    if members:
        yield start, stop, members


def _walk(file: IO[bytes], size: int, shard: str, url: str) -> tuple[list[tuple[str, int, int]], dict[str, int | None]]:
    """(key, offset, length) of each image, and the label of each key that has one."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int | None] = {}
    for name, offset, length in _members(file, size, url):
        parts = _KEY.fullmatch(name or "")
        key, suffix = parts.groups() if parts else ("", "")
        cut = name is None or offset + length > size
        if is_image_suffix(suffix):  # a part of an image is none, even where a decoder would take it
            lost = cut or length > MAX_IMAGE_BYTES
            images.append((check_image_id(key, url), offset, 0 if lost else length))
        elif cut:
            images.append((shard + _CUT, offset, 0))
        elif suffix.lower() == "cls":
            file.seek(offset)
            labels[key] = _label(file.read(min(length, _MAX_LABEL_BYTES)), key, url)
    return images, labels


def _label(text: bytes, key: str, url: str) -> int | None:
    if not re.fullmatch(rb"\s*-?\d{1,18}\s*", text):
        raise SourceError("KEY.cls holds one class index in ASCII digits", actual=repr(text), where=f"{url}: {key}.cls")
    return check_label(int(text), key, url)


def _members(file: IO[bytes], size: int, url: str) -> Iterator[tuple[str | None, int, int]]:
    """(name, offset, length) of each plain file in a tar, its end past the file's where the tar is cut inside it.

    A tar that ends without its end mark, or inside a header, ends with the name None.
    """
    position, long_name, long_size = 0, None, None
    while True:
        file.seek(position)
        block = file.read(_BLOCK) if position < size else b""
        if position > 0 and len(block) < _BLOCK:
            yield None, 0, 0
            return
        if block == bytes(_BLOCK):
            return
        member = _header(block, position, url)
        position += _BLOCK
        if member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if member.size > _MAX_NAME_BYTES:
                raise _damaged(f"a name header of {member.size} bytes", position, url)
            data = file.read(member.size)
            if len(data) < member.size:
                yield None, 0, 0
                return
            if member.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _pax_records(data, position, url)
                long_name, long_size = records.get("path", long_name), records.get("size")
            position += -(-member.size // _BLOCK) * _BLOCK
            continue
        name, length = long_name or member.name, member.size
        if long_size is not None:
            if not re.fullmatch("[0-9]{1,18}", long_size):
                raise _damaged(f"a size of {long_size!r}", position, url)
            length = int(long_size)
        long_name = long_size = None
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield name, position, length
            if position + length > size:
                return
        elif member.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK, tarfile.DIRTYPE):
            if is_image_suffix(name.rpartition(".")[2]):
                raise SourceError(
                    "images in a tar are plain files",
                    actual=f"{name!r}, a link or a sparse file",
                    where=url,
                    fix="make the tar with --dereference --hard-dereference",
                )
            if member.type == tarfile.GNUTYPE_SPARSE:
                raise _damaged("a sparse file", position, url)
        if member.type not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            position += -(-length // _BLOCK) * _BLOCK


def _header(block: bytes, position: int, url: str) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if position > 0:
            raise _damaged(error, position, url) from error
        gzip = block[:2] == b"\x1f\x8b"
        raise SourceError(
            "image shards are uncompressed tar files",
            actual="a gzip file" if gzip else f"{len(block)} bytes" if len(block) < _BLOCK else f"no tar ({error})",
            where=url,
            fix="unpack it with gunzip: byte ranges need plain tars" if gzip else "make it again, or leave it out",
        ) from error
    if member.size < 0:
        raise _damaged(f"a size of {member.size}", position, url)
    return member


def _pax_records(data: bytes, position: int, url: str) -> dict[str, str]:
    """The records of a pax header, "LENGTH KEY=VALUE\\n" each."""
    records, start = {}, 0
    while start < len(data) and data[start] != 0:
        match = re.compile(rb"(\d{1,9}) ([^=]+)=").match(data, start)
        if match is None or int(match[1]) <= match.end() - start or start + int(match[1]) > len(data):
            raise _damaged("a pax header that is none", position, url)
        value = data[match.end() : start + int(match[1]) - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start += int(match[1])
    return records


def _damaged(actual: object, position: int, url: str) -> SourceError:
    return SourceError(
        "every header of a tar is whole",
        actual=actual,
        where=f"{url}, byte {position}",
        fix="bring the tar back from where it came from, or leave it out",
    )
