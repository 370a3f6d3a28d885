"""Labelling in-process: the right rows, the same bytes however it is cut or stopped, bad input named and bounded."""

import dataclasses
import pickle
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from kddata.errors import (
    BadImageBudgetError,
    ConfigError,
    SourceError,
    StoreMismatchError,
    StoreMissingError,
    TeacherError,
)
from kddata.images import decode, image_hash, open_source
from kddata.labelling import (
    LabellingJob,
    finish,
    label_store,
    label_unit,
    load_job_teacher,
    missing_units,
    prepare,
    unit,
)
from kddata.labels import SoftLabels
from kddata.store import LabelRows, LabelStore
from kddata.testing import FakeNetwork, encode, fake_teacher_args, make_images, small_image, write_tar
from kddata.views import ViewPlan, pixel_hash, render


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), num_images=12)


def _job(images, store, **changes):
    values = {
        "images": images,
        "store": str(store),
        "teacher": fake_teacher_args(),
        "plan": ViewPlan(seed=3),
        "views_per_image": 3,
        "k": 4,
        "temperatures": (1.0, 4.0),
        "unit_images": 4,
        "batch_size": 5,
    }
    return LabellingJob(**{**values, **changes})


def _files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def _rows(store):
    return LabelRows.concat([store.read(number) for number in range(len(store.units()))])


def _by_view(store):
    rows = _rows(store)
    return {
        (rows.image_id[i], int(rows.view[i])): (
            rows.view_at(i),
            rows.labels.ids_BK[i].tolist(),
            rows.labels.log_p_BK[i].tolist(),
            rows.labels.log_tail_BT[i].tolist(),
        )
        for i in range(len(rows))
    }


# -- the right rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tar", "folder", "parquet"])
@pytest.mark.parametrize("labelled", [True, False])
def test_every_row_is_what_the_teacher_says_about_its_view(tmp_path, form, labelled):
    images = make_images(tmp_path / "images", num_images=7, form=form, labelled=labelled)
    job = _job(images, tmp_path / "store")
    rows = _rows(label_store(job).store)
    source, teacher = open_source(images), load_job_teacher(job)
    i = 0
    for number, name in enumerate(source.shard_names()):
        for ref, data in source.stream(name, source.scan(name)[1]):
            image = decode(data, max_pixels=10**6)
            for view_index in range(3):
                view = job.plan.draw(ref.image_id, view_index, *image.shape[1:])
                pixels = render(image, view, size_px=16, interpolation="bilinear")
                labels = SoftLabels.from_logits(teacher(pixels[None]), k=4, temperatures=(1.0, 4.0))
                assert (rows.image_id[i], rows.view[i], rows.view_at(i)) == (ref.image_id, view_index, view)
                assert rows.label[i] == (-1 if not labelled else ref.label)
                assert (rows.source[i], rows.offset[i], rows.length[i]) == (number, ref.offset, ref.length)
                assert rows.image_hash[i] == image_hash(data)
                assert rows.labels.ids_BK[i].tolist() == labels.ids_BK[0].tolist()
                assert rows.labels.log_p_BK[i].half().tolist() == labels.log_p_BK[0].half().tolist()
                assert rows.labels.log_tail_BT[i].tolist() == labels.log_tail_BT[0].tolist()
                if rows.has_pixel_hash[i]:
                    assert rows.pixel_hash[i] == pixel_hash(pixels)
                i += 1
    assert i == len(rows) == 21


def test_the_center_view_is_labelled_and_keeps_its_resize(images, tmp_path):
    plan = ViewPlan(policy="center", center_px=16, interpolation="bicubic")
    rows = _rows(label_store(_job(images, tmp_path / "store", plan=plan, views_per_image=1)).store)
    assert rows.resize is not None
    assert rows.resize.min(axis=1).tolist() == [18] * 12
    assert set(map(tuple, rows.box[:, 2:].tolist())) == {(16, 16)}


