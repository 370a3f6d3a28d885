"""Distillation methods by name, as job files ask for them: `method: {name: kd, temperature: 4, alpha: 0.9}`.

A method is a loss with its arguments, what it needs of a label store, and a check before training starts. Losses are
plain functions and can be used without this.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.hard import Reduction, hard_loss
from kddata.losses.kd import Backend, KDArgs, kd_loss
from kddata.losses.rows import Tail


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of the labels it trains on.

    Attributes:
        temperature: at which the tail mass must be known (any is, where k = C); None where no soft label is used.
        all_classes: whether k must be C.
        targets: whether ground truth is needed.
        sampled: whether classes must have been drawn at random instead of taken from the top.
    """

    temperature: float | None = None
    all_classes: bool = False
    targets: bool = False
    sampled: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss with its arguments. Call it as `method(student_logits_BC, labels, targets_B, **more)`; see `make`.

    `more` may hold reduction, ignore_index and weights_B, as in `kd_loss`. Labels may be None where
    `needs.temperature` is None.
    """

    name: str
    needs: Needs
    loss: Callable[..., Tensor]

    def __call__(
        self,
        student_logits_BC: Tensor,
        labels: SoftLabels | None,
        targets_B: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        weights_B: Tensor | None = None,
    ) -> Tensor:
        return self.loss(
            student_logits_BC,
            labels,
            targets_B,
            reduction=reduction,
            ignore_index=ignore_index,
            weights_B=weights_B,
        )

    def check(
        self,
        *,
        k: int,
        num_classes: int,
        temperatures: tuple[float, ...],
        has_targets: bool,
        sampled: bool = False,
        where: str = "the label store",
    ) -> None:
        """Raises ConfigError naming the piece that a store of such labels does not hold; call it before training."""
        needs, missing = self.needs, None
        if needs.targets and not has_targets:
            missing = "ground-truth labels of the images", "its images have none", _SOFT_ALONE
        elif needs.temperature is None:
            return
        elif needs.sampled and not sampled:
            missing = "classes drawn at random", "the top classes", "set method.tail to bucket"
        elif sampled and not needs.sampled:
            missing = "top classes", "classes drawn at random", "set method.tail to sampled"
        elif needs.all_classes and k != num_classes:
            missing = "all classes", f"k = {k} of {num_classes}", f"label again with labels.k={num_classes}"
        elif k != num_classes and needs.temperature not in temperatures:
            again = f"use one of these, or label again with labels.temperatures naming {needs.temperature:g}"
            missing = f"the tail mass at temperature {needs.temperature:g}", f"it at {list(temperatures)} alone", again
        if missing is not None:
            rule, actual, fix = missing
            raise ConfigError(f"method {self.name} needs {rule}", actual=actual, where=where, fix=fix)


_SOFT_ALONE = "learn from soft labels alone (method.name=kd method.alpha=1), or add the labels to the images"


def make(name: str, **args: Any) -> Method:
    """The method of a name. Raises ConfigError for an unknown name or argument, naming the nearest, and for bad values.

    kd: temperature, alpha=1.0, tail="bucket", label_smoothing=0.0, backend="auto"; see `kd_loss`.
    hard: label_smoothing=0.0; see `hard_loss`. Ground truth alone, the baseline.
    """
    if name not in _METHODS:
        raise _unknown("method.name", name, list(_METHODS))
    build = _METHODS[name]
    parameters = inspect.signature(build).parameters
    for key, value in args.items():
        if key not in parameters:
            raise _unknown(f"an argument of method {name}", key, list(parameters))
        if parameters[key].annotation == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"method.{key} is a number", actual=repr(value))
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in args]
    if missing:
        raise ConfigError(f"method {name} needs {', '.join(missing)}", actual=args or "no arguments")
    return build(**args)


def _kd(
    *,
    temperature: float,
    alpha: float = 1.0,
    tail: Tail = "bucket",
    label_smoothing: float = 0.0,
    backend: Backend = "auto",
) -> Method:
    args: dict[str, Any] = {
        "temperature": temperature,
        "alpha": alpha,
        "tail": tail,
        "label_smoothing": label_smoothing,
        "backend": backend,
    }
    KDArgs(**args)  # checks them, before any image is read
    needs = Needs(temperature=temperature, targets=alpha < 1, sampled=tail == "sampled")
    return Method(name="kd", needs=needs, loss=partial(kd_loss, **args))


def _hard(*, label_smoothing: float = 0.0) -> Method:
    return Method(name="hard", needs=Needs(targets=True), loss=partial(_hard_loss, label_smoothing=label_smoothing))


def _hard_loss(student_logits_BC: Tensor, labels: object, targets_B: Tensor | None, **more: Any) -> Tensor:
    if targets_B is None:
        raise ConfigError("method hard needs targets_B", actual="None", fix=_SOFT_ALONE)
    return hard_loss(student_logits_BC, targets_B, **more)


_METHODS: dict[str, Callable[..., Method]] = {"kd": _kd, "hard": _hard}


def _unknown(what: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    return ConfigError(
        f"{what} is one of {', '.join(known)}", actual=repr(name), fix=f"perhaps {near[0]} was meant" if near else None
    )
