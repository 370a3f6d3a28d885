"""Trained: a student as it can be used, with what it expects of its input; from the folder of a run, or from weights.

The card of a run says how its student sees. It comes with the run, perhaps from elsewhere, so code that it names is
not run: a `python:` student is named by who calls. Trade-off: only finished runs are opened, not their checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kddata.errors import ConfigError, StoreMissingError
from kddata.store.storage import open_storage
from kddata.teacher import build_network
from kddata.training.predict import normaliser
from kddata.views import Interpolation


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedStudent:
    """A network in evaluation mode on a device, and how images are brought to it.

    Attributes:
        where: the run, or the weights, that it comes from.
        pixels_of: uint8 views [B, 3, S, S] with S = size_px -> its input, on its device.
    """

    where: str
    arch: str
    network: nn.Module
    num_classes: int
    size_px: int
    interpolation: Interpolation
    pixels_of: Callable[[Tensor], Tensor]


def open_student(run: str, *, arch: str | None = None, device: str = "cpu") -> TrainedStudent:
    """The student of a finished run, at a folder or URL.

    Args:
        arch: of the student, where its card names a `python:` callable.

    Raises StoreMissingError for a run that has not finished, and ConfigError for a card without what is needed.
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
        mean, std = tuple(map(float, seen["mean"])), tuple(map(float, seen["std"]))
        pixels_of = normaliser((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), device)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError("the card of a run says what its student is", actual=repr(error), where=files.url) from error
    if named.startswith("python:") and arch is None:
        raise ConfigError(
            "code that a card names is not run",
            actual=named,
            where=f"{files.url}/card.json",
            fix=f"name it yourself, if you trust it: --arch {named}, or arch={named} of an evaluate job",
        )
    weights = f"{files.url.rstrip('/')}/model.safetensors"
    network = build_network(arch or named, num_classes=num_classes, weights=weights)
    return TrainedStudent(
        where=files.url,
        arch=arch or named,
        network=network.to(device).eval(),
        num_classes=num_classes,
        size_px=size_px,
        interpolation=interpolation,
        pixels_of=pixels_of,
    )


def student_of_weights(
    weights: str,
    *,
    arch: str,
    num_classes: int,
    size_px: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    interpolation: Interpolation = "bilinear",
    device: str = "cpu",
) -> TrainedStudent:
    """A network of these weights, which may be another's than kddata's; see `teacher.build_network`."""
    network = build_network(arch, num_classes=num_classes, weights=weights)
    return TrainedStudent(
        where=weights,
        arch=arch,
        network=network.to(device).eval(),
        num_classes=num_classes,
        size_px=size_px,
        interpolation=interpolation,
        pixels_of=normaliser(mean, std, device),
    )
