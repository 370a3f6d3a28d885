"""Packing: any source of images as WebDataset tar shards of bounded size, optionally made smaller.

Equal sources give equal bytes: members carry no time or owner. A local directory appears whole, by one rename; remote
objects appear one whole shard at a time. Trade-off: images are copied byte for byte unless `short_side_px` asks for
less, and unreadable ones always, so that packing loses nothing and labelling counts and lists them.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch.nn import functional

from kddata.errors import BadImageError, ConfigError, SourceError
from kddata.images import files
from kddata.images.decode import decode, image_suffix
from kddata.images.source import ImageRef, ImageSource, is_image_suffix

_JPEG_QUALITY = 95
_END_BYTES = 1024  # two empty blocks end a tar


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was packed.

    Attributes:
        url: the directory of the shards.
        num_images, num_shards, num_bytes: written.
        num_resized: images that were made smaller.
        unreadable: (image id, reason) of images that could not be decoded for that, and were copied as they are.
    """

    url: str
    num_images: int
    num_shards: int
    num_bytes: int
    num_resized: int
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Sample:
    image_id: str
    suffix: str
    data: bytes
    label: int | None
    resized: bool = False
    reason: str | None = None


def pack(
    source: ImageSource,
    out_url: str,
    *,
    max_shard_bytes: int = 1 << 28,
    max_shard_images: int = 10_000,
    short_side_px: int | None = None,
    max_pixels: int = 100_000_000,
    threads: int = 1,
    on_image: Callable[[int, int], None] | None = None,
) -> Packed:
    """Writes the images of a source, in its order, to 000000.tar, 000001.tar, ... in a new or empty directory.

    A member is KEY.jpg (or .png, ...: what its header says), with KEY.cls where it has a label. KEY is the image id
    without its image suffix, other dots of its last part as "_"; a tar's ids stay as they are.

    Args:
        max_shard_bytes, max_shard_images: of one shard; an image that is larger alone gets a shard of its own.
        short_side_px: larger images are resized (bicubic, antialiased) to this short side and encoded again, PNG as
            PNG and all else as JPEG of quality 95.
        max_pixels: of an image that is decoded for that; larger ones are copied and listed as unreadable.
        threads: that resize.
        on_image: called after each image with the images written and the number expected, exact for the last shard.

    Memory: one image shard's references, one remote shard's read-ahead, and one key an image.
    Raises SourceError for a broken source or two ids with one key, ConfigError for a directory with something in it.
    """
    for name, value in (("max_shard_bytes", max_shard_bytes), ("max_shard_images", max_shard_images)):
        if value < 1:
            raise ConfigError(f"{name} is at least 1", actual=value)
    if short_side_px is not None and short_side_px < 1:
        raise ConfigError("short_side_px is at least 1", actual=short_side_px)
    out_url = files.normalise(out_url)

    def prepare(item: tuple[ImageRef, bytes]) -> _Sample:
        return _sample(*item, short_side_px=short_side_px, max_pixels=max_pixels)

    keys: set[str] = set()
    unreadable = []
    num_resized = found = 0
    names = source.shard_names()
    with _directory(out_url) as (stage, publish):
        shards = _Shards(stage, publish, max_bytes=max_shard_bytes, max_images=max_shard_images)
        with shards:
            for number, name in enumerate(names, start=1):
                refs = source.scan(name)[1]
                found += len(refs)
                for sample in files.in_order(prepare, source.stream(name, refs), ahead=threads if threads > 1 else 0):
                    key = image_key(sample.image_id)
                    if key in keys:
                        raise SourceError(
                            "every image gets a tar key of its own (its id without the suffix, dots as _)",
                            actual=f"{key!r} again for {sample.image_id!r}",
                            where=name,
                            fix="rename one of the two images",
                        )
                    keys.add(key)
                    shards.add(key, sample)
                    num_resized += sample.resized
                    if sample.reason is not None:
                        unreadable.append((sample.image_id, sample.reason))
                    if on_image is not None:
                        on_image(len(keys), round(found / number * len(names)))
    return Packed(
        url=out_url,
        num_images=len(keys),
        num_shards=shards.number,
        num_bytes=shards.num_bytes,
        num_resized=num_resized,
        unreadable=tuple(unreadable),
    )


def image_key(image_id: str) -> str:
    """The WebDataset key of an image id: without an image suffix, and without dots in its last part."""
    directory, slash, name = image_id.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return directory + slash + ((stem if dot and is_image_suffix(suffix) else name).replace(".", "_") or "_")


