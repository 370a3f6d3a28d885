"""Checkpoints: whole ones are loaded, exactly; damaged ones are passed over; nothing in one can run code."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kddata.store.storage import open_storage
from kddata.testing import make_store
from kddata.training import DataArgs, OptimizerArgs, Progress, StudentArgs, TrainingJob, train
from kddata.training.checkpoints import Checkpoints


def state(step: int) -> dict[str, object]:
    return {"step": step, "weights": torch.arange(50.0) + step, "nested": {"momentum": torch.ones(3) / 3}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_state_comes_back_and_two_are_kept(tmp_path):
    checkpoints = Checkpoints(open_storage(str(tmp_path)))
    assert checkpoints.load() is None
    for step in (3, 6, 1000):
        checkpoints.save(step, state(step))
    assert names(tmp_path) == ["000000006.pt", "000001000.pt"]
    found = checkpoints.load()
    assert found is not None
    assert found["step"] == 1000
    assert torch.equal(found["weights"], torch.arange(50.0) + 1000)
    checkpoints.remove()
    assert checkpoints.load() is None


def test_any_flipped_byte_or_cut_makes_the_one_before_it_count(tmp_path, caplog):
    checkpoints = Checkpoints(open_storage(str(tmp_path)))
    checkpoints.save(3, state(3))
    checkpoints.save(6, state(6))
    path = tmp_path / "checkpoints/000000006.pt"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [0, len(whole) - 1, len(whole) - 33, *rng.integers(len(whole), size=100).tolist()]
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :] for at in places]
    cut = [whole[:size] for size in (0, 20, 40, len(whole) // 2, len(whole) - 1)]
    for data in damaged + cut:
        path.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            found = checkpoints.load()
        assert found is not None
        assert found["step"] == 3
        assert "checkpoints/000000006.pt of " in caplog.text
        caplog.clear()
    path.write_bytes(whole)
    found = checkpoints.load()
    assert found is not None
    assert found["step"] == 6


class Evil:
    def __reduce__(self):
        return (print, ("code of a checkpoint has run",))


def test_a_sealed_file_with_code_in_it_runs_none(tmp_path, capsys):
    """A seal keeps accidents out and not attackers: it is weights_only that does."""
    file = io.BytesIO()
    torch.save({"student": Evil()}, file)
    data = file.getvalue() + b"kddata\x00\x01"
    data += hashlib.sha256(file.getvalue()).digest()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/000000001.pt").write_bytes(data)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Checkpoints(open_storage(str(tmp_path))).load()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damaged", [1, 2], ids=["the newest", "both"])
def test_a_run_goes_on_from_before_a_damaged_checkpoint_to_the_same_bits(tmp_path, damaged, caplog):
    store = make_store(tmp_path / "store", num_images=20, num_classes=5, temperatures=(1.0, 2.0))
    jobs = [
        TrainingJob(
            store=store.url,
            run=str(tmp_path / name),
            student=StudentArgs(arch="python:kddata.nets:small_cnn", num_classes=5),
            method={"name": "kd", "temperature": 2},
            data=DataArgs(batch_size=10, size_px=16),
            optimizer=OptimizerArgs(lr=0.05, epochs=3),
            checkpoint_steps=1,
        )
        for name in ("undisturbed", "stopped")
    ]

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    undisturbed = train(jobs[0])
    with pytest.raises(KeyboardInterrupt):
        train(jobs[1], report=stop)
    assert names(tmp_path / "stopped") == ["000000003.pt", "000000004.pt"]
    for name in names(tmp_path / "stopped")[2 - damaged :]:
        path = tmp_path / "stopped/checkpoints" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert train(jobs[1]).loss_S == undisturbed.loss_S
    assert caplog.text.count("is damaged and passed over") == damaged
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("undisturbed", "stopped")]
    assert files[0] == files[1]
