"""Care of real stores: repair to the same bytes, strays, merging, extending, replayed pixels, the teacher's audit."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kddata.care import audit, check_pixels, collect_garbage, merge, repair
from kddata.care.audit import compare
from kddata.errors import (
    ConfigError,
    KddataError,
    SourceError,
    StoreBusyError,
    StoreDamagedError,
    StoreMismatchError,
    StoreMissingError,
)
from kddata.images import open_source
from kddata.labelling import LabellingJob, label_store, label_unit, load_job_teacher, prepare
from kddata.labels import SoftLabels
from kddata.store import LabelStore, driving, entries, manifest, naming, verify_store
from kddata.testing import encode, fake_teacher_args, make_images, small_image, write_tar
from kddata.views import ViewPlan

STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of three images each; one image cannot be read."""
    root = tmp_path_factory.mktemp("images")
    make_images(root, num_images=12, shards=4)
    members = [(f"last-{i}.png", encode(small_image(i, height_px=24, width_px=30), "png")) for i in range(3)]
    write_tar(root / "00004.tar", [*members, ("broken.jpg", b"no image"), ("broken.cls", b"1")])
    return root


def job(
    images: Path, store: Path, *, shards: str | tuple[str, ...] = "{00000..00004}", **changes: object
) -> LabellingJob:
    values = {
        "images": f"{images}/{shards}.tar" if isinstance(shards, str) else tuple(f"{images}/{x}.tar" for x in shards),
        "store": str(store),
        "teacher": fake_teacher_args(),
        "plan": ViewPlan(seed=3),
        "views_per_image": 4,
        "k": 4,
        "temperatures": (1.0, 4.0),
        "unit_images": 2,
        "batch_size": 5,
        "bad_images": 1.0,
    }
    return LabellingJob(**{**values, **changes})  # type: ignore[arg-type]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("finished") / "store"
    label_store(job(images, store))
    return store


