"""Steps: one optimizer step for each batch, and what was seen on the way. No files, no evaluation, no processes.

What is random inside a student (dropout) is seeded by step and rank, so that a checkpoint holds no hidden state.
Losses are weighted by rows: the mean over ranks of their gradients is the gradient of the mean over the step's rows,
however unevenly the rows are shared.

Trade-off: losses are looked at every few steps, so that the device is not waited for at each one. A NaN is found that
much later, but before anything is saved.

Shapes: B rows of this rank's share of a step, C classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kddata import rng
from kddata.errors import TeacherError
from kddata.features import Capture
from kddata.labels import SoftLabels
from kddata.losses import Method
from kddata.replay import Batch
from kddata.training.students import to_train_mode

_CALM = "lower optimizer.lr or lengthen optimizer.warmup_epochs, in a run of another name"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step that was taken. `loss` is this rank's part of the mean over the step's rows, still on the device.

    `cached_loss`, with a teacher in the loop alone: what the stored labels would have made of the same logits.
    """

    number: int
    loss: Tensor
    cached_loss: Tensor | None = None
    lr: float
    rows: int
    image_ids: list[str]
    view_indices: list[int]
    wait_s: float
    seconds: float


Note = Callable[[Step, str], str]
"""Writes down at which step, and how, something stopped being finite; returns the name of the file."""


class Taught(NamedTuple):
    """What the teacher said about a batch: labels, and the outputs that the method needs, by name.

    `others` are the labels of an ensemble's other teachers.
    """

    labels: SoftLabels
    outputs: Mapping[str, Tensor]
    others: tuple[SoftLabels, ...] = ()

    def to(self, device: torch.device | str) -> Taught:
        """On a device, outputs in float32."""
        outputs = {name: x.to(device, non_blocking=True).float() for name, x in self.outputs.items()}
        others = tuple(labels.to(device, non_blocking=True) for labels in self.others)
        return Taught(self.labels.to(device, non_blocking=True), outputs, others)

    def combined(self, weights: Sequence[float], mixture: bool) -> list[tuple[float, SoftLabels]]:
        """Labels with the weights of their losses: those of each teacher, or of the mixture of all."""
        labels = [self.labels, *self.others]
        if mixture:
            return [(1.0, SoftLabels.mixture(labels, weights))]
        return list(zip(weights, labels, strict=True))


