"""Label shards as tars: webdataset, numpy and our own image source read them; hostile ones are refused."""

import dataclasses
import io
import json
import pickle
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from kddata.errors import StoreDamagedError, StoreError
from kddata.images import open_source
from kddata.store import LabelStore, formats, tar
from kddata.store.steps import HashingWriter
from kddata.testing import begin_small_store, made_up_image, made_up_rows, make_store, small_spec, small_store
from kddata.views import ViewPlan


def _spec(**changes):
    return dataclasses.replace(small_spec(unit_views=None), **{"format": "tar", **changes})


def _samples(path, *decoders):
    return list(webdataset.WebDataset(str(path), shardshuffle=False).decode(*decoders))


def test_stock_webdataset_reads_labels_in_one_line(tmp_path):
    store = small_store(str(tmp_path / "labels"), spec=_spec())
    samples = _samples(tmp_path / "labels/labels/000000.tar")
    rows = store.read(0)
    num_views = store.views_per_image
    assert len(samples) * num_views == len(rows)
    for i, sample in enumerate(samples):
        first = i * num_views
        assert {name for name in sample if not name.startswith("__")} == {"json", "npy"}
        assert sample["__key__"] == sample["json"]["image_id"] == rows.image_id[first]
        assert sample["json"]["label"] == (None if rows.label[first] < 0 else rows.label[first])
        assert sample["json"]["pixel_hash"] == [
            int(rows.pixel_hash[j]) if rows.has_pixel_hash[j] else None for j in range(first, first + num_views)
        ]
        labels = sample["npy"]
        assert labels.dtype.names == (*("view", "ids", "log_p", "log_tail", "box", "flip"),)
        assert labels["ids"].tolist() == rows.labels.ids_BK[first : first + num_views].tolist()
        np.testing.assert_array_equal(labels["log_p"], rows.labels.log_p_BK[first : first + num_views].half().numpy())
        np.testing.assert_array_equal(labels["box"], rows.box[first : first + num_views])


def test_stock_webdataset_reads_recipes_of_mixed_views(tmp_path):
    plan = ViewPlan(policy="randaugment", mix="cutmix")
    store = small_store(str(tmp_path / "labels"), spec=_spec(plan=plan))
    [sample, *_] = _samples(tmp_path / "labels/labels/000000.tar")
    view = store.read(0).view_at(0)
    assert sample["json"]["ops"][0] == {
        "names": [name for name, _ in view.ops],
        "magnitudes": [x for _, magnitudes in view.ops for x in magnitudes],
    }
    assert sample["json"]["mix"][0]["partner"] == view.mix.partner


def test_with_images_a_label_shard_is_an_image_set_of_its_own(tmp_path):
    store = make_store(tmp_path, format="tar+images", num_images=7)
    source = open_source(store.location)
    images = {
        ref.image_id: data for name in source.shard_names() for ref, data in source.stream(name, source.scan(name)[1])
    }
    labelled = open_source(f"{store.url}/labels")
    found = {}
    for name in labelled.shard_names():
        _, refs = labelled.scan(name)
        assert all(ref.label is not None for ref in refs)
        found |= {ref.image_id: data for ref, data in labelled.stream(name, refs)}
    assert found == images
    [sample, *_] = _samples(f"{store.url}/labels/000000.tar", "pil")
    assert sample["jpg"].mode == "RGB"
    assert sample["cls"] == sample["json"]["label"]


def test_images_that_changed_while_they_were_labelled_stop_the_shard(tmp_path):
    store = make_store(tmp_path, num_images=4)
    from kddata.errors import SourceError
    from kddata.images import image_again

    rows, source = store.read(0), open_source(store.location)
    fetch = image_again(source, store.images[0].name)
    place = {"offset": int(rows.offset[0]), "length": int(rows.length[0])}
    assert fetch(rows.image_id[0], **place, image_hash=int(rows.image_hash[0]))[0] == "jpg"
    with pytest.raises(SourceError, match=r"is the one that was labelled; got other bytes under 'image-00000'"):
        fetch(rows.image_id[0], **place, image_hash=1)
    begun = begin_small_store("memory://tar/no-images", spec=_spec(format="tar+images"))
    unit = begun.units()[0]
    with pytest.raises(StoreError, match=r"tar\+images is given the images"):
        begun.write_unit(unit, [made_up_rows(begun, unit)])


