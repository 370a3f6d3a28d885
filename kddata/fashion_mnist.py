"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): found on this machine or fetched, and turned into encoded images.

For the demo and for trying things out: 60,000 + 10,000 grey images of 28 px in ten classes. Trade-off: sources are
tried in a fixed order, the nearest first, and what is fetched is not asked about twice.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import os
import shutil
import subprocess
import urllib.error
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kddata.errors import SourceError

CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DEBIAN_PACKAGE, DEBIAN_FOLDER = "dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")
Split = Literal["train", "t10k"]

_FILES = tuple(f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
_log = logging.getLogger(__name__)


def find(folder: str | Path | None = None, *, download_to: str | Path) -> Path:
    """The folder that holds the four idx files, plain or .gz.

    Tried in order: `folder` alone where it is given; Debian's package; `download_to`, filled by torchvision's
    download if need be; and, as root on Debian, apt. Raises SourceError naming the remedies.
    """
    if folder is not None:
        if _complete(Path(folder)):
            return Path(folder)
        raise SourceError(
            "Fashion-MNIST is four idx files, plain or .gz",
            actual="not all of them",
            where=folder,
            fix=f"name the folder that holds {', '.join(_FILES)}",
        )
    downloaded = Path(download_to) / "FashionMNIST" / "raw"
    for place in (DEBIAN_FOLDER, downloaded):
        if _complete(place):
            return place
    tried = [f"no {DEBIAN_FOLDER}", _download(download_to)]
    if _complete(downloaded):
        return downloaded
    tried.append(_install())
    if _complete(DEBIAN_FOLDER):
        return DEBIAN_FOLDER
    raise SourceError(
        "Fashion-MNIST is on this machine, or can be fetched",
        actual="; ".join(tried),
        fix=f"apt install {DEBIAN_PACKAGE} (Debian, Ubuntu), or name a folder with its idx.gz files",
    )


def write_parquet(folder: str | Path, split: Split, path: str | Path, *, most: int | None = None) -> int:
    """Writes a split (or its first images) as PNG to a Parquet file with columns image_id, image, label; their number.

    Raises SourceError for files that are not what they should be.
    """
    images = _read(Path(folder) / f"{split}-images-idx3-ubyte", dims=3)[:most]
    labels = _read(Path(folder) / f"{split}-labels-idx1-ubyte", dims=1)[:most]
    columns = {
        "image_id": pa.array([f"{split}-{i:05d}" for i in range(len(images))]),
        "image": pa.array([_png(image) for image in images], pa.binary()),
        "label": pa.array(labels.tolist(), pa.int64()),
    }
    pq.write_table(pa.table(columns), path)
    return len(images)


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in _FILES)


def _read(path: Path, *, dims: int) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8, the number of dimensions, each dimension as a big-endian int32, the values."""
    try:
        data = path.read_bytes() if path.is_file() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    except (OSError, EOFError) as error:
        raise SourceError("an idx file can be read", actual=error, where=path) from error
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, 4 + 4 * dims, 4))
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) != 4 + 4 * dims + math.prod(shape):
        raise SourceError(
            f"an idx file holds bytes in {dims} dimensions",
            actual=f"header {data[:4].hex()}, shape {shape}, {len(data)} bytes",
            where=path,
            fix="fetch it again",
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _png(image_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW).save(file, format="PNG")
    return file.getvalue()


def _download(folder: str | Path) -> str:
    """Torchvision's download; what came of it in words."""
    from torchvision.datasets import FashionMNIST

    _log.info("downloading Fashion-MNIST")
    try:
        FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        return f"the download failed ({error})"
    return "downloaded"


def _install() -> str:
    """Debian's package, where this process may install one; what came of it in words."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return "apt was not tried (it takes root on Debian)"
    _log.info("installing %s", DEBIAN_PACKAGE)
    for command in (["update"], ["install", "-y", "--no-install-recommends", DEBIAN_PACKAGE]):
        done = subprocess.run(["apt-get", *command], capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"apt-get ended with {done.returncode} ({last})"
