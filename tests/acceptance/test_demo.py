"""The demo in its small form, end to end with Ray, on made-up images in Fashion-MNIST's files."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kddata.store import LabelStore
from kddata.testing import small_image

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
DEMO = Path(__file__).parents[2] / "jobs" / "demo.py"
RUNS = ["plain-CNN-cached", "plain-CNN-hard", "small-ResNet-cached", "small-ResNet-hard", "small-ResNet-loop"]


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1100)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(data folder, output folder, stdout) of a demo that has run."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("demo") / "out"
    for split, number in (("train", 3072), ("t10k", 512)):
        labels = np.arange(number, dtype=np.uint8) % 10
        images = [small_image(y, height_px=28, width_px=28, index=i)[..., 0] for i, y in enumerate(labels.tolist())]
        for what, array in (("images-idx3", np.stack(images)), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            packed = gzip.compress(head + array.tobytes(), compresslevel=1)
            (data / f"{split}-{what}-ubyte.gz").write_bytes(packed)
    ran = demo("--small", "--data", data, "--out", out)
    assert ran.returncode == 0, ran.stderr
    return data, out, ran.stdout


def test_every_arm_is_in_table_and_report(done):
    _, out, stdout = done
    result = json.loads((out / "result.json").read_text())
    arms = [tuple(row[:2]) for row in result["rows"]]
    labels = ("hard labels", "cached labels")
    assert arms == [
        ("teacher", ""),
        *[("small ResNet", x) for x in (*labels, "teacher in the loop")],
        *[("plain CNN", x) for x in labels],
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    for row in result["rows"]:
        assert row[2] in stdout
        assert all(cell in page for cell in row)
    for verdict in result["verdicts"]:
        assert verdict in stdout
        assert verdict in page
    assert str(out / "report.html") in stdout
    assert sorted(path.name for path in (out / "runs").iterdir()) == RUNS


def test_the_store_is_whole_and_holds_each_view_once(done):
    store = LabelStore.open(str(done[1] / "labels"))
    assert store.verify() == []
    assert store.num_rows == 1024 * 2
    rows = [store.read(unit.number) for unit in store.units()]
    assert len({(image, view) for part in rows for image, view in zip(part.image_id, part.view, strict=True)}) == 2048


def test_training_from_the_cache_is_training_with_the_teacher_in_the_loop(done):
    runs = done[1] / "runs"
    cached, loop = (
        json.loads((runs / f"small-ResNet-{kind}" / "metrics.json").read_text()) for kind in ("cached", "loop")
    )
    card = json.loads((runs / "small-ResNet-loop" / "card.json").read_text())
    assert card["teacher_in_the_loop"]
    assert len(cached["loss_S"]) == len(loop["loss_S"]) == 16
    assert cached["loss_S"] != loop["loss_S"]  # or the loop arm did not ask the teacher
    # The first step has equal weights in both: its difference is that of the stored values' rounding alone.
    assert cached["loss_S"][0] == loop["cached_loss_S"][0] == pytest.approx(loop["loss_S"][0], rel=1e-3)
    assert loop["cached_loss_S"] != loop["loss_S"]
    assert "within the tolerance at every one of 16 steps" in done[2]


def test_all_arms_saw_the_same_rows_in_the_same_order(done):
    jobs = [json.loads((done[1] / "runs" / name / "job.json").read_text()) for name in RUNS]
    assert len({json.dumps([job["store"], job["data"], job["optimizer"]]) for job in jobs}) == 1
    assert {job["method"]["name"] for job in jobs} == {"hard", "kd"}


def test_a_second_run_does_nothing_and_says_so(done):
    data, out, first = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    begin_s = time.monotonic()
    again = demo("--small", "--data", data, "--out", out)
    assert again.returncode == 0
    assert "finished already: nothing was done" in again.stdout
    assert first in again.stdout
    assert time.monotonic() - begin_s < 20  # no torch, no Ray
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_lost_report_is_written_again_from_finished_work(done):
    data, out, _ = done
    wanted = {name: (out / name).read_bytes() for name in ("result.json", "report.html", "times.json")}
    weights = [(out / "runs" / name / "model.safetensors").stat().st_mtime_ns for name in RUNS]
    (out / "result.json").unlink()
    assert demo("--small", "--data", data, "--out", out).returncode == 0
    assert [(out / "runs" / name / "model.safetensors").stat().st_mtime_ns for name in RUNS] == weights
    assert {name: (out / name).read_bytes() for name in wanted} == wanted


def test_a_folder_with_other_things_in_it_is_left_alone(done, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for arguments in ([], ["--fresh"]):
        ran = demo("--small", "--out", tmp_path, *arguments)
        assert ran.returncode == 2
        assert "a demo has a folder of its own" in ran.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"
    other = demo("--out", done[1])
    assert other.returncode == 2
    assert "add --fresh" in other.stderr
