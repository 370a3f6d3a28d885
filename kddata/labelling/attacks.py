"""Attacks: the boundary samples of views, as a store keeps them.

A sample is made by at most ten forward and backward passes of the teacher, and answered by one more: some 31 forward
passes a view. Trade-off: its attack class is one draw a view, so that a store has one sample of each view, where a
teacher in the loop could attack another class each epoch; more views of an image have more classes.

Shapes: B views, C classes, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kddata import boundary, rng
from kddata.cards import StoreSpec
from kddata.errors import ConfigError
from kddata.teacher import Answers


def boundary_shapes(num_classes: int, size_px: int) -> dict[str, tuple[int, ...]]:
    """Of the outputs that `boundary_outputs` makes, without the batch. Raises ConfigError for one class."""
    if num_classes < 2:
        raise ConfigError("a boundary lies between two classes", actual=f"teacher.num_classes {num_classes}")
    return {"boundary": (3, size_px, size_px), "boundary_logits": (num_classes,)}


def boundary_outputs(
    spec: StoreSpec,
    teacher: Answers,
    pixels_u8_B3SS: Tensor,
    logits_BC: Tensor,
    image_ids: Sequence[str],
    views: Sequence[int],
) -> dict[str, Tensor]:
    """`boundary` and `boundary_logits` of views that the teacher answered with these logits: a pure function of them.

    The sample is the teacher's input in pixels of 0 to 255, rounded to float16; the logits are those of that rounded
    image. It is attacked towards a class that is drawn by the teacher's probabilities, by image id and view.
    """
    keys = zip(image_ids, views, strict=True)
    draws = [rng.unit_interval(spec.plan.seed, "boundary", image_id, int(view)) for image_id, view in keys]
    attack_class_B = boundary.attack_classes(logits_BC, torch.tensor(draws, dtype=torch.float64))
    return dict(zip(boundary.NAMES, teacher.boundary(pixels_u8_B3SS, attack_class_B), strict=True))