def test_pixel_hashes_are_sampled_with_one_a_unit_at_least(images, tmp_path):
    store = label_store(_job(images, tmp_path / "store", views_per_image=40, unit_views=8)).store
    per_unit = [int(store.read(number).has_pixel_hash.sum()) for number in range(len(store.units()))]
    assert min(per_unit) >= 1
    assert len(per_unit) <= sum(per_unit) <= len(per_unit) + 480 / 64 * 3  # about one of 64 rows beside the first


def test_an_image_is_decoded_once_for_all_its_views(images, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(unit, "decode", lambda data, **limits: decoded.append(data) or decode(data, **limits))
    label_store(_job(images, tmp_path / "store", views_per_image=9))
    assert len(decoded) == 12


def test_memory_holds_two_batches_whatever_the_unit(tmp_path):
    images = make_images(tmp_path / "images", num_images=60, shards=1)
    job = _job(images, tmp_path / "store", views_per_image=2, unit_images=60, batch_size=4)
    store, teacher, source = prepare(job), load_job_teacher(job), open_source(images)
    ahead, read, answered = [], [0], [0]

    class Counting:
        def stream(self, name, refs):
            for item in source.stream(name, refs):
                read[0] += 1
                ahead.append(read[0] * 2 - answered[0])  # views of images read so far that are not answered yet
                yield item

    class Answering:
        card = teacher.card

        def __call__(self, pixels):
            answered[0] += len(pixels)
            return teacher(pixels)

    receipt = label_unit(store, store.units()[0], Counting(), Answering())
    assert receipt.rows == answered[0] == 120
    assert max(ahead) <= 3 * 4  # the batch in use, the one made ahead, the image that begins the next


# -- the same bytes ---------------------------------------------------------------------------------------------------


def test_two_runs_write_the_same_bytes(images, tmp_path):
    for name in ("one", "other"):
        label_store(_job(images, tmp_path / name))
    assert _files(tmp_path / "one") == _files(tmp_path / "other")
    assert len(_files(tmp_path / "one")) > 6


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(images, tmp_path, stop_after):
    undisturbed = label_store(_job(images, tmp_path / "undisturbed"))
    assert undisturbed.new_units == 4
    job, receipts = _job(images, tmp_path / "stopped"), []

    def stop(receipt):
        receipts.append(receipt)
        if len(receipts) > stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_store(job, on_receipt=stop)
    with pytest.raises(StoreMissingError, match="run the same label command again"):
        LabelStore.open(job.store)
    assert len(missing_units(prepare(job))) == 4 - stop_after - 1
    outcome = label_store(job, on_receipt=receipts.append)
    assert outcome.new_units == 4 - stop_after - 1
    assert [receipt.unit for receipt in receipts] == [0, 1, 2, 3]
    assert _files(tmp_path / "stopped") == _files(tmp_path / "undisturbed")


def test_a_finished_run_does_nothing_and_says_so(images, tmp_path, caplog):
    job = _job(images, tmp_path / "store")
    label_store(job)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    with caplog.at_level("INFO", logger="kddata"):
        outcome = label_store(job, on_receipt=lambda receipt: pytest.fail("labelled again"))
    assert outcome.new_units == 0
    assert outcome.store.num_rows == 36
    assert "is finished: nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


def test_units_may_be_labelled_in_any_order(images, tmp_path):
    label_store(_job(images, tmp_path / "one"))
    job = _job(images, tmp_path / "other")
    store, source, teacher = prepare(job), open_source(images), load_job_teacher(job)
    for one in reversed(missing_units(store)):
        label_unit(pickle.loads(pickle.dumps(store)), one, pickle.loads(pickle.dumps(source)), teacher)
    finish(store, limit=0)
    assert _files(tmp_path / "one") == _files(tmp_path / "other")


def test_labels_do_not_depend_on_how_units_are_cut(images, tmp_path):
    """A convolutional teacher here: its last bits would show a dependence on the batch."""
    teacher = dataclasses.replace(fake_teacher_args(), arch="python:kddata.nets:small_resnet")
    cuts = [{}, {"unit_images": 5, "unit_views": 1}, {"unit_images": 100}, {"unit_images": 1}]
    stores = [label_store(_job(images, tmp_path / str(i), teacher=teacher, **cut)).store for i, cut in enumerate(cuts)]
    assert _by_view(stores[0]) == _by_view(stores[1]) == _by_view(stores[2]) == _by_view(stores[3])
    assert [len(store.units()) for store in stores] == [4, 12, 2, 12]


def test_more_views_keep_the_ones_there_were(images, tmp_path):
    few, many = (label_store(_job(images, tmp_path / str(v), views_per_image=v)).store for v in (2, 5))
    assert _by_view(few).items() <= _by_view(many).items()


def test_a_job_can_be_sent_to_another_process(images, tmp_path):
    job = _job(images, tmp_path / "store")
    assert pickle.loads(pickle.dumps(job)) == job


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Eight good images and four broken ones; the last is cut off with its tar."""
    good = [encode(small_image(i % 4, height_px=30, width_px=24 + i)) for i in range(8)]
    bad = {"a-text": b"this is no image", "b-empty": b"", "c-cut": good[0][:300]}
    members = [(f"good-{i}.jpg", data) for i, data in enumerate(good)]
    members[2:2] = [(f"{key}.jpg", data) for key, data in bad.items()]
    write_tar(tmp_path / "broken.tar", [*members, ("z-last.jpg", good[1])])
    whole = (tmp_path / "broken.tar").read_bytes()
    at = whole.rindex(good[1])
    (tmp_path / "broken.tar").write_bytes(whole[: at + len(good[1]) // 2])
    return str(tmp_path / "broken.tar")


BROKEN = ["a-text", "b-empty", "c-cut", "z-last"]


def test_broken_images_are_counted_listed_and_left_out(broken, tmp_path):
    outcome = label_store(_job(broken, tmp_path / "store", bad_images=0.34))
    bad = dict(outcome.store.manifest["bad"])
    assert sorted(bad) == BROKEN
    assert "zero bytes" in bad["b-empty"]
    assert "no known image format" in bad["a-text"]
    assert all("0x" not in reason and str(tmp_path) not in reason for reason in bad.values()), "the same in any process"
    assert outcome.store.num_rows == 8 * 3
    assert {image_id for image_id, _ in _by_view(outcome.store)} == {f"good-{i}" for i in range(8)}
    again = label_store(_job(broken, tmp_path / "again", bad_images=0.34))
    assert again.store.manifest["bad"] == outcome.store.manifest["bad"]


def test_past_the_limit_the_job_fails_and_finished_units_stay(broken, tmp_path):
    job = _job(broken, tmp_path / "store", bad_images=0.2)
    receipts = []
    with pytest.raises(BadImageBudgetError) as caught:
        label_store(job, on_receipt=receipts.append)
    message = str(caught.value)
    assert message.startswith("at most 0.2 of 12 images may be bad (limits.bad_images); got 3 so far, such as a-text: ")
    assert str(tmp_path / "store") in message
    assert "raise the limit and run this again; finished units are kept" in message
    assert [receipt.unit for receipt in receipts] == [0, 1]
    with pytest.raises(BadImageBudgetError):  # at once: the receipts say it
        label_store(job, on_receipt=lambda receipt: pytest.fail("went on past the limit"))
    outcome = label_store(dataclasses.replace(job, bad_images=0.5), on_receipt=receipts.append)
    assert [receipt.unit for receipt in receipts] == [0, 1, 2]
    assert outcome.store.info() is not None


def test_finish_keeps_the_limit(broken, tmp_path):
    job = _job(broken, tmp_path / "store")
    store, source, teacher = prepare(job), open_source(broken), load_job_teacher(job)
    for one in store.units():
        label_unit(store, one, source, teacher)
    with pytest.raises(BadImageBudgetError, match="got 4 so far"):
        finish(store, limit=0.3)
    assert prepare(job).manifest is None


def test_a_unit_of_bad_images_alone(tmp_path):
    write_tar(tmp_path / "bad.tar", [(f"{i}.jpg", b"no") for i in range(6)])
    images = [make_images(tmp_path / "good", num_images=4, shards=1).replace("{00000..00000}", "00000")]
    images.append(str(tmp_path / "bad.tar"))
    store = label_store(_job(tuple(images), tmp_path / "store", bad_images=0.6)).store
    assert store.rows_per_unit.tolist() == [12, 0, 0]
    assert len(store.read(1)) == 0


def test_an_image_over_the_pixel_limit_is_a_bad_image(images, tmp_path):
    with pytest.raises(BadImageBudgetError, match="an image has at most 900 pixels"):
        label_store(_job(images, tmp_path / "store", max_pixels=900))


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_an_image_of_too_many_bytes_is_never_read(tmp_path, monkeypatch, form):
    images = make_images(tmp_path / "images", num_images=6, form=form)
    source = open_source(images)
    lengths = [ref.length for name in source.shard_names() for ref in source.scan(name)[1]]
    monkeypatch.setattr(f"kddata.images.{form}.MAX_IMAGE_BYTES", max(lengths) - 1)
    store = label_store(_job(images, tmp_path / "store", bad_images=0.5)).store
    (found,) = store.info()["bad"]
    assert "more than 1 GiB" in found[1]
    largest = [ref.image_id for name in source.shard_names() for ref in source.scan(name)[1] if not ref.length]
    assert largest == [found[0]]


def test_a_thin_strip_that_would_become_huge_is_a_bad_image(tmp_path):
    strip = encode(np.zeros((1, 3000, 3), np.uint8), "png")
    write_tar(tmp_path / "strip.tar", [("strip.png", strip)])
    plan = ViewPlan(policy="center", center_px=224)
    job = _job(str(tmp_path / "strip.tar"), tmp_path / "store", plan=plan, views_per_image=1, bad_images=1.0)
    job = dataclasses.replace(job, teacher=fake_teacher_args(size_px=224), max_pixels=10**8)
    ((image_id, reason),) = label_store(job).store.manifest["bad"]
    assert image_id == "strip"
    assert "resized for its view has at most 100000000 pixels" in reason
    assert "3000 x 1, resized to 768000 x 256" in reason


def test_an_id_in_two_shards_is_named(tmp_path):
    data = encode(small_image(0, height_px=20, width_px=20))
    write_tar(tmp_path / "a.tar", [("x/1.jpg", data), ("x/2.jpg", data)])
    write_tar(tmp_path / "b.tar", [("x/3.jpg", data), ("x/2.jpg", data)])
    job = _job((str(tmp_path / "a.tar"), str(tmp_path / "b.tar")), tmp_path / "store")
    for _ in range(2):  # the second time the index is sealed already
        with pytest.raises(SourceError, match=r"an image id occurs once; got 'x/2' in a.tar and b.tar"):
            label_store(job)


def test_no_images_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        label_store(_job(str(tmp_path / "empty"), tmp_path / "store"))
    with pytest.raises(SourceError, match="nowhere"):
        label_store(_job(str(tmp_path / "nowhere.tar"), tmp_path / "other"))
    assert not (tmp_path / "other").exists()  # so that the command may be corrected and run again


def test_image_shards_are_scanned_several_at_once_and_indexed_in_order(tmp_path, monkeypatch):
    images = make_images(tmp_path / "images", num_images=12, shards=4)
    source = open_source(images)
    together = threading.Barrier(4, timeout=30)

    class Slow:
        location, kind, shard_names = source.location, source.kind, source.shard_names

        def scan(self, name):
            together.wait()
            return source.scan(name)

    monkeypatch.setattr("kddata.labelling.job.open_source", lambda images: Slow())
    store = prepare(_job(images, tmp_path / "together"))
    assert [shard.name for shard in store.images] == source.shard_names()
    monkeypatch.undo()
    monkeypatch.setattr("kddata.labelling.job._SCANS_AHEAD", 0)
    prepare(_job(images, tmp_path / "in turn"))
    assert _files(tmp_path / "together") == _files(tmp_path / "in turn")


def test_indexing_that_died_goes_on(images, tmp_path, monkeypatch):
    job, scanned = _job(images, tmp_path / "store"), []
    source = type(open_source(images))
    scan = source.scan

    def dying(self, name):
        scanned.append(name)
        if len(scanned) == 2:
            raise KeyboardInterrupt
        return scan(self, name)

    monkeypatch.setattr(source, "scan", dying)
    monkeypatch.setattr("kddata.labelling.job._SCANS_AHEAD", 0)
    with pytest.raises(KeyboardInterrupt):
        prepare(job)
    label_store(job)
    assert scanned == ["00000.tar", "00001.tar", "00001.tar"]
    label_store(_job(images, tmp_path / "undisturbed"))
    assert _files(tmp_path / "store") == _files(tmp_path / "undisturbed")


def test_images_that_changed_since_indexing_are_no_bad_images(tmp_path):
    images = make_images(tmp_path / "images", num_images=6)
    job = _job(images, tmp_path / "store", bad_images=1.0)
    prepare(job)
    (tmp_path / "images" / "00001.tar").write_bytes(b"short")
    with pytest.raises(SourceError, match=r"00001\.tar"):
        label_store(job)
    assert len(missing_units(prepare(job))) == 1


class _Nan(FakeNetwork):
    def forward(self, x):
        logits = super().forward(x)
        logits[x.flatten(1).mean(1) > 0.2, 3] = float("nan")  # not on the black view that loading asks about
        return logits


def test_answers_that_are_nan_name_images(images, tmp_path, monkeypatch):
    module = types.ModuleType("user_code")
    module.nan = _Nan
    monkeypatch.setitem(sys.modules, "user_code", module)
    job = _job(
        images, tmp_path / "store", teacher=dataclasses.replace(fake_teacher_args(), arch="python:user_code:nan")
    )
    with pytest.raises(TeacherError) as caught:
        label_store(job)
    message = str(caught.value)
    assert message.startswith(
        "a teacher's logits are finite, or -inf in some classes; got NaN or infinity for image-0000"
    )
    assert "(view 0)" in message
    assert "unit 0, python:user_code:nan" in message
    assert missing_units(prepare(job)) == list(prepare(job).units())
    assert not list((tmp_path / "store" / "labels").glob("*.arrow"))


def test_answers_of_another_width_are_refused(images, tmp_path):
    job = _job(images, tmp_path / "store")
    store = prepare(job)

    class Wide:
        card = store.spec.teacher

        def __call__(self, pixels):
            return torch.zeros(len(pixels), 11)

    with pytest.raises(TeacherError, match=r"of 10 classes answers 5 views .*\(5, 10\); got \(5, 11\)"):
        label_unit(store, store.units()[0], open_source(images), Wide())


def test_another_teacher_than_the_stores_is_refused(images, tmp_path):
    job = _job(images, tmp_path / "store")
    store = prepare(job)
    other = load_job_teacher(dataclasses.replace(job, teacher=fake_teacher_args(num_classes=9)))
    with pytest.raises(StoreMismatchError, match="labelled by the one teacher of its spec; got python:kddata"):
        label_unit(store, store.units()[0], open_source(images), other)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 5}, "k: stored 4, asked 5"),
        ({"plan": ViewPlan(seed=4)}, "plan.seed: stored 3, asked 4"),
        ({"views_per_image": 4}, "views_per_image: stored 3, asked 4"),
        ({"teacher": fake_teacher_args(size_px=20)}, "teacher.size_px: stored 16, asked 20"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_another_spec_is_refused_and_kept(images, tmp_path, change, field, finished):
    job = _job(images, tmp_path / "store")
    if finished:
        label_store(job)
    else:
        prepare(job)
    before = _files(tmp_path / "store")
    with pytest.raises(StoreMismatchError) as caught:
        label_store(dataclasses.replace(job, **change))
    assert field in str(caught.value)
    assert _files(tmp_path / "store") == before


def test_more_kept_classes_than_there_are(images, tmp_path):
    with pytest.raises(ConfigError, match=r"labels\.k is between 1 and the teacher's 10 classes; got 11"):
        label_store(_job(images, tmp_path / "store", k=11))
    assert not (tmp_path / "store").exists()


def test_all_classes_may_be_kept(images, tmp_path):
    rows = _rows(label_store(_job(images, tmp_path / "store", k=10)).store)
    assert bool((rows.labels.log_tail_BT == -torch.inf).all())
    rows.labels.at(3.7)
