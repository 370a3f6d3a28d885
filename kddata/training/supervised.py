"""Supervised training of one network on labelled images, in this process: how a teacher may come to be.

No store, no soft labels, no ranks, no checkpoints. Trade-off: all encoded images are held in memory, which suits sets
of up to some hundred thousand small images; for more, bring a teacher.

Shapes: B rows of a step, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from kddata import rng
from kddata.corruption import labels_sha256
from kddata.errors import SourceError
from kddata.images import ImageSource, decode
from kddata.replay import evaluation_view, step_loader
from kddata.training.job import OptimizerArgs
from kddata.training.predict import normaliser
from kddata.training.students import to_train_mode
from kddata.views import ViewPlan, render

WHOLE_SHARE = 0.5


class LabelledViews(Dataset[tuple[Tensor, Tensor]]):
    """(uint8 views [B, 3, S, S], targets [B]) by step number; each image comes once an epoch, a remainder not at all.

    Half of the views are drawn by the plan, the others are the evaluation view, so that a teacher knows both what it
    will label and what it is judged by. A pure function of images, plan, seed and step.

    Attributes:
        labels_sha256: of which image has which label; see `corruption.labels_sha256`.
        highest_label: of all images.

    Raises SourceError for images without labels, or for fewer than one batch of them.
    """

    def __init__(self, source: ImageSource, *, plan: ViewPlan, size_px: int, batch_size: int, seed: int) -> None:
        self._items = [item for name in source.shard_names() for item in source.stream(name, source.scan(name)[1])]
        without = next((ref.image_id for ref, _ in self._items if ref.label is None), None)
        if without is not None or not self._items:
            raise SourceError("supervised training takes labelled images", actual=without or "none")
        self._plan, self._size_px, self._batch_size, self._seed = plan, size_px, batch_size, seed
        self._order = -1, np.empty(0, dtype=np.int64)  # of the epoch that was asked for last
        self.steps_per_epoch = len(self._items) // batch_size
        if self.steps_per_epoch < 1:
            raise SourceError(
                "supervised training takes one batch of images at least",
                actual=f"{len(self._items)} images, batch_size {batch_size}",
                fix="use a smaller batch_size",
            )
        labels_N = np.array([ref.label for ref, _ in self._items])
        self.highest_label = int(labels_N.max())
        ids = (ref.image_id for ref, _ in self._items)
        self.labels_sha256 = labels_sha256(zip(ids, labels_N.tolist(), strict=True))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, step = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.argsort(rng.stream(self._seed, "epoch", epoch).random(len(self._items)))
        chosen = [self._items[i] for i in self._order[1][step * self._batch_size : (step + 1) * self._batch_size]]
        pixels = torch.empty(len(chosen), 3, self._size_px, self._size_px, dtype=torch.uint8)
        for i, (ref, data) in enumerate(chosen):
            image = decode(data, max_pixels=1 << 62)
            _, height, width = image.shape
            if rng.unit_interval(self._seed, "whole", ref.image_id, epoch) < WHOLE_SHARE:
                view = evaluation_view(height, width, self._size_px)
            else:
                view = self._plan.draw(ref.image_id, epoch, height, width)
            pixels[i] = render(image, view, size_px=self._size_px, interpolation=self._plan.interpolation)
        return pixels, torch.tensor([ref.label for ref, _ in chosen])


def fit(
    network: nn.Module,
    views: LabelledViews,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    optimizer: OptimizerArgs,
    threads: int = 1,
    num_workers: int = 0,
    report: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> None:
    """Trains a network in place on the CPU by cross-entropy, with SGD and Nesterov momentum.

    Args:
        mean, std: of the network's input, for pixels in [0, 1].
        optimizer: learning rates, epochs, momentum and weight decay; its name is not looked at. BatchNorm that was
            frozen stays as it is; see `students.to_train_mode`.
        threads: of torch in this process.
        num_workers: processes that read and render ahead.
        report: called after each step with its number from 1, the number of steps, and its loss.
    """
    torch.set_num_threads(threads)
    to_train_mode(network)
    network.to(memory_format=torch.channels_last)
    pixels_of = normaliser(mean, std, "cpu")
    sgd = torch.optim.SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        nesterov=optimizer.momentum > 0,
    )
    num_steps = optimizer.epochs * views.steps_per_epoch
    for step, (pixels, targets) in enumerate(
        step_loader(views, range(num_steps), num_workers=num_workers, pin_memory=False)
    ):
        for group in sgd.param_groups:
            group["lr"] = optimizer.learning_rate(step, views.steps_per_epoch)
        loss = functional.cross_entropy(network(pixels_of(pixels)), targets)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        report(step + 1, num_steps, loss.item())
    network.eval()
