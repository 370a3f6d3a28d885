"""Needs: what a method asks of a label store and of its student; Seen: what it is shown of them in a step.

Names of tensors are `embedding`, `attention:NODE`, `features:NODE` and `fsp:NODE:NODE`, the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from kddata.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of the labels it trains on, and of its student.

    Attributes:
        temperatures: at which the tail mass must be known (any is, where k = C); none where no soft label is used.
        all_classes: whether k must be C.
        targets: whether ground truth is needed.
        sampled: whether classes must have been drawn at random instead of taken from the top.
        one_target: whether the loss itself tells one class of each view from the others, so that views are not mixed.
        outputs: names of the teacher's tensors that the store must hold.
        student: names of the student's tensors that are captured in each step.
        parts: whether it has learned parts, built by `Method.parts`, trained and saved with the student.
        head: whether the student's answers are those of its parts, at inference too; see `Method.answer`.
        image_ids: whether it must know which image each row is.
        one_worker: whether one process must see every row.
        boundary: whether the student also answers the stored boundary samples, as its tensor `boundary_logits`.
        cohort: peers: it is called with the logits of the other students, `peers` [B, P, C]; branches: with those of
            all branches of one student, `branches` [B, M, C], and their `gate` [B, M].
        branches: how many those are; node: after which module they part.
        views: so many views of each image are in a step, where it has one.
        classifiers: (safetensors file, layer) of each teacher's classifier that it reads.
    """

    temperatures: tuple[float, ...] = ()
    all_classes: bool = False
    targets: bool = False
    sampled: bool = False
    one_target: bool = False
    outputs: tuple[str, ...] = ()
    student: tuple[str, ...] = ()
    parts: bool = False
    head: bool = False
    image_ids: bool = False
    one_worker: bool = False
    boundary: bool = False
    cohort: Literal["", "peers", "branches"] = ""
    branches: int = 0
    node: str = ""
    views: int = 1
    classifiers: tuple[tuple[str, str], ...] = ()

    @property
    def sees(self) -> bool:
        """Whether it is called with more than logits, labels and targets."""
        return self.of_features or self.image_ids or self.cohort != ""

    @property
    def live(self) -> tuple[str, ...]:
        """Names of the tensors that a cohort makes."""
        return {"": (), "peers": ("peers",), "branches": ("branches", "gate")}[self.cohort]

    @property
    def of_features(self) -> bool:
        """Whether it is called with tensors or parts."""
        return bool(self.outputs or self.student or self.parts)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a method is shown in a step, beside logits and labels: rows of every tensor are the views of the batch.

    Attributes:
        parts: its learned parts, or None where it has none.
        student: captured tensors of the student, by name.
        outputs: stored tensors of the teacher, by name.
        image_ids: of the rows.
    """

    parts: nn.Module | None = None
    student: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    image_ids: list[str] | None = None

    def check(self, name: str, needs: Needs) -> None:
        """Raises ConfigError naming what a method needs and was not given."""
        missing = [f"outputs[{x!r}]" for x in needs.outputs if x not in self.outputs]
        missing += [f"student[{x!r}]" for x in needs.student if x not in self.student]
        missing += [f"student[{x!r}]" for x in needs.live if x not in self.student]
        missing += ["parts"] if needs.parts and self.parts is None else []
        missing += ["image_ids"] if needs.image_ids and self.image_ids is None else []
        if missing:
            raise ConfigError(
                f"method {name} is called with all that it needs",
                actual=f"without {', '.join(missing)}",
                fix="capture what method.needs names, and build method.parts(...) once",
            )
