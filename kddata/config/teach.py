"""The teach job file, and the plain job that it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kddata.config.label import IMAGENET_MEAN, IMAGENET_STD, Range, Rgb
from kddata.config.reading import (
    Count,
    Location,
    NotNegative,
    Positive,
    Section,
    Share,
    absolute,
    absolute_arch,
    absolute_weights,
    all_absolute,
)

if TYPE_CHECKING:
    from kddata.training.teach import TeachingJob


class Taught(Section):
    """`teacher:` who learns. weights: where it starts from, null for random ones.

    new_head: the weights are of another number of classes. freeze_batchnorm: its statistics and weights stay.
    """

    arch: str
    weights: str | None = None
    num_classes: Count
    new_head: bool = False
    freeze_batchnorm: bool = False
    size_px: Count
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD


class Crops(Section):
    """`views:` half of the views are random crops like those of a label job, half the views it is judged by."""

    policy: Literal["none", "color", "randaugment"] = "none"
    area: Range = (0.08, 1.0)
    aspect: Range = (3 / 4, 4 / 3)
    flip_p: Share = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    erase_p: Share = 0.0


class Sgd(Section):
    """`optimizer:` SGD with Nesterov momentum. epochs: passes over the images."""

    lr: Positive
    momentum: Share = 0.9
    weight_decay: NotNegative = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NotNegative = 0.0
    epochs: Count


class Place(Section):
    """`run:` the folder storage/name holds the result."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    storage: str = "runs"


class TeachFile(Section):
    """A teach job: labelled images -> a teacher. evaluate: images that it is judged on in the end."""

    images: Location
    teacher: Taught
    views: Crops = Crops()
    batch_size: Count = 64
    seed: int = 0
    optimizer: Sgd
    evaluate: Location | None = None
    run: Place
    threads: Count = 1
    loader_processes: Annotated[int, Field(ge=0)] = 0


def teaching_job(file: TeachFile) -> TeachingJob:
    """The plain job of a teach file. Paths become absolute."""
    from kddata.training import OptimizerArgs, StudentArgs
    from kddata.training.teach import TeachingJob
    from kddata.views import ViewPlan

    teacher = file.teacher
    return TeachingJob(
        images=all_absolute(file.images),
        run=absolute(file.run.storage).rstrip("/") + "/" + file.run.name,
        network=StudentArgs(
            arch=absolute_arch(teacher.arch),
            num_classes=teacher.num_classes,
            weights=absolute_weights(teacher.weights),
            new_head=teacher.new_head,
            freeze_batchnorm=teacher.freeze_batchnorm,
        ),
        plan=ViewPlan(seed=file.seed, **file.views.model_dump()),
        size_px=teacher.size_px,
        mean=teacher.mean,
        std=teacher.std,
        batch_size=file.batch_size,
        seed=file.seed,
        optimizer=OptimizerArgs(**file.optimizer.model_dump()),
        evaluate=None if file.evaluate is None else all_absolute(file.evaluate),
    )