@given(
    ids=st.lists(
        st.text(st.sampled_from("ab./_%\\A\u00e9 "), min_size=1, max_size=8) | st.text(min_size=1, max_size=4),
        min_size=2,
        max_size=9,
        unique=True,
    )
)
def test_keys_are_safe_and_distinct(ids):
    keys = [tar.key_of(image_id) for image_id in ids]
    assert len(set(keys)) == len(ids)
    for key in keys:
        assert not key.startswith(("/", "__"))
        assert not {"", ".", ".."} & set(key.split("/"))
        assert "." not in key.rpartition("/")[2], "webdataset splits names at the first dot of the last part"
        assert "\0" not in key


@pytest.mark.parametrize(
    ("image_id", "key"),
    [
        ("class-3/n01.JPEG", "class-3/n01%2EJPEG"),
        ("a.b/c", "a.b/c"),
        ("../etc/passwd", "%2E%2E%2Fetc%2Fpasswd"),
        ("/etc/passwd", "%2Fetc%2Fpasswd"),
        ("__x__/y", "%5F%5Fx%5F%5F%2Fy"),
        ("100%", "100%25"),
        ("bild-\u00e9", "bild-\u00e9"),
    ],
)
def test_keys(image_id, key):
    assert tar.key_of(image_id) == key


@pytest.mark.parametrize("count", [1, 9, 10, 12345])
def test_arrays_have_the_header_that_numpy_writes(count):
    dtype = np.dtype([("view", "<i4"), ("ids", "<u2", (3,)), ("log_p", "<f2", (1,)), ("flip", "?")])
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros(count, dtype), version=(1, 0), allow_pickle=False)
    assert tar._npy_header(dtype, count) == file.getvalue()[: -count * dtype.itemsize]


# -- hostile files ----------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return sys.exit, ("a pickle was run",)


@pytest.fixture(scope="module")
def store():
    return small_store("memory://tar/hostile", spec=_spec())


@pytest.fixture(scope="module")
def members(store):
    """(member, its bytes) of a sound shard: about, then JSON and array of each image."""
    with tarfile.open(fileobj=io.BytesIO(store.storage.read("labels/000000.tar"))) as sound:
        return [(member, sound.extractfile(member).read()) for member in sound.getmembers()]


def _tar(members, **form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form.get("format", tarfile.GNU_FORMAT)) as out:
        for member, data in members:
            out.addfile(member, io.BytesIO(data))
    return file.getvalue().rstrip(b"\0") + bytes(-len(file.getvalue().rstrip(b"\0")) % 512 + 1024)


def _member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = fields.pop("size", len(data))
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def _object_array():
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    return file.getvalue()


def _changed(data, **facts):
    return json.dumps({**json.loads(data), **facts}).encode()


