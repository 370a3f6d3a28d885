"""The exam: the labelled images that a student is judged on, every so many epochs.

Trade-off: rank 0 alone is examined, while the others wait for it in the next step's gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kddata.errors import ConfigError
from kddata.images import open_source
from kddata.replay import EvaluationImages, step_loader
from kddata.store import LabelStore
from kddata.training.job import EvaluationArgs
from kddata.training.predict import predict


class Exam:
    """Images to judge a student on, opened. Raises ConfigError where none has a label."""

    def __init__(
        self,
        args: EvaluationArgs,
        store: LabelStore,
        *,
        size_px: int,
        pixels_of: Callable[[Tensor], Tensor],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        interpolation = store.spec.plan.interpolation
        images = EvaluationImages(open_source(args.images), size_px=size_px, interpolation=interpolation)
        if images.num_labelled == 0:
            raise ConfigError(
                "images that a student is judged on have labels",
                actual="none has",
                where=args.images,
                fix="put them into a folder for each class, or tars with .cls files; `kddata predict` needs no labels",
            )
        self._args, self._pixels_of = args, pixels_of
        self._batches = step_loader(images, range(len(images)), num_workers=num_workers, pin_memory=pin_memory)

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether the student is judged after an epoch, counted from 0."""
        return self._args.is_due(epoch, epochs)

    def summary(self, network: nn.Module) -> dict[str, Any]:
        """The scores of a network, by name; see `evaluation.Scores.summary`."""
        return predict(network, self._batches, self._pixels_of).score().summary()
