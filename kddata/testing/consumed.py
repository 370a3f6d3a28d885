"""Consumed: which rows a training run really learned from, step by step, whatever died on the way.

`RecordingStudent` learns as any student does, and before each step writes down which pixels it was given, by hash. The
number of the step is a buffer of it, so that it lies in checkpoints and goes back with the weights: a run that goes on
after a kill says itself which steps it takes again. `strike` plans one signal at one step of one rank.

The folder is named by the environment variable KDDATA_CONSUMED, since a student is given nothing but pixels.
Trade-off: a few hashes and a line of a file a step; nets of tests are slower than that anyway.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kddata.replay import Batch

FOLDER = "KDDATA_CONSUMED"
_PLAN = "strike-{step}.json"
_ORPHAN_S = 1.0  # a step of ranks whose driver was killed, so that Ray ends them before they end the run


class RecordingStudent(nn.Module):
    """A linear student that writes down what it learns from."""

    step: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._orphaned = False

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, C] of pixels [B, 3, S, S]."""
        if self.training and torch.is_grad_enabled():
            self._record(pixels)
            self.step += 1
        return self.network(pixels)

    def _record(self, pixels: Tensor) -> None:
        folder, rank, world_size = Path(os.environ[FOLDER]), 0, 1
        if torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        step = int(self.step)
        line = {"step": step, "rank": rank, "world_size": world_size, "at": time.monotonic_ns(), "rows": hashes(pixels)}
        with open(folder / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._orphaned:
            time.sleep(_ORPHAN_S)
        self._strike(folder / _PLAN.format(step=step), rank)

    def _strike(self, path: Path, rank: int) -> None:
        try:
            plan = json.loads(path.read_text())
        except FileNotFoundError:
            return
        if plan["rank"] != rank:
            return
        path.unlink()
        self._orphaned = plan["pid"] is not None
        os.kill(plan["pid"] or os.getpid(), plan["signal"])


def strike(folder: Path, *, step: int, rank: int = 0, number: int = signal.SIGKILL, pid: int | None = None) -> None:
    """Plans that a rank sends a signal once, at a step counted from 0: to itself, or to the process `pid`."""
    path = folder / _PLAN.format(step=step)
    part = path.with_suffix(".new")
    part.write_text(json.dumps({"rank": rank, "signal": int(number), "pid": pid}))
    part.replace(path)


def hashes(pixels: Tensor) -> list[str]:
    """Of each row of pixels, as the student is given them."""
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()[:16] for row in pixels]


def attempts(folder: Path) -> Counter[int]:
    """How often each step was begun, by any set of ranks."""
    return Counter(line["step"] for line in _lines(folder) if line["rank"] == 0)


def consumed(folder: Path) -> dict[int, list[str]]:
    """Of each step the sorted hashes of its rows over all ranks, as it was taken last: what the weights are made of."""
    last: dict[tuple[int, int, int], dict[str, Any]] = {}
    world_size: dict[int, int] = {}
    for line in _lines(folder):
        last[line["step"], line["world_size"], line["rank"]] = line
        world_size[line["step"]] = line["world_size"]
    return {
        step: sorted(row for rank in range(size) for row in last[step, size, rank]["rows"])
        for step, size in sorted(world_size.items())
    }


def wanted(batches: Iterable[Batch], pixels_of: Callable[[Tensor], Tensor]) -> dict[int, list[str]]:
    """What `consumed` is to be where these are the whole batches of all steps, from step 0 on."""
    return {step: sorted(hashes(pixels_of(batch.pixels_u8_B3SS))) for step, batch in enumerate(batches)}


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Everything written, in the order of time; a line that a kill cut short is left out."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found.append(json.loads(line))
    return sorted(found, key=lambda line: line["at"])
