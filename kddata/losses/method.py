"""Method: a loss with its arguments, what it needs, and the learned parts that go with it.

A method knows no names of others; `methods.make` builds one from a job file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.hard import Reduction
from kddata.losses.needs import Needs, Seen
from kddata.losses.terms import Shapes

OF_ROWS = ("kd", "hard", "dkd", "lskd", "nkd", "wsld", "ttm", "wttm", "ofa")
"""Methods whose loss of a row is that row's own, whatever else is in the batch."""

HARD_ALONE = "learn from soft labels alone (such as method.name=kd method.alpha=1), or add labels to the images"
_NOT_MIXED = "use method kd, hard, lskd, dist or ttm, or label with views.mix=none"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss with its arguments. Call it as `method(student_logits_BC, labels, targets_B, **more)`; see `make`.

    `more` may hold reduction, ignore_index, weights_B, and targets2_B and lam for mixed views, as in `kd_loss`. Labels
    may be None where `needs.temperatures` is empty.

    A method whose `needs` name tensors, learned parts or image ids is also given `student` and `outputs` (the captured
    and the stored tensors by name, one row for each view), `parts` (a module of `Method.parts`, trained with the
    student) and `image_ids`. A loss that is a property of the batch is carried whole by every row.
    """

    name: str
    needs: Needs
    loss: Callable[..., Tensor]
    build: Callable[[Shapes, Shapes], nn.Module] | None = None
    head: Callable[[Tensor, nn.Module], Tensor] | None = None
    terms: tuple[Method, ...] = ()

    def __call__(
        self,
        student_logits_BC: Tensor,
        labels: SoftLabels | None,
        targets_B: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        weights_B: Tensor | None = None,
        targets2_B: Tensor | None = None,
        lam: float | Tensor = 1.0,
        parts: nn.Module | None = None,
        student: Mapping[str, Tensor] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
        image_ids: list[str] | None = None,
    ) -> Tensor:
        if targets2_B is not None and self.needs.one_target:
            raise ConfigError(f"method {self.name} has one target for each view", actual="a pair", fix=_NOT_MIXED)
        more: dict[str, Any] = {} if targets2_B is None else {"targets2_B": targets2_B, "lam": lam}
        if self.needs.sees:
            seen = Seen(parts=parts, student=student or {}, outputs=outputs or {}, image_ids=image_ids)
            seen.check(self.name, self.needs)
            more["seen"] = seen
        return self.loss(
            student_logits_BC,
            labels,
            targets_B,
            reduction=reduction,
            ignore_index=ignore_index,
            weights_B=weights_B,
            **more,
        )

    def parts(self, student_shapes: Shapes, teacher_shapes: Shapes) -> nn.Module:
        """Its learned parts, new, from torch's global random numbers; an empty module where it has none.

        Shapes are of tensors by name without the batch; `student_shapes["logits"]` is (C,). Also called to check them:
        raises ConfigError where the shapes of both sides cannot be compared.
        """
        return nn.Module() if self.build is None else self.build(student_shapes, teacher_shapes)

    @property
    def of_rows(self) -> bool:
        """Whether the loss of each row is the row's own, so that a batch can be taken in parts."""
        return all(term.of_rows for term in self.terms) if self.terms else self.name in OF_ROWS

    def answer(self, student_logits_BC: Tensor, parts: nn.Module | None) -> Tensor:
        """The logits that classify, in training and at inference: the student's own, but for a method with a head."""
        if self.head is None:
            return student_logits_BC
        assert parts is not None
        return self.head(student_logits_BC, parts)

    def check(
        self,
        *,
        k: int,
        num_classes: int,
        temperatures: tuple[float, ...],
        has_targets: bool,
        sampled: bool = False,
        mixed: bool = False,
        outputs: tuple[str, ...] = (),
        views: int | None = None,
        where: str = "the label store",
        by: str = "label again with",
    ) -> None:
        """Raises ConfigError naming the piece that a store of such labels does not hold; call it before training.

        Args:
            views: of each image; None where that is not known.
            by: how the store comes to hold it, as the error words it.
        """
        for term in self.terms:
            term.check(
                k=k,
                num_classes=num_classes,
                temperatures=temperatures,
                has_targets=has_targets,
                sampled=sampled,
                mixed=mixed,
                outputs=outputs,
                views=views,
                where=where,
                by=by,
            )
        needs, missing = self.needs, None
        if absent := [name for name in needs.outputs if name not in outputs]:
            fix = f"{by} labels.outputs=[{', '.join([*outputs, *absent])}]"
            missing = f"the stored output {absent[0]}", ", ".join(outputs) or "none", fix
        elif views is not None and views < needs.views:
            missing = f"{needs.views} views of each image", str(views), f"{by} views.per_image={needs.views}"
        elif needs.targets and not has_targets:
            missing = "ground-truth labels of the images", "its images have none", HARD_ALONE
        elif needs.one_target and mixed:
            missing = "one class for each view", "views mixed of two images", _NOT_MIXED
        elif not needs.temperatures:
            return
        elif needs.sampled and not sampled:
            missing = "classes drawn at random", "the top classes", "set method.tail to bucket"
        elif sampled and not needs.sampled:
            fix = f"{by} labels.keep=top (or use method kd with tail sampled)"
            if self.name == "kd":
                fix = f"set method.tail to sampled, at temperature 1, or {by} labels.keep=top"
            missing = "top classes", "classes drawn at random", fix
        elif needs.all_classes and k != num_classes:
            fix = f"{by} labels.k={num_classes} (or set method.tail, where the method has it)"
            missing = "all classes", f"k = {k} of {num_classes}", fix
        elif k != num_classes and (unknown := [t for t in needs.temperatures if t not in temperatures]):
            wanted = ", ".join(f"{t:g}" for t in [*temperatures, *unknown])
            fix = f"use one of these, or {by} labels.temperatures=[{wanted}]"
            missing = f"the tail mass at temperature {unknown[0]:g}", f"it at {list(temperatures)} alone", fix
        if missing is not None:
            rule, actual, fix = missing
            raise ConfigError(f"method {self.name} needs {rule}", actual=actual, where=where, fix=fix)