def training_steps(
    network: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    method: Method,
    *,
    first_step: int,
    learning_rate: Callable[[int], float],
    pixels_of: Callable[[Tensor], Tensor],
    teach: Callable[[Batch], Taught] | None = None,
    parts: nn.Module | None = None,
    capture: Capture | None = None,
    weights: Sequence[float] = (1.0,),
    mixture: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    bfloat16: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Step]:
    """Takes one optimizer step for each batch, and yields after it.

    Args:
        learning_rate: of a step.
        pixels_of: uint8 views -> the network's input, on its device.
        teach: labels and outputs of a batch, in place of the stored ones.
        parts: what the method learns beside the student, where it has any; `network` holds it too.
        capture: of the student's tensors that the method needs.
        weights: of the stores that batches come from, in order.
        mixture: whether the loss is against the mixture of their teachers.
        accumulate: parts of a batch that pass through the network one after the other; the step is that of the whole.
        clip_norm: the norm of all gradients together is made this small where it is larger.
        bfloat16: whether the student's forward pass is autocast; losses are computed in float32 all the same.
    """

    def learn(batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Adds the gradient of these rows. Their part of the step's mean loss, and of that by the stored labels."""
        pixels = pixels_of(batch.pixels_u8_B3SS)
        stored = Taught(batch.labels, batch.outputs, batch.others)
        taught = (stored if teach is None else teach(batch)).to(pixels.device)
        seen: dict[str, Tensor] = {}
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            if method.needs.cohort == "branches":
                logits_BC, seen["branches"], seen["gate"] = network(pixels)
            elif method.needs.boundary:
                logits_BC, seen["boundary_logits"] = network(pixels, pixels_of(taught.outputs["boundary"]))
            else:
                logits_BC = network(pixels)
        targets_B = batch.targets_B.to(logits_BC.device, non_blocking=True)
        pair: dict[str, Any] = {}
        if batch.targets2_B is not None and batch.lam_B is not None:
            pair = {"targets2_B": batch.targets2_B.to(logits_BC.device), "lam": batch.lam_B.to(logits_BC.device)}
        before = copy.deepcopy(parts) if teach is not None else None  # a loss may count its calls
        loss_of = partial(
            _mean_loss, method, targets_B=targets_B, rows=batch.step_rows, pair=pair, weights=weights, mixture=mixture
        )
        seen |= {} if capture is None else capture.take()
        look = {"parts": parts, "student": seen, "image_ids": batch.image_ids} if method.needs.sees else {}
        loss = loss_of(logits_BC, taught, look=look)
        if seen:
            # Layers above what was captured have a gradient too, of 0: ranks wait for every one.
            loss = loss + 0 * logits_BC.sum()
        cached_loss = None
        if teach is not None:
            look = {**look, "parts": before} if look else {}
            cached_loss = loss_of(logits_BC.detach(), stored.to(logits_BC.device), look=look).detach()
        (loss * world_size).backward()  # the mean over ranks is then the gradient of the mean over the step's rows
        return loss.detach(), cached_loss

    begin = time.perf_counter()
    for number, batch in enumerate(batches, first_step):
        wait_s = time.perf_counter() - begin
        torch.manual_seed(int.from_bytes(rng.key_bytes(seed, "step", number, rank)[:8], "little"))
        lr = learning_rate(number)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        to_train_mode(network)  # evaluation may have come between
        optimizer.zero_grad()
        *early, last = batch.split(accumulate)
        with network.no_sync() if isinstance(network, DistributedDataParallel) and early else nullcontext():
            found = [learn(part) for part in early]
        found.append(learn(last))
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        cached = [cached_loss for _, cached_loss in found if cached_loss is not None]
        end = time.perf_counter()
        yield Step(
            number=number,
            loss=torch.stack([loss for loss, _ in found]).sum(),
            cached_loss=torch.stack(cached).sum() if cached else None,
            lr=lr,
            rows=batch.step_rows,
            image_ids=batch.image_ids,
            view_indices=batch.view_indices,
            wait_s=wait_s,
            seconds=end - begin,
        )
        begin = time.perf_counter()


def _mean_loss(
    method: Method,
    logits_BC: Tensor,
    taught: Taught,
    *,
    targets_B: Tensor,
    rows: int,
    pair: dict[str, Any],
    look: dict[str, Any],
    weights: Sequence[float],
    mixture: bool,
) -> Tensor:
    """This rank's part of the mean loss over a step's rows, summed over the teachers with their weights."""
    if look:
        look = {**look, "outputs": taught.outputs}
    losses = [
        weight * method(logits_BC, labels, targets_B, reduction="none", ignore_index=-1, **pair, **look).sum()
        for weight, labels in taught.combined(weights, mixture)
    ]
    return torch.stack(losses).sum() / rows


def mean_losses(steps: list[Step], world_size: int, note: Note) -> list[float]:
    """The mean loss over all rows of each step. Raises TeacherError, on every rank, where one is not finite."""
    own = torch.stack([step.loss.double() for step in steps])
    total = own.clone()
    if world_size > 1:
        torch.distributed.all_reduce(total)
    if bool(torch.isfinite(total).all()):
        return total.tolist()
    first = int((~torch.isfinite(total)).nonzero()[0])
    where = "images of another worker, which names them"
    if not math.isfinite(own[first].item()):
        where = _images(steps[first], note(steps[first], f"a loss of {own[first].item()}"))
    raise TeacherError(
        "the loss is finite",
        actual=f"{total[first].item()} at step {steps[first].number}, learning rate {steps[first].lr:g}",
        where=where,
        fix=_CALM,
    )


def require_finite(network: nn.Module, step: Step, note: Note) -> None:
    """Raises TeacherError where a weight is not finite after a step: a finite loss may have had another gradient."""
    for name, weight in network.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise TeacherError(
                "weights are finite",
                actual=f"otherwise in {name} after step {step.number}, learning rate {step.lr:g}",
                where=_images(step, note(step, f"{name} not finite after the step")),
                fix=_CALM,
            )


def _images(step: Step, file: str) -> str:
    return f"images {', '.join(step.image_ids)}, as {file} says with their views"


@dataclass(kw_only=True)
class Meter:
    """How fast steps were taken: rows over all ranks, and this rank's seconds, waiting for batches among them."""

    rows: int = 0
    wait_s: float = 0.0
    seconds: float = 0.0

    def add(self, step: Step) -> None:
        """Counts a step in."""
        self.rows += step.rows
        self.wait_s += step.wait_s
        self.seconds += step.seconds

    @property
    def images_per_s(self) -> float:
        """Rows a second over all ranks."""
        return self.rows / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time in which this rank waited for its batch."""
        return self.wait_s / self.seconds
