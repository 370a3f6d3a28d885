"""What a store promises, wherever it lies: the same tests on local disk, in memory and on S3 over real HTTP."""

import dataclasses
import pickle
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kddata import errors
from kddata.store import LabelStore, Problem, open_storage, verify_store
from kddata.store.naming import MANIFEST, labels_name, receipt_name
from kddata.store.sealing import seal, unseal
from kddata.testing import begin_small_store, made_up_rows, small_spec, small_store


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    """A fresh place for a store, with signs in its name that could be taken for a pattern."""
    name = f"a [b]* c/{uuid.uuid4().hex}"
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/{name}"
    return str(tmp_path / name) if request.param == "local" else f"memory://{name}"


def _contents(url):
    storage = open_storage(url)
    return {name: storage.read(name) for name in storage.sizes()}


def _write(store, unit):
    return store.write_unit(unit, [made_up_rows(store, unit)])


def _assert_rows_equal(found, wanted):
    for field in dataclasses.fields(wanted):
        mine, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if field.name == "labels":
            assert mine.ids_BK.tolist() == theirs.ids_BK.tolist()
            np.testing.assert_array_equal(mine.log_p_BK.numpy(), theirs.log_p_BK.half().float().numpy())
            np.testing.assert_array_equal(mine.log_tail_BT.numpy(), theirs.log_tail_BT.numpy())
        elif field.name == "pixel_hash":
            np.testing.assert_array_equal(mine, np.where(wanted.has_pixel_hash, theirs, 0))
        else:
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


# -- storage ----------------------------------------------------------------------------------------------------------


def test_of_several_writers_of_one_name_one_wins_and_its_bytes_stay(url):
    storage = open_storage(url)
    storage.create("warm", b"")
    for key in range(20):
        barrier = threading.Barrier(16)

        def write(writer, key=key, barrier=barrier):
            barrier.wait()
            return storage.create(f"keys/{key}", b"%d" % writer)

        with ThreadPoolExecutor(16) as pool:
            won = [writer for writer, created in enumerate(pool.map(write, range(16))) if created]
        assert len(won) == 1
        assert storage.read(f"keys/{key}") == b"%d" % won[0]
    assert list(storage.sizes("keys")) == sorted(f"keys/{key}" for key in range(20)), "temporary files were left"


