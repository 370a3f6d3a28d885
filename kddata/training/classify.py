"""Classify: what a trained student says about images, from the folder that its run left. Neither store nor Ray.

The card of a run says how its student sees. It comes with the run, perhaps from elsewhere, so code that it names is
not run: a `python:` student is named by who calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kddata.errors import ConfigError, StoreMissingError
from kddata.images import open_source
from kddata.replay import EvaluationImages
from kddata.store.storage import open_storage
from kddata.teacher import build_network
from kddata.training.predict import normaliser


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
    files = open_storage(run)
    try:
        card: dict[str, Any] = json.loads(files.read("card.json"))
    except FileNotFoundError as error:
        raise StoreMissingError(
            "a run has a card when it has finished", where=files.url, fix="check the path, or let the run finish"
        ) from error
    try:
        student, seen = card["student"], card["input"]
        named, num_classes = str(student["arch"]), int(student["num_classes"])
        size_px, interpolation = int(seen["size_px"]), seen["interpolation"]
        pixels_of = normaliser(tuple(seen["mean"]), tuple(seen["std"]), device)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("the card of a run says what its student is", actual=repr(error), where=files.url) from error
    if named.startswith("python:") and arch is None:
        raise ConfigError(
            "code that a card names is not run",
            actual=named,
            where=f"{files.url}/card.json",
            fix=f"name it yourself, if you trust it: --arch {named}",
        )
    weights = f"{files.url.rstrip('/')}/model.safetensors"
    network = build_network(arch or named, num_classes=num_classes, weights=weights).to(device)
    source = open_source(images if isinstance(images, str) else tuple(images))
    batches = EvaluationImages(source, size_px=size_px, interpolation=interpolation, batch_size=batch_size)
    for index in range(len(batches)):
        batch = batches[index]
        with torch.inference_mode():
            p = network(pixels_of(batch.pixels_u8_B3SS)).float().softmax(1)
        values, classes = p.topk(min(top, num_classes), dim=1)
        for row, image_id in enumerate(batch.image_ids):
            label = int(batch.targets_B[row])
            yield Classified(image_id, classes[row].tolist(), values[row].tolist(), None if label < 0 else label)