@pytest.fixture(params=["listed", "parts"])
def store(
    request: pytest.FixtureRequest, images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A finished store, whose manifest lists its units, or keeps them in a part."""
    if request.param == "listed":
        return Path(shutil.copytree(finished, tmp_path / "store"))
    monkeypatch.setattr(entries, "INLINE_MOST", 0)
    label_store(job(images, tmp_path / "store"))
    return tmp_path / "store"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


FORMS = [
    {"codec": "exact"},
    {"codec": "compact"},
    {"codec": "exact", "format": "tar"},
    {"codec": "compact", "format": "tar+images"},
    {"plan": ViewPlan(seed=3, policy="color", mix="cutmix")},
    {"keep": "sampled", "temperatures": (1.0,)},
]
NAMES = ["exact", "compact", "tar", "compact-tar-images", "cutmix", "sampled"]
in_every_form = pytest.mark.parametrize("form", FORMS, ids=NAMES)


# -- repair -----------------------------------------------------------------------------------------------------------


def test_every_file_of_a_store_is_repaired_to_its_bytes(images: Path, store: Path) -> None:
    whole = contents(store)
    for i, name in enumerate(whole):
        if i % 2:
            flip(store / name)
        else:
            (store / name).unlink()
        done = repair(job(images, store))
        assert (done.files, done.left) == ((name,), ())
        assert done.units == name.startswith("labels/")
        assert contents(store) == whole


def test_much_damage_at_once_is_repaired_and_sound_files_are_not_touched(images: Path, store: Path) -> None:
    whole = contents(store)
    damaged = [naming.MANIFEST, "store.json", "images.json", "index/00001.arrow", "index/00004.arrow"]
    damaged += ["labels/000000.arrow", "labels/000008.arrow", "labels/000009.arrow"]
    before = {name: (store / name).stat().st_ino for name in whole if name not in damaged}
    for i, name in enumerate(damaged):
        flip(store / name) if i % 2 == 0 else (store / name).unlink()
    (store / "notes.txt").write_text("mine")
    done = repair(job(images, store))
    assert (sorted(done.files), done.units) == (sorted(damaged), 3)
    assert [problem.file for problem in done.left] == ["notes.txt"]
    assert {name: (store / name).stat().st_ino for name in before} == before
    (store / "notes.txt").unlink()
    assert contents(store) == whole
    assert repair(job(images, store)).files == ()


@in_every_form
def test_every_form_of_store_is_repaired_and_extended(images: Path, tmp_path: Path, form: dict[str, object]) -> None:
    root = tmp_path / "store"
    label_store(job(images, root, **form))
    larger = job(images, root, views_per_image=6, **form)
    label_store(larger, extend=True)
    whole = contents(root)
    shards = [name for name in whole if name.startswith("labels/")]
    for name in (shards[0], shards[-1]):
        flip(root / name)
    assert repair(larger).files == (shards[0], shards[-1])
    assert contents(root) == whole
    assert check_pixels(LabelStore.open(str(root))) == []
    assert audit(LabelStore.open(str(root)), load_job_teacher(larger), views=20).faults == ()


def test_images_may_have_moved_when_a_store_is_repaired(images: Path, store: Path, tmp_path: Path) -> None:
    whole = contents(store)
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    (store / "labels/000003.arrow").unlink()
    assert repair(job(moved, store)).units == 1
    assert contents(store) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": fake_teacher_args(num_classes=11)}, "teacher.num_classes: stored 10, asked 11"),
        ({"teacher": dataclasses.replace(fake_teacher_args(), std=(1, 1, 2))}, r"teacher.std: stored .* asked"),
        ({"plan": ViewPlan(seed=4)}, "plan.seed: stored 3, asked 4"),
        ({"k": 5}, "k: stored 4, asked 5"),
        ({"views_per_image": 5}, "views_per_image: stored 4, asked 5"),
        ({"first_view": 1}, "first_view: stored 0, asked 1"),
        ({"batch_size": 6}, "batch_size: stored 5, asked 6"),
        ({"shards": "{00001..00004}"}, "shard number 0 is '00001.tar', stored '00000.tar'"),
    ],
)
def test_another_job_repairs_nothing_and_the_field_is_named(
    images: Path, store: Path, changes: dict[str, object], message: str
) -> None:
    flip(store / "labels/000001.arrow")
    before = contents(store)
    with pytest.raises(StoreMismatchError, match=message):
        repair(job(images, store, **changes))  # type: ignore[arg-type]
    assert contents(store) == before


def test_other_images_under_the_same_names_repair_nothing(images: Path, store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(images, tmp_path / "other"))
    make_images(other, num_images=12, shards=4, seed=1)
    flip(store / "labels/000001.arrow")
    before = contents(store)
    with pytest.raises(StoreMismatchError, match=r"images: \(id.* of image 0 of 00000.tar: stored .*, found"):
        repair(job(other, store))
    data = bytearray((images / "00000.tar").read_bytes())
    data[data.index(b"image-00002.jpg") + 512 + 300] ^= 1
    (other / "00000.tar").write_bytes(data)
    with pytest.raises(StoreMismatchError, match=r"replaced by the same bytes alone.*labels/000001\.arrow"):
        repair(job(other, store))
    assert contents(store) == before


def test_with_both_manifests_damaged_repair_says_that_a_backup_is_needed(images: Path, store: Path) -> None:
    flip(store / naming.MANIFEST)
    flip(store / naming.twin(naming.MANIFEST))
    with pytest.raises(StoreDamagedError, match=r"a manifest or its copy is sound.*backup"):
        repair(job(images, store))


def test_a_store_that_is_not_finished_or_written_to_is_not_repaired(images: Path, tmp_path: Path, store: Path) -> None:
    for call in (lambda path: repair(job(images, path)), lambda path: collect_garbage(str(path))):
        with pytest.raises(StoreMissingError):
            call(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()
        with driving(str(store)), pytest.raises(StoreBusyError):
            call(store)
    prepare(job(images, tmp_path / "begun"))
    with pytest.raises(StoreMissingError, match="run the same label command"):
        repair(job(images, tmp_path / "begun"))


# -- garbage ----------------------------------------------------------------------------------------------------------


def test_strays_are_listed_and_then_removed(store: Path) -> None:
    whole = contents(store)
    strays = [".tmp-0011223344556677", "labels/.tmp-00", "labels/000099.arrow", "receipts/000000.json", "lost/x"]
    for name in strays:
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(b"12")
    listed = collect_garbage(str(store), dry_run=True)
    assert sorted(stray.file for stray in listed) == sorted(strays)
    assert {stray.num_bytes for stray in listed} == {2}
    assert len(contents(store)) == len(whole) + len(strays)
    assert collect_garbage(str(store)) == listed
    assert contents(store) == whole
    assert collect_garbage(str(store)) == []


def test_garbage_of_a_store_under_a_damaged_manifest_is_not_judged(store: Path) -> None:
    flip(store / naming.MANIFEST)
    before = contents(store)
    with pytest.raises(StoreDamagedError):
        collect_garbage(str(store))
    assert contents(store) == before


def test_what_unfinished_work_needs_is_no_garbage(images: Path, store: Path, tmp_path: Path) -> None:
    begun = prepare(job(images, tmp_path / "begun"))
    teacher = load_job_teacher(job(images, tmp_path / "begun"))
    source = open_source(f"{images}/{{00000..00004}}.tar")
    label_unit(begun, begun.units()[0], source, teacher)
    (tmp_path / "begun/.tmp-00").write_bytes(b"x")
    before = contents(tmp_path / "begun")
    assert [stray.file for stray in collect_garbage(begun.url)] == [".tmp-00"]
    assert contents(tmp_path / "begun") == {name: data for name, data in before.items() if name != ".tmp-00"}

    larger = job(images, store, views_per_image=6)
    extending = prepare(larger, extend=True)
    label_unit(extending, extending.units()[0], source, teacher)
    before = contents(store)
    assert collect_garbage(str(store)) == []
    assert contents(store) == before
    assert label_store(larger, extend=True).new_units == len(extending.units()) - 1


# -- merge ------------------------------------------------------------------------------------------------------------


def same_but_for_sums(one: Path, other: Path) -> None:
    """Sums of unrounded labels are the one thing that rounded ones do not give again to the last digit."""
    mine, theirs = contents(one), contents(other)
    assert mine.keys() == theirs.keys()
    differing = {name for name in mine if mine[name] != theirs[name]}
    assert differing <= {naming.MANIFEST, naming.twin(naming.MANIFEST)}
    a, b = (LabelStore.open(str(root)).manifest for root in (one, other))
    assert a is not None
    assert b is not None
    for key in ("entropy_sum", "tail_sum"):
        assert a["totals"].pop(key) == pytest.approx(b["totals"].pop(key), rel=1e-2)
    assert a == b


@in_every_form
def test_stores_of_disjoint_views_become_the_store_labelled_at_once(
    images: Path, tmp_path: Path, form: dict[str, object]
) -> None:
    form = {"unit_views": 3, **form}
    label_store(job(images, tmp_path / "once", views_per_image=9, **form))
    label_store(job(images, tmp_path / "a", views_per_image=3, **form))
    label_store(job(images, tmp_path / "b", views_per_image=6, first_view=3, **form))
    before = contents(tmp_path / "a"), contents(tmp_path / "b")
    merge(str(tmp_path / "merged"), [str(tmp_path / "b"), str(tmp_path / "a")])
    same_but_for_sums(tmp_path / "merged", tmp_path / "once")
    assert verify_store(str(tmp_path / "merged")) == []
    assert (contents(tmp_path / "a"), contents(tmp_path / "b")) == before


@in_every_form
def test_stores_of_disjoint_shards_become_the_store_labelled_at_once(
    images: Path, tmp_path: Path, form: dict[str, object]
) -> None:
    both = ("{00000..00001}", "{00002..00004}")
    label_store(job(images, tmp_path / "once", shards=both, **form))
    for name, shards in zip("ab", both, strict=True):
        label_store(job(images, tmp_path / name, shards=shards, **form))
    merge(str(tmp_path / "merged"), [str(tmp_path / "a"), str(tmp_path / "b")])
    same_but_for_sums(tmp_path / "merged", tmp_path / "once")
    assert check_pixels(LabelStore.open(str(tmp_path / "merged"))) == []
    assert dict(LabelStore.open(str(tmp_path / "merged")).info()["bad"]).keys() == {"broken"}
    assert merge(str(tmp_path / "merged"), [str(tmp_path / "a"), str(tmp_path / "b")]).num_rows == 15 * 4


@pytest.mark.parametrize("unit_views", [None, 3])
def test_views_that_were_cut_at_other_places_are_cut_as_at_once(
    images: Path, tmp_path: Path, unit_views: int | None
) -> None:
    for name, first, views in (("a", 0, 4), ("b", 4, 1), ("c", 5, 4)):
        label_store(job(images, tmp_path / name, views_per_image=views, first_view=first, unit_views=unit_views))
    merged = merge(str(tmp_path / "merged"), [str(tmp_path / name) for name in "cab"])
    label_store(job(images, tmp_path / "once", views_per_image=9, unit_views=unit_views))
    same_but_for_sums(tmp_path / "merged", tmp_path / "once")
    assert (verify_store(merged.url), check_pixels(merged)) == ([], [])
    larger = job(images, tmp_path / "merged", views_per_image=10, unit_views=unit_views)
    label_store(larger, extend=True)
    (tmp_path / "merged/labels/000004.arrow").unlink()
    assert repair(larger).left == ()


def test_a_merge_goes_on_where_it_stopped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, first in (("a", 0), ("b", 2)):
        label_store(job(images, tmp_path / name, views_per_image=2, first_view=first))
    parts = [str(tmp_path / "a"), str(tmp_path / "b")]
    merge(str(tmp_path / "undisturbed"), parts)
    write, written = LabelStore.write_unit, []

    def dies(self, unit, rows, **more):  # type: ignore[no-untyped-def]
        written.append(unit.number)
        if len(written) == 4:
            raise KeyboardInterrupt
        return write(self, unit, rows, **more)

    monkeypatch.setattr(LabelStore, "write_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        merge(str(tmp_path / "merged"), parts)
    merge(str(tmp_path / "merged"), parts)
    assert written[4:] == written[3:4] + list(range(4, 10))
    assert contents(tmp_path / "merged") == contents(tmp_path / "undisturbed")


def test_what_does_not_belong_together_is_not_merged(images: Path, tmp_path: Path, finished: Path) -> None:
    out, a = str(tmp_path / "merged"), str(finished)
    other = {
        "seed": (job(images, tmp_path / "seed", plan=ViewPlan(seed=4)), r"plan.seed: 3 and 4"),
        "k": (job(images, tmp_path / "k", k=3), "k: 4 and 3"),
        "gap": (job(images, tmp_path / "gap", first_view=5), "views 0 to 3 and 5 to 8"),
        "overlap": (job(images, tmp_path / "overlap", first_view=3), "views 0 to 3 and 3 to 6"),
        "views": (
            job(images, tmp_path / "views", shards="{00003..00004}", views_per_image=3),
            "views 0 to 3 and 0 to 2",
        ),
    }
    for name, (made, message) in other.items():
        label_store(made)
        with pytest.raises(StoreMismatchError, match=message):
            merge(out, [a, str(tmp_path / name)])
    label_store(job(images, tmp_path / "twice", shards="{00003..00004}"))
    with pytest.raises(SourceError, match=r"an image shard is named once; got .*00003\.tar twice"):
        merge(out, [a, str(tmp_path / "twice")])
    with pytest.raises(ConfigError, match="two stores or more"):
        merge(out, [a])
    assert not Path(out).exists()


# -- extend -----------------------------------------------------------------------------------------------------------


def test_added_views_leave_every_file_as_it_was_and_are_those_of_a_larger_store(images: Path, store: Path) -> None:
    before = contents(store)
    done = label_store(job(images, store, views_per_image=7), extend=True)
    assert done.new_units == len([name for name in before if name.startswith("labels/")])
    after = contents(store)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() >= {"manifest-000002.json", "manifest-000002.copy.json"}
    assert verify_store(str(store)) == []
    assert check_pixels(LabelStore.open(str(store))) == []
    assert rows_of(store) == rows_of_new(images, store.parent / "large", views_per_image=7)
    info = LabelStore.open(str(store)).info()
    assert (info["views_per_image"], info["generation"], info["bad_images"], info["rows"]) == (7, 2, 1, 15 * 7)
    assert label_store(job(images, store, views_per_image=7)).new_units == 0, "a label job of this size is finished"
    assert label_store(job(images, store, views_per_image=7), extend=True).new_units == 0
    assert contents(store) == after


def test_added_images_become_new_shards(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    label_store(job(images, store, shards="{00000..00002}"))
    before = contents(store)
    label_store(job(images, store, views_per_image=5), extend=True)
    after = contents(store)
    assert {name: after[name] for name in before} == before
    assert rows_of(store) == rows_of_new(images, tmp_path / "large", views_per_image=5)
    for name in after:
        flip(store / name)
        assert [problem.file for problem in verify_store(str(store))] == [name]
        assert repair(job(images, store, views_per_image=5)).files == (name,)
        assert contents(store) == after


def test_an_extension_goes_on_where_it_stopped_and_readers_see_the_former_store(images: Path, store: Path) -> None:
    larger = job(images, store, views_per_image=6)
    undisturbed = Path(shutil.copytree(store, store.parent / "undisturbed"))
    label_store(dataclasses.replace(larger, store=str(undisturbed)), extend=True)
    extending = prepare(larger, extend=True)
    teacher = load_job_teacher(larger)
    source = open_source(larger.images)
    for unit in extending.units()[::2]:
        label_unit(extending, unit, source, teacher)
    assert LabelStore.open(str(store)).num_rows == 15 * 4
    with pytest.raises(StoreMismatchError, match="views_per_image: stored 6, asked 7"):
        label_store(job(images, store, views_per_image=7), extend=True)
    with pytest.raises(StoreMismatchError, match="views_per_image: stored 4, asked 6"):
        label_store(larger)
    label_store(larger, extend=True)
    assert contents(store) == contents(undisturbed)


def test_what_an_extension_that_was_given_up_left_behind_does_not_count(images: Path, store: Path) -> None:
    given_up = prepare(job(images, store, views_per_image=6), extend=True)
    source = open_source(f"{images}/{{00000..00004}}.tar")
    label_unit(given_up, given_up.units()[0], source, load_job_teacher(job(images, store)))
    (store / "extension-000002.json").unlink()
    undisturbed = Path(shutil.copytree(store, store.parent / "undisturbed"))
    collect_garbage(str(undisturbed))
    for root in (undisturbed, store):
        label_store(job(images, root, views_per_image=5), extend=True)
    assert verify_store(str(store)) == []
    assert contents(store) == contents(undisturbed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views_per_image": 3}, "views_per_image: stored 4, asked 3"),
        ({"views_per_image": 5, "k": 3}, "k: stored 4, asked 3"),
        ({"views_per_image": 5, "plan": ViewPlan(seed=9)}, "plan.seed: stored 3, asked 9"),
        ({"views_per_image": 5, "first_view": 1}, "first_view: stored 0, asked 1"),
        ({"shards": "{00001..00004}"}, "names the image shards of its store first"),
        ({"shards": "{00000..00003}"}, "names the image shards of its store first"),
    ],
)
def test_an_extension_changes_nothing_else(images: Path, store: Path, changes: dict[str, object], message: str) -> None:
    before = contents(store)
    with pytest.raises(StoreMismatchError, match=message):
        label_store(job(images, store, **changes), extend=True)  # type: ignore[arg-type]
    assert contents(store) == before


def rows_of(store: Path) -> dict[tuple[str, int], tuple[object, ...]]:
    opened, found = LabelStore.open(str(store)), {}
    for unit in opened.units():
        rows = opened.read(unit.number)
        for i in range(len(rows)):
            labels = (
                rows.labels.ids_BK[i].tolist(),
                rows.labels.log_p_BK[i].tolist(),
                rows.labels.log_tail_BT[i].tolist(),
            )
            found[rows.image_id[i], int(rows.view[i])] = (
                *labels,
                rows.view_at(i),
                int(rows.source[i]),
                int(rows.offset[i]),
            )
    return found


def rows_of_new(images: Path, store: Path, **changes: object) -> dict[tuple[str, int], tuple[object, ...]]:
    label_store(job(images, store, **changes))  # type: ignore[arg-type]
    return rows_of(store)


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_are_those_that_were_hashed(store: Path) -> None:
    opened = LabelStore.open(str(store))
    assert sum(int(opened.read(unit.number).has_pixel_hash.sum()) for unit in opened.units()) >= len(opened.units()) - 1
    assert check_pixels(opened) == []


def test_views_that_replay_to_other_pixels_are_found(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kddata.care import pixels

    render = pixels.render
    monkeypatch.setattr(pixels, "render", lambda *args, **more: render(*args, **more).bitwise_xor(1))
    problems = check_pixels(LabelStore.open(str(store)), skip=frozenset({"labels/000001.arrow"}))
    assert "labels/000001.arrow" not in {problem.file for problem in problems}
    assert "labels/000000.arrow" in {problem.file for problem in problems}
    assert "hashed views cannot be replayed; view 0 of 'image-00000' has other pixels" in problems[0].reason


def test_a_changed_image_is_found_by_its_hashed_view(images: Path, store: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(images, tmp_path / "moved"))
    assert check_pixels(LabelStore.open(str(store)), images=f"{moved}/{{00000..00004}}.tar") == []
    data = bytearray((moved / "00000.tar").read_bytes())
    data[data.index(b"image-00000.jpg") + 512 + 300] ^= 1
    (moved / "00000.tar").write_bytes(data)
    [problem] = check_pixels(LabelStore.open(str(store)), images=f"{moved}/{{00000..00004}}.tar")
    assert problem.file == "labels/000000.arrow"
    assert "other bytes under 'image-00000'" in problem.reason


def test_other_library_versions_warn_at_open_and_pixels_decide(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = manifest.libraries()
    monkeypatch.setattr(manifest, "libraries", lambda: {**now, "pillow": "99"})
    with caplog.at_level(logging.WARNING):
        opened = LabelStore.open(str(store))
    assert "other library versions" in caplog.text
    assert "99 now" in caplog.text
    assert check_pixels(opened) == []


# -- audit ------------------------------------------------------------------------------------------------------------


def test_the_same_teacher_says_the_same(images: Path, store: Path) -> None:
    opened = LabelStore.open(str(store))
    found = audit(opened, load_job_teacher(job(images, store)), views=30)
    assert (found.views, found.top1_match, found.faults) == (30, 1.0, ())
    assert found.mean_kl is not None
    assert 0 <= found.mean_kl < 1e-6, "float16 rounding of log-probabilities alone"
    assert (found.bad_images, found.num_images) == (1, 16)
    assert found.images_per_class is not None
    assert found.classes_without_images == 10 - 4
    info = opened.info()
    assert (found.teacher_accuracy, found.mean_tail_mass) == (info["teacher_accuracy"], info["mean_tail_mass"])
    assert audit(opened, load_job_teacher(job(images, store)), views=1000).views == 60
    without = audit(opened, min_accuracy=1.0, max_bad=0.01)
    assert (without.views, without.top1_match) == (0, None)
    assert [fault.split(",")[0].split(" is right")[0] for fault in without.faults] == [
        "the teacher",
        "1 of 16 images are bad",
    ]


def test_another_teacher_is_noticed(images: Path, store: Path) -> None:
    opened = LabelStore.open(str(store))
    args = dataclasses.replace(fake_teacher_args(), **STATISTICS)  # type: ignore[arg-type]
    found = audit(opened, load_job_teacher(job(images, store, teacher=args)), views=30)
    text = "\n".join(found.faults)
    assert "teacher.mean is (0.485, 0.456, 0.406), in the store (0.0, 0.0, 0.0)" in text
    assert "teacher.std" in text
    assert "mean KL is" in text
    with pytest.raises(StoreMismatchError, match=r"teacher\.num_classes: stored 10, asked 11"):
        audit(opened, load_job_teacher(job(images, store, teacher=fake_teacher_args(num_classes=11))))
    with pytest.raises(ConfigError, match="at least one view"):
        audit(opened, views=0)


def test_labels_swapped_between_rows_are_noticed_where_hashes_are_not(images: Path, tmp_path: Path) -> None:
    """A store with right hashes and wrong labels: what bytes cannot tell."""
    made = job(images, tmp_path / "wrong", shards="{00000..00003}")
    store = prepare(made)
    sound = label_store(dataclasses.replace(made, store=str(tmp_path / "right"))).store
    for unit in store.units():
        rows = sound.read(unit.number)
        store.write_unit(unit, [dataclasses.replace(rows, labels=rows.labels.rows(torch.arange(len(rows)).flip(0)))])
    store.commit()
    assert verify_store(store.url) == []
    found = audit(store, load_job_teacher(made), views=30)
    assert "mean KL is" in "\n".join(found.faults)


class Red(torch.nn.Module):
    """Says how red a view is, 0 to 9, of pixels that are normalised with mean 0 and std 1."""

    def forward(self, x_B3SS: torch.Tensor) -> torch.Tensor:
        red_B = (x_B3SS[:, 0].mean((1, 2)) * 10).clamp(0, 9)
        return -4 * (red_B[:, None] - torch.arange(10) - 0.5).abs()


def red_network(num_classes: int) -> torch.nn.Module:
    return Red()


def test_wrong_statistics_are_noticed_by_ground_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when store and job file agree on them."""
    import sys

    monkeypatch.setitem(sys.modules, "reds", sys.modules[__name__])
    members = []
    for i in range(60):
        red = np.full((20, 20, 3), 25 * (i % 10) + 12, np.uint8)
        members += [(f"{i:03d}.png", encode(red, "png")), (f"{i:03d}.cls", b"%d" % (i % 10))]
    write_tar(tmp_path / "00000.tar", members)
    right = dataclasses.replace(fake_teacher_args(), arch="python:reds:red_network")
    for name, statistics, wrong in (("right", {}, False), ("wrong", STATISTICS, True)):
        teacher = dataclasses.replace(right, **statistics)  # type: ignore[arg-type]
        made = job(tmp_path, tmp_path / name, shards="00000", teacher=teacher, views_per_image=2)
        store = label_store(made).store
        found = audit(store, load_job_teacher(made), views=100)
        text = "\n".join(found.faults)
        assert (("with mean 0 and std 1 the teacher is right about" in text), bool(text)) == (wrong, wrong), text


def test_compare_is_the_divergence_over_stored_classes_and_one_bucket() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -2.0], [0.0, 0.0, 5.0, 1.0]])
    other = torch.tensor([[2.0, 2.5, 0.0, -1.0], [0.0, 1.0, 5.0, 1.0]])
    match, kl = compare(SoftLabels.from_logits(logits, k=2), other)
    assert match.tolist() == [False, True]
    p, q = torch.softmax(logits.double(), 1), torch.softmax(other.double(), 1)
    groups = [[0], [1], [2, 3]], [[2], [3], [0, 1]]
    for row, parts in enumerate(groups):
        wanted = sum(p[row, part].sum() * (p[row, part].sum() / q[row, part].sum()).log() for part in parts)
        assert float(kl[row]) == pytest.approx(float(wanted), rel=1e-4)  # float32 labels
    assert float(compare(SoftLabels.from_logits(logits, k=4), logits)[1].max()) == pytest.approx(0, abs=1e-9)


def test_images_that_are_gone_are_named(images: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(KddataError, match="nothing there"):
        audit(LabelStore.open(str(store)), load_job_teacher(job(images, store)), images=str(tmp_path / "gone"))
