"""TrainingJob: what is trained, on what and how, as plain values. The config layer builds it from a job file.

Nothing here knows a loop. Trade-off: a job names things (an architecture, a loss, URLs) and checks names late, where
they are built, so that this module imports none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kddata.corruption import ClassImbalance, LabelNoise
from kddata.errors import ConfigError
from kddata.evaluation import METRICS
from kddata.store import Subset
from kddata.teacher import TeacherArgs


@dataclass(frozen=True, kw_only=True)
class StudentArgs:
    """Who learns: see `teacher.build_network`. Without weights it starts from random ones, drawn by `data.seed`.

    Attributes:
        new_head: the weights are of another number of classes: the last layer starts from random ones.
        freeze_batchnorm: BatchNorm keeps the statistics and the weights that it starts with.
        precision: of the forward pass in training; bfloat16 is autocast, and weights stay in float32.
        compile: by torch.compile, for training and evaluation; slow to start. Weights keep the names that they have.
    """

    arch: str
    num_classes: int
    weights: str | None = None
    new_head: bool = False
    freeze_batchnorm: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError("student.precision is float32 or bfloat16", actual=repr(self.precision))
        if self.new_head and self.weights is None:
            raise ConfigError("student.new_head is for a student that starts from weights", actual="weights: null")


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """What it learns from.

    Attributes:
        batch_size: rows of a step over all ranks.
        size_px: side of the student's input.
        seed: of the order, and of initial weights.
        subset: which images; see `store.choose`. None for all.
        noise, imbalance: of the ground truth; see `kddata.corruption`. The store keeps the true one.
        views_per_visit: at most so many views of an image are cut from one decode; see `kddata.order`.
        views_together: so many views of an image stand side by side in a step.
    """

    batch_size: int
    size_px: int
    seed: int = 0
    subset: Subset | None = None
    noise: LabelNoise | None = None
    imbalance: ClassImbalance | None = None
    views_per_visit: int = 1
    views_together: int = 1

    def __post_init__(self) -> None:
        if self.views_per_visit < 1:
            raise ConfigError("data.views_per_visit is at least 1", actual=self.views_per_visit)
        if self.views_together < 1:
            raise ConfigError("data.views_together is at least 1", actual=self.views_together)


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """How it learns.

    Attributes:
        name: SGD with momentum, or AdamW with `momentum` as its beta 1.
        lr: the largest learning rate.
        schedule: after a linear rise over `warmup_epochs`, falling as half a cosine to 0, or constant.
        epochs: passes over all views of the store.
        accumulate: micro-batches of a step, which pass through the student one after the other, for large batches on
            little memory. The step is that of the whole batch, to rounding; but BatchNorm sees a part of it at a time.
        clip_norm: most norm of the gradient of a step; None for any.
        ema: decay of a moving average of the weights, which is then what is judged and kept; None for none.
        backbone_lr_scale: learning rate of all layers but the last, as a multiple of the last one's.
        layer_lr_decay: learning rate of each layer, as a multiple of that of the layer after it.
    """

    lr: float
    epochs: int
    name: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    backbone_lr_scale: float = 1.0
    layer_lr_decay: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("name", ("sgd", "adamw")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"optimizer.{name} is one of {', '.join(allowed)}", actual=repr(getattr(self, name)))
        if self.accumulate < 1:
            raise ConfigError("optimizer.accumulate is at least 1", actual=self.accumulate)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError("optimizer.clip_norm is above 0", actual=self.clip_norm)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError("optimizer.ema is between 0 and 1", actual=self.ema)
        if not self.backbone_lr_scale >= 0:
            raise ConfigError("optimizer.backbone_lr_scale is at least 0", actual=self.backbone_lr_scale)
        if not 0 < self.layer_lr_decay <= 1:
            raise ConfigError("optimizer.layer_lr_decay is above 0 and at most 1", actual=self.layer_lr_decay)
        if self.epochs < 1 or not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(
                "optimizer.epochs is at least 1, and warm-up lies within them",
                actual=f"{self.epochs} epochs, warmup_epochs {self.warmup_epochs}",
            )

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from the first step of epoch 0."""
        warmup, total = round(self.warmup_epochs * steps_per_epoch), self.epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@dataclass(frozen=True, kw_only=True)
class FirstStageArgs:
    """How the first epochs of a run in two stages train; see `kddata.training.stages`.

    Attributes:
        method: as a job's; its `hard_weight` is 0 where it is not named, so that hints alone are followed.
        epochs: passes over all views, before those of the optimizer.
        lr: largest learning rate; None for that of the optimizer, whose other values hold here too, but for the next.
        weight_decay: which also shrinks the layers that a hint does not reach.
    """

    method: Mapping[str, Any]
    epochs: int
    lr: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError("first_stage.epochs is at least 1", actual=self.epochs)


@dataclass(frozen=True, kw_only=True)
class CacheArgs:
    """A local folder of each node for copies of images that are far away, and most bytes of them."""

    folder: str
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """What the student is judged on: a source with labels, every so many epochs and after the last.

    Attributes:
        patience: training ends after so many evaluations in a row that are no better than the best one before them,
            and the student of the best one is what is kept. None: all epochs, and the last student.
        metric: what is better: top1 and top5 where they are higher, nll, brier and ece where they are lower.
    """

    images: str | tuple[str, ...]
    every_epochs: int = 1
    metric: Literal["top1", "top5", "nll", "brier", "ece"] = "top1"
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"evaluate.metric is one of {', '.join(METRICS)}", actual=repr(self.metric))
        if self.patience is not None and self.patience < 1:
            raise ConfigError("evaluate.patience is at least 1", actual=self.patience)
        if self.every_epochs < 1:
            raise ConfigError("evaluate.every_epochs is at least 1", actual=self.every_epochs)

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether the student is judged after an epoch, counted from 0."""
        return epoch == epochs - 1 or (epoch + 1) % self.every_epochs == 0


@dataclass(frozen=True, kw_only=True)
class Member:
    """Another store of an ensemble: its URL, and the weight of what its teacher said."""

    url: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One student from one store, or from several over the same views.

    Attributes:
        store: URL of a committed store.
        weight: of its loss.
        others: further stores, whose teachers are heard too.
        combine: "losses": the loss is the weighted sum of the loss against each store's labels, ground truth included,
            by the weights as they are; "mixture": it is the loss against the weighted mixture of all teachers'
            probabilities at temperature 1, where all keep all classes.
        run: URL of the folder of this run, for checkpoints and its result.
        method: {"name": of a loss, and its arguments}.
        cache: of images, on the local disk of whoever trains.
        images: where the images lie now, if they moved since they were labelled.
        peers: the other students of a cohort that learns from each other (method dml).
        teacher: a teacher in the loop: it labels the same views anew, in place of the stored labels. It must be the
            store's own.
        first_stage: what the student learns before; None for nothing.
        export: whether the result is kept as a torch.export program too; see `kddata.training.program`.
        checkpoint_steps: a checkpoint every so many steps, beside the one after each epoch.
    """

    store: str
    run: str
    student: StudentArgs
    method: Mapping[str, Any]
    data: DataArgs
    optimizer: OptimizerArgs
    images: str | tuple[str, ...] | None = None
    cache: CacheArgs | None = None
    evaluate: EvaluationArgs | None = None
    peers: tuple[StudentArgs, ...] = ()
    teacher: TeacherArgs | None = None
    first_stage: FirstStageArgs | None = None
    export: bool = False
    checkpoint_steps: int | None = None
    weight: float = 1.0
    others: tuple[Member, ...] = ()
    combine: Literal["losses", "mixture"] = "losses"
