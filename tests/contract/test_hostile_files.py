"""Files made to harm: each ends in one of our errors or a harmless outcome; nothing runs, nothing is written outside.

All cases of one kind run in one process of their own, whose memory is measured and whose working folder is watched.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from kddata.config.label import LabelFile
from kddata.config.reading import load
from kddata.errors import KddataError
from kddata.images.decode import decode
from kddata.images.opening import open_source
from kddata.replay import loader
from kddata.store import LabelStore, entries
from kddata.store.naming import MANIFEST, twin
from kddata.store.sealing import seal, unseal
from kddata.teacher import build_network
from kddata.testing import make_store

MAX_RSS_BYTES = 1 << 30
MAX_PIXELS = 1_000_000
Case = Callable[[Path], object]


class Canary:
    """Unpickling this leaves a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("canary", "w")


def small_jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG")
    return out.getvalue()


def read_tar(folder: Path, *members: tuple[tarfile.TarInfo, bytes], tail: bytes = b"", format: int = 0) -> object:
    """Scans and decodes every image of a tar of these members."""
    path = folder / "images.tar"
    with tarfile.open(path, "w", format=format or tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    if tail:
        path.write_bytes(path.read_bytes()[: -tarfile.RECORDSIZE // 2] + tail)
    return read(path)


def read(path: Path) -> object:
    source = open_source(str(path))
    for shard in source.shard_names():
        _, refs = source.scan(shard)
        for _, data in source.stream(shard, refs):
            decode(data, max_pixels=MAX_PIXELS)
    return None


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tars() -> Iterator[tuple[str, str, Case]]:
    """(name, "refused" or "harmless", what reads it)."""
    jpeg, code = small_jpeg(), pickle.dumps(Canary())
    good = member("good.jpg", jpeg)
    for name in ("../out.jpg", "a/../../out.jpg", "/tmp/out.jpg", "..", "./../out.jpg", "a/../out.jpg", "..\\out.jpg"):
        expected = "refused" if name.endswith(".jpg") and "\\" not in name else "harmless"
        yield f"name {name}", expected, lambda f, n=name: read_tar(f, good, member(n, jpeg))
    for kind, what in ((tarfile.SYMTYPE, "symlink"), (tarfile.LNKTYPE, "hard link"), (tarfile.CHRTYPE, "device")):
        info = member("evil.jpg", type=kind, linkname="/etc/passwd")
        yield what, "refused", lambda f, m=info: read_tar(f, good, m)
    yield "fifo beside images", "harmless", lambda f: read_tar(f, good, member("x.cls", type=tarfile.FIFOTYPE))
    for suffix in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "py", "mp4"):
        yield f"{suffix} member", "harmless", lambda f, s=suffix: read_tar(f, good, member(f"good.{s}", code))
    yield "pickle as image", "refused", lambda f: read_tar(f, member("good.jpg", code))
    yield "pickle as label", "refused", lambda f: read_tar(f, good, member("good.cls", code))
    yield "key twice", "refused", lambda f: read_tar(f, good, good)
    huge = member("huge.jpg", pax_headers={"size": "9" * 18})
    yield "size of 10^18 bytes", "refused", lambda f: read_tar(f, good, huge)
    endless = member("huge.jpg", pax_headers={"size": "9" * 4000})
    yield "size of 4,000 digits", "refused", lambda f: read_tar(f, good, endless)
    bomb = member("bomb.jpg", jpeg, pax_headers={"comment": "A" * (8 << 20)})
    yield "pax header of 8 MiB", "refused", lambda f: read_tar(f, good, bomb)
    yield "digits of a label", "refused", lambda f: read_tar(f, good, member("good.cls", b"9" * 100_000))
    yield "cut inside a member", "refused", lambda f: cut_tar(f, good)


def cut_tar(folder: Path, good: tuple[tarfile.TarInfo, bytes]) -> object:
    read_tar(folder, good)
    path = folder / "images.tar"
    path.write_bytes(path.read_bytes()[:600])
    return read(path)


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def images() -> Iterator[tuple[str, str, Case]]:
    jpeg = small_jpeg()
    frame = jpeg.index(b"\xff\xc0")
    big_jpeg = jpeg[: frame + 5] + struct.pack(">HH", 65_535, 65_535) + jpeg[frame + 9 :]
    zeros = zlib.compress(bytes(64 << 20))
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF", save_all=True, append_images=[Image.new("P", (8, 8), 1)])
    big_gif = gif.getvalue()[:6] + struct.pack("<HH", 65_535, 65_535) + gif.getvalue()[10:]
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    big_tiff = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(big_tiff, "TIFF", compression="group4")
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(cmyk, "JPEG")
    webp = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff" * 6
    for name, expected, data in (
        ("PNG of 2^31 x 2^31", "refused", png(2**31 - 1, 2**31 - 1, zeros)),
        ("PNG of 30,000 x 30,000", "refused", png(30_000, 30_000, zeros)),
        ("PNG with more data than pixels", "any", png(8, 8, zeros)),
        ("PNG of 0 x 0", "refused", png(0, 0, b"")),
        ("PNG without data", "refused", png(8, 8, b"")),
        ("JPEG of 65,535 x 65,535", "refused", big_jpeg),
        ("GIF of 65,535 x 65,535", "refused", big_gif),
        ("TIFF of 12,000 x 12,000", "refused", big_tiff.getvalue()),
        ("WebP of 2^24 x 2^24", "refused", webp),
        ("PPM of 10^9 x 10^9", "refused", b"P6 1000000000 1000000000 255\n"),
        ("BMP of lying size", "refused", b"BM" + b"\xff" * 60),
        ("EPS, which runs Ghostscript", "refused", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("SVG", "refused", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("pickle", "refused", pickle.dumps(Canary())),
        ("cut JPEG header", "refused", jpeg[:frame]),
        ("cut TIFF", "refused", tiff.getvalue()[:100]),
        ("JPEG and a zip behind it", "harmless", jpeg + b"PK\x03\x04" + bytes(100)),
        ("GIF of several frames", "harmless", gif.getvalue()),
        ("CMYK JPEG", "harmless", cmyk.getvalue()),
        ("nothing", "refused", b""),
    ):
        yield name, expected, lambda f, d=data: decode(d, max_pixels=MAX_PIXELS)


def configs() -> Iterator[tuple[str, str, Case]]:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    for name, text in (
        ("python tag", "images: !!python/object/apply:os.system ['touch canary']\n"),
        ("python name", "images: !!python/name:os.system\n"),
        ("python new", "images: !!python/object/new:subprocess.Popen [[touch, canary]]\n"),
        ("billion laughs", laughs),
        ("anchor in itself", "images: &a [*a]\n"),
        ("10,000 brackets", "images: " + "[" * 10_000),
        ("unknown key", "imagez: x\n"),
        ("number of 10,000 digits", f"k: {'9' * 10_000}\n"),
        ("not a number", "labels: {k: .nan}\n"),
        ("null bytes", "images: \0\n"),
    ):
        yield name, "refused", lambda f, t=text: read_config(f, t)
    for url in (
        "pipe:touch canary",
        "pipe://touch canary",
        "zip://x.tar::file:///tmp/a.zip",
        "simplecache::http://localhost/x.tar",
        "tar://a::pipe:touch canary",
        "python://os.system",
        "{0..99999999999}.tar",
    ):
        yield f"location {url}", "refused", lambda f, u=url: open_source(u)


def stores() -> Iterator[tuple[str, str, Case]]:
    """Manifests that are sealed as they should be, and say what they should not."""

    def unit(**changes: object) -> Callable[[dict], None]:
        return lambda content: content["units"][0].update(changes)

    def top(**changes: object) -> Callable[[dict], None]:
        return lambda content: content.update(changes)

    hostile: dict[str, Callable[[dict], None]] = {
        "file above the store": unit(file="../../secret"),
        "absolute file": unit(file="/etc/passwd"),
        "file of another unit": unit(file="labels/000001.arrow"),
        "remote file": unit(file="http://localhost/x"),
        "number of 30 digits": unit(number=10**30),
        "10^18 views": unit(view_stop=10**18),
        "rows below nothing": unit(rows=-1),
        "text for rows": unit(rows="7"),
        "true for rows": unit(rows=True),
        "shard that is not there": unit(shard=10**6),
        "hash that is none": unit(sha256="x" * 64),
        "unit without keys": lambda content: content["units"].__setitem__(0, {}),
        "units of text": top(units="x" * 100),
        "units of numbers": top(units=[1, 2]),
        "record above the store": top(files={"../../secret": "0" * 64}),
        "shards without names": top(image_shards=[{}]),
        "views of 10^18": top(views_per_image=10**18),
        "spec without a plan": lambda content: content["spec"].pop("plan"),
        "spec of text": top(spec="x"),
        "teacher of a list": lambda content: content["spec"].__setitem__("teacher", []),
        "library of tomorrow": lambda content: content["spec"].__setitem__("format_version", 99),
        "generation of text": top(generation="1"),
    }
    for name, change in hostile.items():
        yield name, "refused", lambda f, c=change: tampered(f, c)

    def part(**changes: object) -> Callable[[dict], None]:
        return lambda content: content["parts"]["units"][0].update(changes)

    for name, change in {
        "part above the store": part(file="../../secret"),
        "part of another generation": part(file="units-000002.arrow"),
        "part without a hash": part(sha256=None),
        "part of more units": part(entries=10**6),
        "part of other units": part(file="images-000001.arrow"),
        "a part twice": lambda content: content["parts"]["units"].extend(content["parts"]["units"]),
        "parts of text": lambda content: content["parts"].update(units="x"),
        "parts of units alone": lambda content: content["parts"].pop("image_shards"),
        "parts of nothing": top(parts=[]),
    }.items():
        yield name, "refused", lambda f, c=change: tampered_parts(f, c)
    for column, value in {
        "number": 1,
        "shard": 10**6,
        "start": 10**9,
        "view_stop": 10**18,
        "rows": -1,
        "sha256": bytes(32),
    }.items():
        yield f"{column} {value} in a part", "refused", lambda f, c=column, v=value: other_part(f, {c: v})
    for name, data in (
        ("200,000 brackets", b"[" * 200_000),
        ("a pickle", pickle.dumps(Canary())),
        ("not a number", b'{"seal": NaN}'),
        ("nothing", b""),
    ):
        yield name, "refused", lambda f, d=data: manifest_of(f, d)
    yield (
        "images behind a pipe",
        "refused",
        lambda f: reread(f, images={"kind": "tar", "location": "pipe:touch canary"}),
    )
    for compression in ("zstd", "lz4"):
        yield f"labels that unpack to 1.5 GiB by {compression}", "refused", lambda f, c=compression: bomb(f, c)
    yield "code for a teacher", "harmless", lambda f: tampered(f, code_for_teacher, read=False)


def bomb(folder: Path, compression: str) -> None:
    """Reads a label shard of 1.5 GiB of zeros, which has the hash and the size that its manifest says."""
    labels, content = a_store(folder)
    path = labels / content["units"][0]["file"]
    schema = pa.ipc.open_file(path.read_bytes()).schema
    wide = pa.schema([pa.field("image_id", pa.int64())], metadata=schema.metadata)
    batch = pa.record_batch([np.zeros(1 << 23, np.int64)], schema=wide)
    with pa.ipc.new_file(path, wide, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for _ in range(24):
            writer.write_batch(batch)
    data = path.read_bytes()
    content["units"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["totals"]["bytes"] = sum(unit["bytes"] for unit in content["units"])
    for name in (MANIFEST, twin(MANIFEST)):
        (labels / name).write_bytes(seal(content))
    opened = LabelStore.open(str(labels))
    assert not opened.verify()
    opened.read(0)


def code_for_teacher(content: dict) -> None:
    content["spec"]["teacher"]["arch"] = "python:os:abort"


def a_store(folder: Path) -> tuple[Path, dict]:
    root = folder / "store"
    if not root.exists():
        make_store(root)
        shutil.copytree(root, folder / "good")
    shutil.rmtree(root)
    shutil.copytree(folder / "good", root)
    return root / "labels", unseal((root / "labels" / MANIFEST).read_bytes(), where="manifest")


def tampered(folder: Path, change: Callable[[dict], object], *, read: bool = True) -> None:
    """Opens, verifies and reads a store with a changed manifest, sealed anew."""
    _, content = a_store(folder)
    change(content)
    manifest_of(folder, seal(content), read=read)


def in_parts(folder: Path) -> tuple[Path, dict]:
    """Like `a_store`, of a store whose manifest has parts."""
    with mock.patch.object(entries, "INLINE_MOST", 0):
        return a_store(folder / "parts")


def tampered_parts(folder: Path, change: Callable[[dict], object]) -> None:
    """Opens and reads a store whose manifest says something else of its parts."""
    labels, content = in_parts(folder)
    shutil.copy(labels / content["parts"]["units"][0]["file"], labels / "../../secret")  # sound, but not a store's
    change(content)
    for name in (MANIFEST, twin(MANIFEST)):
        (labels / name).write_bytes(seal(content))
    LabelStore.open(str(labels)).read(0)


def other_part(folder: Path, changes: dict[str, object]) -> None:
    """Opens and reads a store whose part says something else of the first unit, under the hash that it then has."""
    labels, content = in_parts(folder)
    path = labels / content["parts"]["units"][0]["file"]
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    rows = table.to_pylist()
    rows[0] |= changes
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=table.schema))
    content["parts"]["units"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in (MANIFEST, twin(MANIFEST)):
        (labels / name).write_bytes(seal(content))
    LabelStore.open(str(labels)).read(0)


def manifest_of(folder: Path, data: bytes, *, read: bool = True) -> None:
    labels, _ = a_store(folder)
    for name in (MANIFEST, twin(MANIFEST)):
        (labels / name).write_bytes(data)
    opened = LabelStore.open(str(labels))
    assert not opened.verify()
    if read:
        opened.read(0)


def reread(folder: Path, **changes: object) -> None:
    labels, content = a_store(folder)
    for name in (MANIFEST, twin(MANIFEST)):
        (labels / name).write_bytes(seal({**content, **changes}))
    next(iter(loader(LabelStore.open(str(labels)), batch_size=4, size_px=16)))


def weights() -> Iterator[tuple[str, str, Case]]:
    lying = struct.pack("<Q", 1 << 60) + b"{}"
    huge = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for name, data in (
        ("a pickle", pickle.dumps(Canary())),
        ("a header that lies", lying),
        ("a tensor of 4 TB", struct.pack("<Q", len(huge)) + huge),
        ("nothing", b""),
        ("a zip", b"PK\x03\x04" + bytes(100)),
    ):
        yield name, "refused", lambda f, d=data: weights_of(f, d)
    for url in ("/", "pipe:touch canary", "simplecache::file:///x", "tar://a::pipe:touch canary", "nowhere/x"):
        yield (
            f"weights {url}",
            "refused",
            lambda f, u=url: build_network("torchvision:squeezenet1_1", num_classes=2, weights=u),
        )


def weights_of(folder: Path, data: bytes) -> object:
    (folder / "w.safetensors").write_bytes(data)
    return build_network("torchvision:squeezenet1_1", num_classes=2, weights=str(folder / "w.safetensors"))


def read_config(folder: Path, text: str) -> object:
    (folder / "job.yaml").write_text(text)
    return load(LabelFile, folder / "job.yaml")


KINDS = {"tars": tars, "images": images, "configs": configs, "stores": stores, "weights": weights}


def outcome(case: Case, folder: Path) -> str:
    try:
        case(folder)
    except KddataError:
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "harmless"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_hostile_gets_through(kind: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, __file__, kind], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["cases"] == len(list(KINDS[kind]()))
    assert found["rss_bytes"] < MAX_RSS_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["work"], "something was written outside"


def main(kind: str) -> None:
    wrong, cases, folder = [], 0, Path("work")
    folder.mkdir()
    for name, expected, case in KINDS[kind]():
        cases, begin = cases + 1, time.monotonic()
        found = outcome(case, folder)
        if found != expected and not (expected == "any" and found in ("refused", "harmless")):
            wrong.append(f"{name}: expected {expected}, {found}")
        sys.stderr.write(f"{time.monotonic() - begin:.2f} s {name}: {found}\n")
    # The peak of this process (ru_maxrss begins with its parent's), less the pages of libraries that it has mapped,
    # of which the kernel holds more or fewer as it likes: no file makes us allocate those.
    status = Path("/proc/self/status").read_text()
    peak_kib, mapped_kib = (int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmHWM", "RssFile"))
    rss_bytes = (peak_kib - mapped_kib) * 1024
    sys.stdout.write(json.dumps({"cases": cases, "rss_bytes": rss_bytes, "wrong": wrong}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