def test_a_stream_is_seen_whole_or_not_at_all(url):
    storage = open_storage(url)
    with storage.replacing("a/b") as out:
        out.write(b"one")
        out.write(memoryview(b"two"))
        assert storage.sizes("a").get("a/b") is None
    assert (out.num_bytes, storage.read("a/b")) == (6, b"onetwo")

    def die_half_way():
        with storage.replacing("a/b") as out:
            out.write(b"half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        die_half_way()
    assert storage.sizes() == {"a/b": 6}
    with storage.replacing("a/b") as out:
        out.write(b"3")
    assert b"".join(storage.chunks("a/b")) == b"3"


def test_removing_what_is_not_there_is_no_error(url):
    storage = open_storage(url)
    storage.remove("nothing")
    storage.remove_folder("nothing")
    assert storage.sizes() == storage.sizes("nothing") == {}
    storage.create("some/thing", b"x")
    storage.create("something", b"x")
    storage.remove_folder("some")
    assert storage.sizes() == {"something": 1}
    with pytest.raises(FileNotFoundError):
        storage.read("some/thing")
    with pytest.raises(FileNotFoundError):
        list(storage.chunks("some/thing"))


def test_a_listing_streams_what_lies_below_a_folder(url, monkeypatch):
    monkeypatch.setattr("kddata.store.s3._PAGE_NAMES", 2)
    storage = open_storage(url)
    names = ["a/b/c", *(f"a/{i}" for i in range(7)), "ab"]
    for name in names:
        storage.create(name, name.encode())
    assert sorted(storage.listing()) == sorted((name, len(name)) for name in names)
    assert sorted(name for name, _ in storage.listing("a")) == sorted(names[:-1])
    assert list(storage.listing("b")) == []
    storage.remove_folder("a/b")
    storage.remove_folder("a")
    assert list(storage.listing()) == [("ab", 2)]


# -- a store's life ---------------------------------------------------------------------------------------------------


def test_a_store_gives_back_what_was_written(url):
    store = begin_small_store(url)
    wanted = {unit.number: made_up_rows(store, unit) for unit in store.units()}
    for unit in reversed(store.units()):
        receipt = store.write_unit(
            unit, [wanted[unit.number].take(slice(0, 1)), wanted[unit.number].take(slice(1, 99))]
        )
        assert (receipt.unit, receipt.rows) == (unit.number, len(wanted[unit.number]))
    assert {receipt.unit for receipt in store.receipts()} == set(wanted)
    manifest = store.commit()
    opened = pickle.loads(pickle.dumps(LabelStore.open(url)))
    assert opened.manifest == manifest
    assert list(opened.units()) == list(store.units())
    assert opened.rows_per_unit.tolist() == [len(rows) for rows in wanted.values()]
    assert opened.num_rows == 27
    assert (opened.location, opened.kind, opened.views_per_image) == ("made up", "tar", 3)
    for number, rows in wanted.items():
        _assert_rows_equal(opened.read(number), rows)
    assert opened.verify() == []


def test_files_depend_on_nothing_but_the_rows(url):
    """Neither the place, nor the order of units, nor the pieces in which rows come, nor an earlier attempt."""
    other = small_store(f"memory://{uuid.uuid4().hex}")
    store = begin_small_store(url)
    for unit in reversed(store.units()):
        rows = made_up_rows(store, unit)
        store.write_unit(unit, (rows.take([i]) for i in range(len(rows))))
    store.commit()
    assert _contents(url) == _contents(other.url)


@pytest.mark.parametrize("done", [0, 3, 6, 7])
def test_labelling_goes_on_where_receipts_end(url, done):
    """Stop before, between and after units, with an unacknowledged shard behind, or after the commit."""
    undisturbed = small_store(f"memory://{uuid.uuid4().hex}")
    store = begin_small_store(url)
    for unit in store.units()[:done]:
        _write(store, unit)
    if done < len(store.units()):
        with store.storage.replacing(labels_name(done)) as out:
            out.write(b"finished, and its writer died before the receipt")
        with pytest.raises(errors.StoreError):
            store.write_unit(store.units()[done], [made_up_rows(store, store.units()[done]).take(slice(1, None))])
    else:
        store.commit()
    if done == 7:  # the writer died after the manifest and before its receipts were gone
        store.storage.create(receipt_name(0), b"left behind")
    again = begin_small_store(url)
    finished = {x.unit: x for x in again.receipts()} if again.manifest is None else {}
    assert sorted(finished) == (list(range(done)) if done < 6 else [])
    for unit in again.units() if again.manifest is None else []:
        if unit.number not in finished:
            _write(again, unit)
    again.commit()
    assert _contents(url) == _contents(undisturbed.url)


def test_a_finished_unit_is_not_read_again(url):
    store = begin_small_store(url)
    first = _write(store, store.units()[0])

    def rows():
        pytest.fail("rows of a finished unit were asked for")
        yield

    assert store.write_unit(store.units()[0], rows()) == first


def test_committing_twice_changes_nothing_and_a_committed_store_takes_no_more(url):
    store = small_store(url)
    before = _contents(url)
    assert begin_small_store(url).commit() == store.commit() == store.manifest
    assert _contents(url) == before
    assert list(store.receipts()) == []
    with pytest.raises(errors.StoreError, match="a committed store does not change"):
        _write(store, store.units()[0])
    with pytest.raises(errors.StoreError, match="images are indexed before the first unit"):
        store.write_index(9, name="x", size_bytes=None, ids=[], labels=[], offsets=[], lengths=[])


def test_a_store_with_units_missing_is_neither_committed_nor_opened(url):
    store = begin_small_store(url)
    for number in (0, 2):
        _write(store, store.units()[number])
    with pytest.raises(errors.StoreMissingError, match="every unit is finished; got 4 of 6 are not, the first is 1"):
        store.commit()
    with pytest.raises(errors.StoreMissingError, match=r"2 finished units and no manifest.*run the same"):
        LabelStore.open(url)
    with pytest.raises(errors.StoreMissingError, match="labelling has finished"):
        store.read(0)
    assert MANIFEST not in store.storage.sizes()


def test_a_finished_shard_that_vanished_stops_the_commit(url):
    store = begin_small_store(url)
    for unit in store.units():
        _write(store, unit)
    store.storage.remove(labels_name(3))
    with pytest.raises(errors.StoreDamagedError, match=r"no file.*000003\.arrow.*remove receipts/000003\.json"):
        store.commit()


def test_bad_images_are_left_out_and_listed(url):
    store = begin_small_store(url)
    broken = "0/bild-é-1"
    for unit in store.units():
        ids = store.read_index(unit)[0]
        bad: list[tuple[str, str]] = []

        def rows(unit=unit, ids=ids, bad=bad):
            if broken in ids:
                bad.append((broken, "truncated"))  # known only when the image is reached
            yield made_up_rows(store, unit, leave_out=(broken,))

        receipt = store.write_unit(unit, rows(), bad=bad)
        assert receipt.bad == tuple(bad)
        assert receipt.images == len(ids) - len(bad)
    manifest = store.commit()
    assert manifest["bad"] == [[broken, "truncated"]]
    assert (manifest["totals"]["bad_images"], manifest["totals"]["images"], manifest["totals"]["rows"]) == (1, 8, 24)
    assert LabelStore.open(url).info()["bad"] == [[broken, "truncated"]]


def test_a_unit_whose_images_are_all_bad_has_a_shard_without_rows(url):
    store = begin_small_store(url, images=(1, 2))
    for unit in store.units():
        ids = store.read_index(unit)[0] if unit.shard == 0 else []
        rows = made_up_rows(store, unit, leave_out=tuple(ids))
        store.write_unit(unit, [rows], bad=[(image_id, "not an image") for image_id in ids])
    store.commit()
    opened = LabelStore.open(url)
    assert opened.rows_per_unit.tolist() == [0, 0, 4, 2]
    assert len(opened.read(0)) == 0
    assert len(type(opened.read(0)).concat([opened.read(0), opened.read(2)])) == 4


def test_an_extension_is_a_new_generation_beside_the_old_files(url):
    begun = small_store(url)
    before = _contents(url)
    names = [shard.name for shard in begun.images]
    arguments = {"spec": begun.spec, "location": "made up", "kind": "tar", "names": [*names, "00003.tar"]}

    def extending(views_per_image=4):
        store = LabelStore.extend(url, views_per_image=views_per_image, **arguments)
        if store.manifest is None and 3 not in store.indexed_shards():
            columns = {"ids": ["3/new"], "labels": [1], "offsets": [0], "lengths": [9]}
            store.write_index(3, name="00003.tar", size_bytes=100, **columns)
            store.finish_index(arguments["names"])
        return store

    store = extending()
    assert [(unit.number, unit.shard, unit.view_start, unit.view_stop) for unit in store.units()] == [
        (6, 0, 3, 4),
        (7, 0, 3, 4),
        (8, 2, 3, 4),
        (9, 3, 0, 2),
        (10, 3, 2, 4),
    ]
    _write(store, store.units()[1])
    store = pickle.loads(pickle.dumps(extending()))  # in another process, after a stop
    assert [receipt.unit for receipt in store.receipts()] == [7]
    assert LabelStore.open(url).num_rows == 27, "readers see the former generation until the next is whole"
    with pytest.raises(errors.StoreMismatchError, match="views_per_image: stored 4, asked 5"):
        extending(5)
    for unit in store.units():
        _write(store, unit)
    store.commit()
    after = _contents(url)
    assert {name: after[name] for name in before} == before
    opened = LabelStore.open(url)
    assert (opened.num_rows, opened.views_per_image, opened.info()["generation"], opened.verify()) == (40, 4, 2, [])
    for unit in opened.units():
        _assert_rows_equal(opened.read(unit.number), made_up_rows(opened, unit))
    assert extending().manifest == opened.manifest
    assert _contents(url) == after


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_beginning_again_with_other_values_is_refused_and_each_field_named(url):
    spec = small_spec()
    begin_small_store(url)
    before = _contents(url)
    teacher = dataclasses.replace(spec.teacher, weights_sha256="1")
    plan = dataclasses.replace(spec.plan, seed=1)
    changed = [
        ({"spec": dataclasses.replace(spec, k=4)}, "k: stored 3, asked 4"),
        ({"spec": dataclasses.replace(spec, teacher=teacher)}, "teacher.weights_sha256: stored '0', asked '1'"),
        ({"spec": dataclasses.replace(spec, plan=plan)}, "plan.seed: stored 0, asked 1"),
        ({"location": "elsewhere"}, "images.location: stored 'made up', asked 'elsewhere'"),
        ({"kind": "folder"}, "images.kind: stored 'tar', asked 'folder'"),
        ({"views_per_image": 4}, "views_per_image: stored 3, asked 4"),
    ]
    for change, message in changed:
        arguments = {"spec": spec, "location": "made up", "kind": "tar", "views_per_image": 3, **change}
        with pytest.raises(errors.StoreMismatchError) as caught:
            LabelStore.begin(url, **arguments)
        assert message in str(caught.value)
        assert ";" not in str(caught.value.actual), "another field than the changed one was named"
    assert _contents(url) == before


def test_other_image_shards_are_refused_and_named(url):
    store = begin_small_store(url)
    with pytest.raises(errors.StoreMismatchError, match=r"number 1: stored '00001.tar', asked 'new.tar'"):
        store.finish_index(["00000.tar", "new.tar", "00002.tar"])
    with pytest.raises(errors.StoreMismatchError, match="stored 3 shards, asked 4"):
        store.finish_index([f"0000{i}.tar" for i in range(4)])


def test_a_folder_of_other_things_is_left_alone(url):
    open_storage(url).create("holiday.jpg", b"x")
    with pytest.raises(errors.StoreMismatchError, match=r"begins in an empty folder; got .*holiday\.jpg"):
        begin_small_store(url)
    assert _contents(url) == {"holiday.jpg": b"x"}


def test_nothing_there(url):
    for call in (LabelStore.open, verify_store):
        with pytest.raises(errors.StoreMissingError, match=r"is a folder with a manifest.*check the path"):
            call(url)


def test_a_newer_format_is_refused(url):
    small_store(url)
    storage = open_storage(url)
    for name in ("store.json", MANIFEST):
        newer = seal({**unseal(storage.read(name), where=""), "format_version": 3, "new": "thing"})
        storage.remove(name)
        storage.create(name, newer)
    for call in (LabelStore.open, begin_small_store):
        with pytest.raises(errors.StoreVersionError, match=r"versions up to 2; got version 3.*upgrade kddata"):
            call(url)
    assert [problem.file for problem in verify_store(url)] == [MANIFEST]


# -- damage -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_found_and_named(url):
    store = small_store(url)
    storage = store.storage
    whole = storage.read(labels_name(1))
    sizes = [unit["bytes"] for unit in store.manifest["units"]]
    with storage.replacing(labels_name(1)) as out:
        out.write(whole[:-8])
    with storage.replacing(labels_name(2)) as out:
        out.write(storage.read(labels_name(0)))
    storage.remove("index/00002.arrow")
    storage.create("labels/000077.arrow", b"x")
    assert {problem.file: problem.reason.split(":")[0] for problem in store.verify()} == {
        "index/00002.arrow": "missing",
        labels_name(1): f"has {len(whole) - 8} bytes instead of {len(whole)}",
        labels_name(2): f"has {sizes[0]} bytes instead of {sizes[2]}",
        "labels/000077.arrow": "extra",
    }
    for number in (1, 2):
        with pytest.raises(errors.StoreDamagedError, match=f"00000{number}.arrow"):
            store.read(number)
    with pytest.raises(errors.StoreDamagedError, match=r"no such file.*00002\.arrow"):
        LabelStore.open(url).read_index(store.units()[5])


def test_a_damaged_manifest_opens_nothing(url):
    store = small_store(url)
    data = store.storage.read(MANIFEST)
    with store.storage.replacing(MANIFEST) as out:
        out.write(data.replace(b'"rows":8', b'"rows":9', 1))
    with pytest.raises(errors.StoreDamagedError, match=f"has the bytes that were written.*{MANIFEST}"):
        LabelStore.open(url)
    [problem] = verify_store(url)
    assert isinstance(problem, Problem)
    assert problem.file == MANIFEST