HOSTILE = {
    "a name with ..": lambda m: [*m, _member("../../escaped.json", b"{}")],
    "an absolute name": lambda m: [*m, _member("/escaped.json", b"{}")],
    "a name of ours, moved up": lambda m: [m[0], _member("../" + m[1][0].name, m[1][1]), *m[2:]],
    "a symlink": lambda m: [*m, _member("x.json", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a hard link": lambda m: [*m, _member("x.json", type=tarfile.LNKTYPE, linkname=m[1][0].name)],
    "a symlink for an array": lambda m: [*m[:2], _member(m[2][0].name, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a device": lambda m: [*m, _member("x.json", type=tarfile.CHRTYPE)],
    "a fifo": lambda m: [*m, _member("x.json", type=tarfile.FIFOTYPE)],
    "a folder": lambda m: [*m, _member("x", type=tarfile.DIRTYPE)],
    "a pickle": lambda m: [*m[:3], _member("x.pkl", pickle.dumps(Bomb())), *m[3:]],
    "a pickle in a sample": lambda m: [*m[:3], _member(m[1][0].name[:-4] + "pyd", pickle.dumps(Bomb())), *m[3:]],
    "a pickle for JSON": lambda m: [m[0], _member(m[1][0].name, pickle.dumps(Bomb())), *m[2:]],
    "an array of objects": lambda m: [*m[:2], _member(m[2][0].name, _object_array()), *m[3:]],
    "an array of another type": lambda m: [
        *m[:2],
        _member(m[2][0].name, m[2][1].replace(b"<f2", b"<i2")),
        *m[3:],
    ],
    "an array header that is code": lambda m: [
        *m[:2],
        _member(m[2][0].name, m[2][1].replace(b"{'descr'", b"(exit(),")),
        *m[3:],
    ],
    "an array cut short": lambda m: [*m[:2], _member(m[2][0].name, m[2][1][:-1]), *m[3:]],
    "an array without records": lambda m: [*m[:2], _member(m[2][0].name, b""), *m[3:]],
    "an image without its array": lambda m: [*m[:2], *m[3:]],
    "an array without its image": lambda m: [m[0], *m[2:]],
    "an image twice": lambda m: [*m[:3], *m[1:3], *m[3:]],
    "the key of another image": lambda m: [m[0], _member(m[1][0].name, m[3][1]), *m[2:]],
    "no word about itself": lambda m: m[1:],
    "words about itself twice": lambda m: [m[0], *m],
    "JSON without end": lambda m: [m[0], _member(m[1][0].name, b"[" * 200_000), *m[2:]],
    "a number of 9,999 digits": lambda m: [m[0], _member(m[1][0].name, b'{"label":' + b"9" * 9999 + b"}"), *m[2:]],
    "a class that is text": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], label="x")), *m[2:]],
    "a class out of range": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], label=2**40)), *m[2:]],
    "a null offset": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], offset=None)), *m[2:]],
    "a fact too many": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], x=1)), *m[2:]],
    "too few hashes": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], pixel_hash=[])), *m[2:]],
    "an id that is no text": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], image_id=[1])), *m[2:]],
    "half a character": lambda m: [m[0], _member(m[1][0].name, _changed(m[1][1], image_id="/\ud800")), *m[2:]],
    "views without end": lambda m: [_member(m[0][0].name, _changed(m[0][1], views=[0, 2**62])), *m[1:]],
    "views that are none": lambda m: [_member(m[0][0].name, _changed(m[0][1], views=[0, True])), *m[1:]],
    "another time": lambda m: [_member(m[0][0].name, m[0][1], mtime=1), *m[1:]],
    "an owner": lambda m: [_member(m[0][0].name, m[0][1], uname="root"), *m[1:]],
    "a program": lambda m: [_member(m[0][0].name, m[0][1], mode=0o4755), *m[1:]],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_refused_and_nothing_is_run_or_written(what, store, members, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = _tar(HOSTILE[what](members))
    assert data != store.storage.read("labels/000000.tar")
    with pytest.raises(StoreDamagedError, match="shard 0"):
        formats.read_labels(data, store.spec, 0, where="shard 0")
    assert list(tmp_path.iterdir()) == []


def test_the_hostile_tars_are_hostile_by_their_change_alone(store, members):
    assert _tar(members) == store.storage.read("labels/000000.tar")


@pytest.mark.parametrize("size", [2**33, 2**62, 10**6])
def test_a_size_past_the_end_allocates_nothing(size, store, members):
    about, _ = members[0]
    header = tar._header(about.name, size)
    tracemalloc.start()
    with pytest.raises(StoreDamagedError, match=f"of {size} bytes, where"):
        formats.read_labels(header + b"x" * 4096, store.spec, 0, where="shard 0")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_pax_and_sparse_headers_are_none_of_ours(form, store, members):
    info = tarfile.TarInfo("x" * 90 + "/" + "y" * 90 + ".json")
    with pytest.raises(StoreDamagedError, match="holds what its format writes"):
        formats.read_labels(_tar([*members, (info, b"")], format=form), store.spec, 0, where="shard 0")


def test_a_hostile_shard_with_the_right_hash_in_the_manifest_is_refused_too(members):
    """What an attacker who writes the whole store can do: the hashes fit, and the file is still not taken."""
    import hashlib

    from kddata.store.naming import MANIFEST, twin
    from kddata.store.sealing import seal, unseal

    store = small_store("memory://tar/attacker", spec=_spec())
    data = _tar(HOSTILE["a pickle in a sample"](members))
    with store.storage.replacing("labels/000000.tar") as out:
        out.write(data)
    record = unseal(store.storage.read(MANIFEST), where="")
    record["units"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record["totals"]["bytes"] = sum(unit["bytes"] for unit in record["units"])
    for name in (MANIFEST, twin(MANIFEST)):
        with store.storage.replacing(name) as out:
            out.write(seal(record))
    assert store.verify() == []
    with pytest.raises(StoreDamagedError, match=r"000000\.tar.*"):
        LabelStore.open(store.url).read(0)


def test_views_of_an_image_that_disagree_are_no_sample():
    store = begin_small_store("memory://tar/disagree", spec=_spec())
    unit = store.units()[0]
    rows = made_up_rows(store, unit)
    rows.offset[1] += 1
    with pytest.raises(
        StoreError, match=r"all views of an image have one offset; got \[0, 1, 0\] \(in 0/bild-\u00e9-0\)"
    ):
        formats.write_labels(HashingWriter(lambda data: None), store.spec, unit, [rows], image_bytes=made_up_image)
