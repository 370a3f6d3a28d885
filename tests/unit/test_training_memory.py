"""The memory of a run depends on the window of its order, and not on how many windows there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from kddata import reader
from kddata.testing import make_store
from kddata.testing.memory import given_out_bytes
from kddata.training import DataArgs, OptimizerArgs, Progress, StudentArgs, TrainingJob, train

WINDOW_ROWS = 512


def test_16_windows_take_no_more_memory_than_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if given_out_bytes() is None:
        pytest.skip("only glibc tells what malloc has given out")
    store = make_store(tmp_path, num_images=16, views_per_image=512, unit_images=8, unit_views=32, size_px=8)
    monkeypatch.setattr(reader, "window_rows_for", lambda row_bytes: WINDOW_ROWS)
    job = TrainingJob(
        store=store.url,
        run=str(tmp_path / "run"),
        student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=10),
        method={"name": "kd", "temperature": 1},
        data=DataArgs(batch_size=64, size_px=8),
        optimizer=OptimizerArgs(lr=0.01, epochs=1),
    )
    taken: dict[int, int] = {}

    def look(progress: Progress) -> None:
        taken[progress.step * 64 // WINDOW_ROWS] = given_out_bytes() or 0

    train(job, report=look)
    assert list(taken) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert taken[14] < taken[4] + (128 << 10), "ten windows more, of some 150 kB each"
