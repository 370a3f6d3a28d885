"""What losses on features share: pairs of student and teacher tensors, in one precision, of one size.

Everything is computed in float32 at least, in float64 where the student's tensors are; the teacher's are constants.

Shapes: B images, C channels, H x W positions, D width of a flat tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kddata.errors import ConfigError
from kddata.features import same_size as same_size
from kddata.losses.rows import compute_dtype


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the precision of the computation, the teacher without gradient. Raises ConfigError unless rows agree."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher) or not student.is_floating_point():
        raise ConfigError(
            "student and teacher tensors hold one row for each image",
            actual=f"{tuple(student.shape)} {student.dtype} and {tuple(teacher.shape)}",
        )
    dtype = compute_dtype(student.dtype)
    if teacher.is_inference():
        teacher = teacher.clone()  # autograd keeps no tensors of inference mode
    return student.to(dtype), teacher.detach().to(student.device, dtype)


def pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """One pair for each stage. Raises ConfigError unless both sides have as many, and at least one."""
    if isinstance(student, Tensor) or isinstance(teacher, Tensor) or not len(student) == len(teacher) > 0:
        raise ConfigError(
            "a loss over stages takes a list of tensors of each side, of one length",
            actual=" and ".join("a tensor" if isinstance(x, Tensor) else str(len(x)) for x in (student, teacher)),
        )
    return [pair(s, t) for s, t in zip(student, teacher, strict=True)]


def same_shape(student: Tensor, teacher: Tensor, fix: str) -> None:
    """Raises ConfigError unless both have one shape."""
    if student.shape != teacher.shape:
        raise ConfigError(
            "student and teacher tensors have one shape",
            actual=f"{tuple(student.shape)} and {tuple(teacher.shape)}",
            fix=fix,
        )


def wide(x: Tensor) -> Tensor:
    """In the precision of the computation."""
    return x.to(compute_dtype(x.dtype))


def flat(x: Tensor) -> Tensor:
    """[B, D]: one row for each image."""
    return x.reshape(len(x), -1)