def _sample(ref: ImageRef, data: bytes, *, short_side_px: int | None, max_pixels: int) -> _Sample:
    """The image as it will be written, made smaller if it is to be and can be."""
    own_suffix = ref.image_id.rpartition(".")[2].lower()
    suffix = image_suffix(data) or (own_suffix if is_image_suffix(own_suffix) else "jpg")
    as_is = _Sample(image_id=ref.image_id, suffix=suffix, data=data, label=ref.label)
    if short_side_px is None:
        return as_is
    try:
        pixels = decode(data, max_pixels=max_pixels)
    except BadImageError as error:
        return replace(as_is, reason=str(error))
    height, width = pixels.shape[1:]
    short = min(height, width)
    if short <= short_side_px:
        return as_is
    size = (round(height * short_side_px / short), round(width * short_side_px / short))
    pixels = functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
    suffix, encoding = ("png", "PNG") if suffix == "png" else ("jpg", "JPEG")
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format=encoding, quality=_JPEG_QUALITY)
    return replace(as_is, suffix=suffix, data=file.getvalue(), resized=True)


class _Shards:
    """Writes samples to tar files in a directory, the next one where a bound would be passed. Owns the open tar."""

    def __init__(self, directory: Path, publish: Callable[[Path], None], *, max_bytes: int, max_images: int) -> None:
        self.number = self.num_bytes = 0
        self._directory, self._publish = directory, publish
        self._max_bytes, self._max_images = max_bytes, max_images
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        elif self._tar is not None:
            assert self._tar.fileobj is not None
            self._tar.fileobj.close()

    def add(self, key: str, sample: _Sample) -> None:
        members = [(f"{key}.{sample.suffix}", sample.data)]
        if sample.label is not None:
            members.append((f"{key}.cls", str(sample.label).encode()))
        infos = [_member(name, len(data)) for name, data in members]
        needed = sum(len(info.tobuf(tarfile.PAX_FORMAT)) + _padded(info.size, tarfile.BLOCKSIZE) for info in infos)
        if self._tar is not None:
            end = _padded(self._tar.offset + needed + _END_BYTES, tarfile.RECORDSIZE)
            if end > self._max_bytes or self._in_shard == self._max_images:
                self._close()
        if self._tar is None:
            path = self._directory / _shard_name(self.number)
            self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # closed by _close
            self._in_shard = 0
        for info, (_, data) in zip(infos, members, strict=True):
            self._tar.addfile(info, io.BytesIO(data))
        self._in_shard += 1

    def _close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path = self._directory / _shard_name(self.number)
        self.num_bytes += path.stat().st_size
        self._publish(path)
        self.number += 1


def _shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # time 0, owner 0 without a name, mode 0644
    info.size = size
    return info


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


@contextmanager
def _directory(url: str) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """A local directory to write into, and what to call with each finished file.

    Raises ConfigError where there is something at the URL already. After an error nothing is left.
    """
    if url.startswith("http") or files.list_directory(url) or (files.is_local(url) and Path(url).is_file()):
        raise ConfigError(
            "packing writes into a new or empty directory",
            actual="a web server" if url.startswith("http") else "something is there",
            where=url,
            fix="name another place, or empty this one",
        )
    with _local_directory(Path(url)) if files.is_local(url) else _remote_directory(url) as place:
        yield place


@contextmanager
def _local_directory(target: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    stage = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
    stage.mkdir(parents=True)
    try:
        yield stage, _sync
        _sync(stage)
        try:
            stage.rename(target)  # takes the place of an empty directory, and of nothing else
        except OSError as error:
            raise ConfigError(
                "packing writes into a new or empty directory",
                actual=error,
                where=target,
                fix="another run may have packed here meanwhile; name another place",
            ) from error
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


@contextmanager
def _remote_directory(url: str) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    system, root = files.file_system(url)
    written: list[str] = []

    def upload(path: Path) -> None:
        written.append(f"{root}/{path.name}")
        if url.startswith("memory:"):  # its put_file shows a file that grows
            system.pipe_file(written[-1], path.read_bytes())
        else:
            system.put_file(str(path), written[-1])
        path.unlink()

    with tempfile.TemporaryDirectory(prefix="kddata-pack-") as stage:
        try:
            yield Path(stage), upload
        except BaseException:
            for path in written:
                if system.exists(path):
                    system.rm_file(path)
            raise


def _sync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
