"""The evaluate job file: who is judged, on what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kddata.config.label import IMAGENET_MEAN, IMAGENET_STD, Rgb
from kddata.config.reading import (
    Count,
    Location,
    Section,
    absolute_arch,
    absolute_weights,
)
from kddata.errors import ConfigError

if TYPE_CHECKING:
    from kddata.training import TrainedStudent


class Judged(Section):
    """`student:` a network that no run of kddata left."""

    arch: str
    weights: str
    num_classes: Count
    size_px: Count
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class EvaluateFile(Section):
    """An evaluate job: the student of a run, or one of weights, judged on labelled images, by a store, or both.

    arch: of a run's student that is code. views: at most so many of the store's; null for all.
    """

    run: str | None = None
    arch: str | None = None
    student: Judged | None = None
    images: Location | None = None
    store: str | None = None
    store_images: Location | None = None
    views: Count | None = 10_000
    batch_size: Count = 256
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Count = 1
    loader_processes: Annotated[int, Field(ge=0)] = 0


def judged_student(file: EvaluateFile) -> TrainedStudent:
    """The student of an evaluate file, opened. Raises ConfigError unless it names exactly one."""
    from kddata.training import open_student, student_of_weights

    named, student = [name for name in ("run", "student") if getattr(file, name) is not None], file.student
    if len(named) != 1 or (student is not None and file.arch is not None):
        raise ConfigError(
            "an evaluate job names run, with arch where that is code, or student",
            actual=" and ".join(named + ["arch"] * (file.arch is not None)) or "none of them",
            fix="set what is not meant to null, such as student=null",
        )
    if student is None:
        assert file.run is not None
        return open_student(file.run, arch=None if file.arch is None else absolute_arch(file.arch), device=file.device)
    weights = absolute_weights(student.weights)
    assert weights is not None
    return student_of_weights(
        weights,
        arch=absolute_arch(student.arch),
        num_classes=student.num_classes,
        size_px=student.size_px,
        mean=student.mean,
        std=student.std,
        interpolation=student.interpolation,
        device=file.device,
    )
