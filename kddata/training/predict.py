"""Prediction: what a network says about images, one evaluation view of each. Scores are made of it elsewhere.

Trade-off: the logits of all images are kept, in float32 on the CPU, so that arms can be compared image by image.

Shapes: B images of a batch, N images, C classes, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kddata.evaluation import Scores, score
from kddata.replay import ImageBatch


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a network said about N images.

    Attributes:
        logits_NC: float32, on the CPU.
        targets_N: ground truth, int64, -1 for none.
        image_ids: which images they are, in the order of their source.
    """

    logits_NC: Tensor
    targets_N: Tensor
    image_ids: list[str]

    def score(self, teacher: Predictions | None = None) -> Scores:
        """Scores of every image, beside a teacher's predictions of the same images where there are any."""
        return score(self.logits_NC, self.targets_N, None if teacher is None else teacher.logits_NC)


def normaliser(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: str
) -> Callable[[Tensor], Tensor]:
    """A function that brings views [B, 3, S, S], of 0 to 255, to a device as (x / 255 - mean) / std, channels last."""
    mean_311, std_311 = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    def pixels_of(pixels_u8_B3SS: Tensor) -> Tensor:
        on_device = pixels_u8_B3SS.to(device, non_blocking=True, memory_format=torch.channels_last)
        return on_device.to(torch.float32, copy=True).div_(255).sub_(mean_311).div_(std_311)

    return pixels_of


@torch.inference_mode()
def predict(network: nn.Module, batches: Iterable[ImageBatch], pixels_of: Callable[[Tensor], Tensor]) -> Predictions:
    """The network's answers, in evaluation mode; see `replay.evaluation_loader` and `normaliser`."""
    network.eval()
    logits, targets, image_ids = [], [], []
    for batch in batches:
        logits.append(network(pixels_of(batch.pixels_u8_B3SS)).float().cpu())
        targets.append(batch.targets_B)
        image_ids += batch.image_ids
    return Predictions(logits_NC=torch.cat(logits), targets_N=torch.cat(targets), image_ids=image_ids)
