"""Classify: what a trained student says about images, from the folder that its run left. Neither store nor Ray.

Trade-off: one evaluation view of each image, and no average over several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from kddata.images import open_source
from kddata.replay import EvaluationImages
from kddata.training.trained import open_student


class Classified(NamedTuple):
    """An image, its most probable classes with their probabilities, best first, and its ground truth where known."""

    image_id: str
    classes: list[int]
    probabilities: list[float]
    label: int | None


def classify(
    run: str,
    images: str | Sequence[str],
    *,
    arch: str | None = None,
    top: int = 5,
    batch_size: int = 64,
    device: str = "cpu",
) -> Iterator[Classified]:
    """What the student of a finished run says of each image, in the order of their source, one evaluation view of each.

    Args:
        run: folder or URL of the run.
        images: as `open_source` takes them.
        arch: of the student, where its card names a `python:` callable.
        top: how many classes.

    Raises StoreMissingError for a run that has not finished, ConfigError for a card without what is needed, and
    SourceError or BadImageError for the images.
    """
    student = open_student(run, arch=arch, device=device)
    source = open_source(images if isinstance(images, str) else tuple(images))
    batches = EvaluationImages(
        source, size_px=student.size_px, interpolation=student.interpolation, batch_size=batch_size
    )
    for index in range(len(batches)):
        batch = batches[index]
        with torch.inference_mode():
            p = student.network(student.pixels_of(batch.pixels_u8_B3SS)).float().softmax(1)
        values, classes = p.topk(min(top, student.num_classes), dim=1)
        for row, image_id in enumerate(batch.image_ids):
            label = int(batch.targets_B[row])
            yield Classified(image_id, classes[row].tolist(), values[row].tolist(), None if label < 0 else label)
