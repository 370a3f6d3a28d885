"""The `kddata` command, in-process: what it prints and exits with. `label` and `train` are in tests/cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import kddata
from kddata import picture
from kddata.cli import app
from kddata.labelling import LabellingJob, label_store
from kddata.testing import encode, fake_teacher_args, make_images, make_store, small_image, write_tar
from kddata.views import ViewPlan, pixel_hash

COMMANDS = (
    "pack",
    "label",
    "plan",
    "teach",
    "extend",
    "train",
    "sweep",
    "evaluate",
    "predict",
    "inspect",
    "verify",
    "repair",
    "gc",
    "merge",
    "convert",
    "export",
    "audit",
    "show",
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, one of them unreadable, three views each."""
    root = tmp_path_factory.mktemp("cli")
    make_images(root / "images", num_images=12)
    write_tar(root / "images" / "00002.tar", [("broken.jpg", b"no image"), ("broken.cls", b"1")])
    job = LabellingJob(
        images=str(root / "images"),
        store=str(root / "store"),
        teacher=fake_teacher_args(),
        plan=ViewPlan(),
        views_per_image=3,
        k=3,
        bad_images=0.5,
    )
    label_store(job)
    return root / "store"


def test_the_version_and_help_with_examples_and_exit_codes() -> None:
    assert call("--version").stdout == f"kddata {kddata.__version__}\n"
    listed = call("--help").stdout
    assert "Exit codes: 0 done" in listed
    assert not re.search(r"\w\.\.\.$", listed, re.M), "no summary is cut short"
    assert "goes on where an earlier run stopped." in " ".join(listed.split())
    for command in COMMANDS:
        text = call(command, "--help").stdout
        assert re.search(rf"^ *kddata {command} \S+", text, re.M), f"{command} --help has an example"


