"""Distillation methods by name, as job files ask for them: `method: {name: kd, temperature: 4, alpha: 0.9}`.

A method is a loss with its arguments, what it needs of a label store, and a check before training starts. Losses are
plain functions and can be used without this.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.dist import dist_loss
from kddata.losses.dkd import dkd_loss
from kddata.losses.hard import Reduction, hard_loss
from kddata.losses.kd import KDArgs, kd_loss
from kddata.losses.lskd import lskd_loss
from kddata.losses.nkd import nkd_loss
from kddata.losses.ofa import ofa_loss
from kddata.losses.ttm import ttm_loss
from kddata.losses.wsld import wsld_loss


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of the labels it trains on.

    Attributes:
        temperatures: at which the tail mass must be known (any is, where k = C); none where no soft label is used.
        all_classes: whether k must be C.
        targets: whether ground truth is needed.
        sampled: whether classes must have been drawn at random instead of taken from the top.
        one_target: whether the loss itself tells one class of each view from the others, so that views are not mixed.
    """

    temperatures: tuple[float, ...] = ()
    all_classes: bool = False
    targets: bool = False
    sampled: bool = False
    one_target: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """A loss with its arguments. Call it as `method(student_logits_BC, labels, targets_B, **more)`; see `make`.

    `more` may hold reduction, ignore_index, weights_B, and targets2_B and lam for mixed views, as in `kd_loss`. Labels
    may be None where `needs.temperatures` is empty.
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
        targets2_B: Tensor | None = None,
        lam: float | Tensor = 1.0,
    ) -> Tensor:
        if targets2_B is not None and self.needs.one_target:
            raise ConfigError(f"method {self.name} has one target for each view", actual="a pair", fix=_NOT_MIXED)
        pair = {} if targets2_B is None else {"targets2_B": targets2_B, "lam": lam}
        return self.loss(
            student_logits_BC,
            labels,
            targets_B,
            reduction=reduction,
            ignore_index=ignore_index,
            weights_B=weights_B,
            **pair,
        )

    def check(
        self,
        *,
        k: int,
        num_classes: int,
        temperatures: tuple[float, ...],
        has_targets: bool,
        sampled: bool = False,
        mixed: bool = False,
        where: str = "the label store",
    ) -> None:
        """Raises ConfigError naming the piece that a store of such labels does not hold; call it before training."""
        needs, missing = self.needs, None
        if needs.targets and not has_targets:
            missing = "ground-truth labels of the images", "its images have none", _HARD_ALONE
        elif needs.one_target and mixed:
            missing = "one class for each view", "views mixed of two images", _NOT_MIXED
        elif not needs.temperatures:
            return
        elif needs.sampled and not sampled:
            missing = "classes drawn at random", "the top classes", "set method.tail to bucket"
        elif sampled and not needs.sampled:
            missing = "top classes", "classes drawn at random", "set method.tail to sampled"
        elif needs.all_classes and k != num_classes:
            fix = f"label again with labels.k={num_classes} (or set method.tail, where the method has it)"
            missing = "all classes", f"k = {k} of {num_classes}", fix
        elif k != num_classes and (unknown := [t for t in needs.temperatures if t not in temperatures]):
            fix = f"use one of these, or label again with labels.temperatures naming {unknown[0]:g}"
            missing = f"the tail mass at temperature {unknown[0]:g}", f"it at {list(temperatures)} alone", fix
        if missing is not None:
            rule, actual, fix = missing
            raise ConfigError(f"method {self.name} needs {rule}", actual=actual, where=where, fix=fix)


_HARD_ALONE = "learn from soft labels alone (such as method.name=kd method.alpha=1), or add labels to the images"
_NOT_MIXED = "use method kd, hard, lskd, dist or ttm, or label with views.mix=none"
_OF_A_BATCH = {"reduction", "ignore_index", "weights_B", "targets2_B", "lam", "on_stats", "debug"}
_WEIGHTS = {"weight": 1.0, "hard_weight": 1.0}


class _Entry(NamedTuple):
    loss: Callable[..., Tensor]
    needs: Callable[[dict[str, Any]], Needs]  # of all arguments, defaults filled in
    weighted: bool = True  # whether `weight` and `hard_weight` are arguments too


def make(name: str, **args: Any) -> Method:
    """The method of a name. Raises ConfigError for an unknown name or argument, naming the nearest, and for bad values.

        kd      temperature, alpha=1, tail="bucket", label_smoothing=0, backend="auto"; see `kd_loss`
        hard    label_smoothing=0; ground truth alone, the baseline
        dkd     temperature=4, alpha=1, beta=8, standardized=False, tail=None, backend="auto"
        lskd    temperature=2
        nkd     temperature=1, gamma=1.5, tail=None
        wsld    temperature=4, alpha=2.25, tail=None
        dist    temperature=1, beta=1, gamma=1, tail=None
        ttm     temperature=4, weighted=False
        ofa     temperature=1, eps=1.5, tail=None

    From dkd on, the loss is `weight * method + hard_weight * cross-entropy` (both 1 by default), and all classes are
    needed (k = C), unless `tail` names how to spread the rest: uniform or renorm. See the functions of these names.
    """
    if name not in _METHODS:
        raise _unknown("method.name", name, list(_METHODS))
    entry = _METHODS[name]
    known = {key: p for key, p in inspect.signature(entry.loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    values = {key: p.default for key, p in known.items() if key not in _OF_A_BATCH}
    values |= _WEIGHTS if entry.weighted else {}
    for key, value in args.items():
        if key not in values:
            raise _unknown(f"an argument of method {name}", key, list(values))
        _check_value(key, value, "float" if key in _WEIGHTS else known[key].annotation)
    values |= args
    missing = [key for key, value in values.items() if value is inspect.Parameter.empty]
    if missing:
        raise ConfigError(f"method {name} needs {', '.join(missing)}", actual=args or "no arguments")
    if name == "kd":
        KDArgs(**values)  # checks them, before any image is read
    needs = entry.needs(values)
    if not entry.weighted:
        return Method(name=name, needs=needs, loss=partial(entry.loss, **values))
    weight, hard_weight = (values.pop(key) for key in _WEIGHTS)
    loss = partial(_weighted, loss=partial(entry.loss, **values), weight=weight, hard_weight=hard_weight)
    return Method(name=name, needs=replace(needs, targets=needs.targets or hard_weight != 0), loss=loss)


def _check_value(key: str, value: object, annotation: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation == "float" and not (number and math.isfinite(value)):  # type: ignore[arg-type]
        raise ConfigError(f"method.{key} is a number", actual=repr(value))
    if key == "temperature" and value <= 0:  # type: ignore[operator]
        raise ConfigError("method.temperature is above 0", actual=value)
    if annotation == "bool" and not isinstance(value, bool):
        raise ConfigError(f"method.{key} is true or false", actual=repr(value))
    if annotation == "Backend" and value not in ("auto", "torch", "triton"):
        raise ConfigError(f"method.{key} is auto, torch or triton", actual=repr(value))
    if annotation == "DenseTail | None" and value not in (None, "uniform", "renorm"):
        raise ConfigError(f"method.{key} is uniform, renorm or null", actual=repr(value))


def _hard(
    student_logits_BC: Tensor,
    labels: object,
    targets_B: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
    targets2_B: Tensor | None = None,
    lam: float | Tensor = 1.0,
) -> Tensor:
    if targets_B is None:
        raise ConfigError("cross-entropy needs targets_B", actual="None", fix=_HARD_ALONE)
    return hard_loss(
        student_logits_BC,
        targets_B,
        label_smoothing=label_smoothing,
        reduction=reduction,
        ignore_index=ignore_index,
        weights_B=weights_B,
        targets2_B=targets2_B,
        lam=lam,
    )


def _weighted(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None,
    *,
    loss: Callable[..., Tensor],
    weight: float,
    hard_weight: float,
    targets2_B: Tensor | None = None,
    lam: float | Tensor = 1.0,
    **more: Any,
) -> Tensor:
    total = weight * loss(student_logits_BC, labels, targets_B, **more)
    if not hard_weight:
        return total
    hard = _hard(student_logits_BC, labels, targets_B, targets2_B=targets2_B, lam=lam, **more)
    return total + hard_weight * hard


def _dense(args: dict[str, Any], *, targets: bool = False, at_1: bool = False) -> Needs:
    """Of a loss over all classes: at T, and where `at_1` also at temperature 1."""
    temperatures = (1.0, args["temperature"]) if at_1 else (args["temperature"],)
    all_classes = args.get("tail") is None or args.get("standardized", False)
    return Needs(temperatures=temperatures, all_classes=all_classes, targets=targets, one_target=targets)


def _kd_needs(args: dict[str, Any]) -> Needs:
    return Needs(temperatures=(args["temperature"],), targets=args["alpha"] < 1, sampled=args["tail"] == "sampled")


_METHODS: dict[str, _Entry] = {
    "kd": _Entry(kd_loss, _kd_needs, weighted=False),
    "hard": _Entry(_hard, lambda args: Needs(targets=True), weighted=False),
    "dkd": _Entry(dkd_loss, partial(_dense, targets=True)),
    "lskd": _Entry(lskd_loss, _dense),
    "nkd": _Entry(nkd_loss, partial(_dense, targets=True, at_1=True)),
    "wsld": _Entry(wsld_loss, partial(_dense, targets=True, at_1=True)),
    "dist": _Entry(dist_loss, _dense),
    "ttm": _Entry(ttm_loss, _dense),
    "ofa": _Entry(ofa_loss, partial(_dense, targets=True)),
}


def _unknown(what: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    return ConfigError(
        f"{what} is one of {', '.join(known)}", actual=repr(name), fix=f"perhaps {near[0]} was meant" if near else None
    )
