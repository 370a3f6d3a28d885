import gzip

import numpy as np
import pytest

from kddata import fashion_mnist
from kddata.errors import SourceError
from kddata.images import decode, open_source


def idx(array):
    """An array of bytes as an idx file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Four images of each split; the training files are packed."""
    made = np.random.default_rng(0)
    for split, suffix in (("train", ".gz"), ("t10k", "")):
        for what, array in (
            ("images-idx3", made.integers(0, 256, (4, 28, 28), dtype=np.uint8)),
            ("labels-idx1", np.array([3, 0, 9, 1], np.uint8)),
        ):
            data = idx(array)
            path = tmp_path / f"{split}-{what}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if suffix else data)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_images_and_labels_come_out_as_they_went_in(folder, split):
    assert fashion_mnist.write_parquet(folder, split, folder / "out.parquet", most=3) == 3
    source = open_source(str(folder / "out.parquet"))
    (name,) = source.shard_names()
    found = list(source.stream(name, source.scan(name)[1]))
    assert [(ref.image_id, ref.label) for ref, _ in found] == [(f"{split}-0000{i}", y) for i, y in enumerate([3, 0, 9])]
    path = folder / f"{split}-images-idx3-ubyte"
    raw = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    wanted = np.frombuffer(raw, np.uint8, offset=16).reshape(4, 28, 28)
    for (_, data), image in zip(found, wanted, strict=False):
        assert np.array_equal(decode(data, max_pixels=28 * 28).numpy(), np.broadcast_to(image, (3, 28, 28)))


def test_a_given_folder_is_taken_and_nothing_else_is_tried(folder, tmp_path):
    assert fashion_mnist.find(folder, download_to=tmp_path / "never") == folder
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SourceError, match=r"four idx files.*not all of them.*name the folder that holds train-images"):
        fashion_mnist.find(folder, download_to=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_was_downloaded_is_found_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    raw = tmp_path / "download" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in list(folder.glob("*ubyte*")):
        path.rename(raw / path.name)
    assert fashion_mnist.find(download_to=tmp_path / "download") == raw


def test_where_nothing_helps_one_message_names_the_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(SourceError) as caught:
        fashion_mnist.find(download_to=tmp_path / "download")
    for said in ("absent", "the download failed", "apt was not tried (it takes root", "apt install dataset-fashion"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], r"shape \(4, 28, 28\), 3151 bytes"),
        (lambda data: b"\0\0\x0d\3" + data[4:], "header 00000d03"),
        (lambda data: b"<html>", "header 3c68746d"),
    ],
)
def test_a_damaged_file_is_named(folder, damage, says):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=rf"holds bytes in 3 dimensions.*{says}.*t10k-images"):
        fashion_mnist.write_parquet(folder, "t10k", folder / "out.parquet")


def test_a_cut_gzip_is_named(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(SourceError, match=r"an idx file can be read.*train-labels"):
        fashion_mnist.write_parquet(folder, "train", folder / "out.parquet")