def test_the_installed_command_starts_and_exits_with_its_codes(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "kddata"
    done = subprocess.run([program, "inspect", tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("error: a label store is a folder with a manifest")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_inspect_says_what_a_store_is_and_holds(store: Path) -> None:
    text = call("inspect", store).stdout
    for line in (
        r"teacher +python:kddata.testing:fake_network, 10 classes, 16 px",
        r"views +3 an image, random crops of area 0.08-1 and aspect 0.75-1.33, flipped 0.5, bilinear, seed 0",
        r"labels +k = 3 of 10, temperatures \[1.0\]",
        r"images +12 in 3 shards, 1 bad",
        r"rows +36 in 3 units",
        r"accuracy +\d+\.\d\d% of 36 views",
        r"entropy +\d\.\d{3} nats",
        r"tail mass +0\.\d{4}",
        r"bad image broken: .*no image",
    ):
        assert re.search(line, text), f"{line}\n{text}"
    info = json.loads(call("inspect", store, "--json").stdout)
    assert (info["rows"], info["bad_images"], info["spec"]["k"]) == (36, 1, 3)


def test_verify_is_silent_about_a_sound_store_and_names_damage(store: Path, tmp_path: Path) -> None:
    sound = call("verify", store)
    assert (sound.exit_code, sound.stdout) == (0, f"{store}: every file is as it was written\n")
    copy = shutil.copytree(store, tmp_path / "store")
    shard = copy / "labels" / "000001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (copy / "index" / "00000.arrow").unlink()
    damaged = call("verify", copy)
    assert damaged.exit_code == 5
    assert "labels/000001.arrow: its bytes differ from those that were written (SHA-256)" in damaged.stdout
    assert "index/00000.arrow: missing" in damaged.stdout
    assert "error: a store is as it was written; got 2 problems" in damaged.stderr
    problems = json.loads(call("verify", copy, "--json").stdout)
    assert [problem["file"] for problem in problems] == ["index/00000.arrow", "labels/000001.arrow"]


JOB = """
images: {images}
store: {store}
teacher: {{arch: "python:kddata.testing:fake_network", num_classes: 10, size_px: 16, mean: [0, 0, 0], std: [1, 1, 1]}}
views: {{per_image: 3}}
labels: {{k: 3}}
limits: {{bad_images: 0.5}}
"""


@pytest.fixture
def cared(store: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the store, and the job file that it was labelled by."""
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(images=store.parent / "images", store=copy))
    return copy, file


def test_repair_makes_damaged_files_again_and_says_which(cared: tuple[Path, Path], store: Path) -> None:
    copy, file = cared
    (copy / "labels/000001.arrow").unlink()
    (copy / "index/00000.arrow").write_bytes(b"")
    (copy / "stray").write_bytes(b"x")
    refused = call("repair", file, "labels.k=4")
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert "k: stored 3, asked 4" in refused.stderr
    done = call("repair", file)
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "index/00000.arrow: made again",
        "labels/000001.arrow: made again",
        "stray: extra: no part of the store",
    ]
    for name in ("labels/000001.arrow", "index/00000.arrow"):
        assert (copy / name).read_bytes() == (store / name).read_bytes()
    assert call("repair", file).stdout.splitlines()[0] == f"{copy}: no file is damaged"


def test_gc_lists_strays_and_removes_them(cared: tuple[Path, Path]) -> None:
    copy, _ = cared
    (copy / "labels/000077.arrow").write_bytes(b"123")
    line = "labels/000077.arrow: no manifest names it, 3 B"
    listed = call("gc", copy, "--dry-run")
    assert (listed.exit_code, listed.stdout) == (0, f"{line}\n{copy}: 1 files, 3 B would be removed\n")
    assert call("gc", copy).stdout == f"{line}\n{copy}: 1 files, 3 B removed\n"
    assert json.loads(call("gc", copy, "--json").stdout) == []
    assert call("verify", copy).exit_code == 0


def test_merge_joins_stores_and_names_what_differs(store: Path, tmp_path: Path) -> None:
    job = LabellingJob(
        images=str(store.parent / "images"),
        store=str(tmp_path / "more"),
        teacher=fake_teacher_args(),
        plan=ViewPlan(),
        views_per_image=2,
        first_view=3,
        k=3,
        bad_images=0.5,
    )
    label_store(job)
    done = call("merge", tmp_path / "all", store, tmp_path / "more")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/all: 60 views, in 3 units of 2 stores\n")
    assert call("verify", tmp_path / "all", "--pixels").exit_code == 0
    refused = call("merge", tmp_path / "none", store, tmp_path / "all")
    assert refused.exit_code == 5
    assert "views 0 to 2 and 0 to 4" in refused.stderr


def test_convert_and_export_write_a_store_in_other_forms(store: Path, tmp_path: Path) -> None:
    done = call("convert", store, tmp_path / "tar", "--format", "tar")
    assert done.exit_code == 0
    assert re.match(rf"{tmp_path}/tar: 36 views, tar, codec exact, \d+\.\d B a view\n$", done.stdout), done.stdout
    assert call("convert", tmp_path / "tar", tmp_path / "back", "--format", "arrow").exit_code == 0
    again, first = (folder / "labels" / "000000.arrow" for folder in (tmp_path / "back", store))
    assert again.read_bytes() == first.read_bytes()
    small = json.loads(call("convert", store, tmp_path / "small", "--codec", "compact", "--json").stdout)
    assert small["spec"]["codec"] == "compact"
    refused = call("convert", store, tmp_path / "none", "--codec", "small")
    assert (refused.exit_code, refused.stderr.count("--codec is one of exact, compact; got 'small'")) == (2, 1)
    exported = call("export", store, tmp_path / "rows.parquet")
    assert (exported.exit_code, exported.stdout.count("36 rows in 1 row groups")) == (0, 1)


def test_verify_pixels_names_views_that_cannot_be_replayed(store: Path, tmp_path: Path) -> None:
    sound = call("verify", store, "--pixels")
    assert (sound.exit_code, sound.stdout) == (0, f"{store}: every file is as it was written, every hashed view too\n")
    moved = shutil.copytree(store.parent / "images", tmp_path / "moved")
    data = bytearray((moved / "00000.tar").read_bytes())
    data[data.index(b"image-00000.jpg") + 512 + 200] ^= 1
    (moved / "00000.tar").write_bytes(data)
    changed = call("verify", store, "--pixels", "--images", moved)
    assert changed.exit_code == 5
    assert re.search(r"^labels/000000.arrow: \d of \d hashed views .* other bytes under 'image-00000'", changed.stdout)


def test_audit_passes_and_fails_by_thresholds(cared: tuple[Path, Path]) -> None:
    copy, file = cared
    done = call("audit", copy, "--job", file, "--views", 20)
    assert done.exit_code == 0
    assert re.search(
        r"^asked again  20 views: top-1 as stored 100.00%, KL mean \S+, largest \S+ nats$", done.stdout, re.M
    )
    assert "bad images   1 of 13" in done.stdout
    assert "verdict      nothing past its threshold" in done.stdout
    said = json.loads(call("audit", copy, "--json").stdout)
    assert (said["faults"], said["sampled"], said["max_output_errors"]) == ([], False, {})
    failed = call("audit", copy, "--max-bad", 0.01, "--min-accuracy", 1)
    assert failed.exit_code == 5
    assert "1 of 13 images are bad, more than 0.01 of them" in failed.stderr
    other = call("audit", copy, "--job", file, "teacher.std=[2, 1, 1]")
    assert "teacher.std is (2.0, 1.0, 1.0), in the store" in other.stderr
    aimless = call("audit", copy, "teacher.std=[2, 1, 1]")
    assert (aimless.exit_code, aimless.stderr.count("Next: name the file with --job")) == (2, 1)


def test_show_draws_a_picture_of_the_views(store: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{i}\tname {i}\n" for i in range(10)))
    done = call("show", store, "image-00003", "--out", tmp_path / "a.png", "--class-names", names)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/a.png: 3 of 3 views of image-00003\n")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50, "it is not blank"
    call("show", store, "image-00003", "--out", tmp_path / "b.png", "--most", 1)
    with Image.open(tmp_path / "a.png") as all_views, Image.open(tmp_path / "b.png") as one_view:
        assert one_view.size[1] < all_views.size[1]


def test_show_and_inspect_tell_of_ops_and_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ViewPlan(policy="color", erase_p=1.0, mix="mixup")
    store = make_store(tmp_path, num_images=8, views_per_image=3, plan=plan)
    line = r"flipped 0\.5, color, erased 1, mixup, bilinear, seed 0"
    assert re.search(line, call("inspect", store.url).stdout)
    shown: list[Tensor] = []
    monkeypatch.setattr(picture, "_show", lambda tile, pixels: shown.append(pixels))
    assert call("show", store.url, "image-00000", "--out", tmp_path / "a.png").exit_code == 0
    rows = picture.stored_views(store, "image-00000", most=3)
    recipe = picture._recipe(rows.view_at(0))
    assert "brightness" in " ".join(recipe)
    assert "erase" in " ".join(recipe)
    assert re.search(r"^mixup \d+% of image-0000[1-3]$", recipe[-1])
    assert rows.has_pixel_hash[0], "the first view of a unit is always hashed"
    assert pixel_hash(shown[1]) == rows.pixel_hash[0]
    assert len(shown) == 4


def test_show_names_what_is_not_there(store: Path, tmp_path: Path) -> None:
    unknown = call("show", store, "image-99", "--out", tmp_path / "a.png")
    assert unknown.exit_code == 2
    assert "'image-99', which no index names" in unknown.stderr
    assert "ids look like 'image-00000'" in unknown.stderr
    assert "'broken', which could not be used: " in call("show", store, "broken", "--out", tmp_path / "a.png").stderr
    assert not (tmp_path / "a.png").exists()
    nowhere = call("show", store, "image-00003", "--out", tmp_path / "no" / "folder" / "a.png")
    assert (nowhere.exit_code, nowhere.stderr.count("a picture goes into a folder that is there")) == (2, 1)


def test_show_refuses_another_image_under_the_same_name(store: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(store.parent / "images", tmp_path / "moved")
    out = tmp_path / "a.png"
    assert call("show", store, "image-00003", "--images", moved, "--out", out).exit_code == 0
    shard = moved / "00000.tar"
    data = bytearray(shard.read_bytes())
    with_image = data.index(b"image-00003.jpg") + 512 + 200
    data[with_image] ^= 1
    shard.write_bytes(data)
    changed = call("show", store, "image-00003", "--images", moved, "--out", out)
    assert changed.exit_code == 3
    assert "other bytes under 'image-00003'" in changed.stderr


def test_pack_makes_tars_that_hold_the_same_images(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "folder", num_images=7, form="folder")
    done = call("pack", folder, "--out", tmp_path / "shards", "--shard-images", 3, "--json")
    packed = json.loads(done.stdout)
    assert (packed["num_images"], packed["num_shards"], packed["unreadable"]) == (7, 3, [])
    source = kddata.open_source(str(tmp_path / "shards"))
    refs = [ref for name in source.shard_names() for ref in source.scan(name)[1]]
    assert len(refs) == 7
    assert all(ref.label is not None for ref in refs)


def test_pack_resizes_and_lists_the_unreadable(tmp_path: Path) -> None:
    large = encode(small_image(0, height_px=40, width_px=60))
    write_tar(tmp_path / "a.tar", [("large.jpg", large), ("text.jpg", b"no image")])
    done = call("pack", tmp_path / "a.tar", "--out", tmp_path / "out", "--short-side-px", 20)
    assert done.exit_code == 0
    assert "2 images in 1 shards" in done.stdout
    assert "1 resized, 1 unreadable" in done.stdout
    assert re.search(r"^  text: ", done.stdout, re.M)


def test_pack_of_nothing(tmp_path: Path) -> None:
    done = call("pack", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert "nowhere" in done.stderr


def test_a_wrong_job_file_ends_before_ray_is_imported(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("imagez: x\n")
    for command in ("label", "train"):
        done = call(command, tmp_path / "job.yaml")
        assert done.exit_code == 2
        assert "imagez: no such key; the nearest is images" in done.stderr


def test_teach_says_how_well_it_was_learned_and_that_nothing_is_done_twice(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", num_images=16, num_classes=4, min_px=24, max_px=32)
    file = tmp_path / "teach.yaml"
    file.write_text(
        f"images: {images}\nevaluate: {images}\nbatch_size: 8\n"
        "teacher: {arch: 'python:kddata.nets:quick_resnet', num_classes: 4, size_px: 16}\n"
        f"optimizer: {{lr: 0.05, epochs: 1}}\nrun: {{name: t, storage: {tmp_path}}}\n"
    )
    scores = r"top-1 \d+\.\d\d%, top-5 \d+\.\d\d%, loss \d\.\d{4} nats, calibration error 0\.\d{4}, "
    scores += r"training loss \d\.\d{4}\n"
    done = call("teach", file)
    assert re.fullmatch(re.escape(f"{tmp_path}/t: ") + scores, done.stdout), done.stdout
    again = call("teach", file)
    assert again.stdout == done.stdout.replace("/t: ", "/t is finished already; nothing was done: ")
    assert json.loads(call("teach", file, "--json").stdout)["run"] == f"{tmp_path}/t"
