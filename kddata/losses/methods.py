"""Distillation methods by name, as job files ask for them: `method: {name: kd, temperature: 4, alpha: 0.9}`.

A method is a loss with its arguments, what it needs of a label store, and a check before training starts. Losses are
plain functions and can be used without this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from kddata.errors import ConfigError
from kddata.labels import DenseTail, SoftLabels
from kddata.losses.aekt import ClassHead, aekt_loss
from kddata.losses.arguments import check_value, unknown
from kddata.losses.ctkd import LearnedTemperature, ctkd_loss
from kddata.losses.dist import dist_loss
from kddata.losses.dkd import dkd_loss
from kddata.losses.dml import dml_loss
from kddata.losses.hard import Reduction, hard_loss
from kddata.losses.kd import KDArgs, kd_loss
from kddata.losses.lskd import lskd_loss
from kddata.losses.method import HARD_ALONE, Method
from kddata.losses.mlkd import MLKD_TEMPERATURES, mlkd_loss
from kddata.losses.needs import Needs, Seen
from kddata.losses.nkd import nkd_loss
from kddata.losses.ofa import ofa_loss
from kddata.losses.one import one_loss
from kddata.losses.sums import sum_of
from kddata.losses.terms import TERMS, Shapes
from kddata.losses.ttm import ttm_loss, wttm_loss
from kddata.losses.wsld import wsld_loss

_OF_A_BATCH = {"seen", "reduction", "ignore_index", "weights_B", "targets2_B", "lam", "on_stats", "debug"}
_WEIGHTS = {"weight": 1.0, "hard_weight": 1.0}


class _Entry(NamedTuple):
    loss: Callable[..., Tensor]
    needs: Callable[[dict[str, Any]], Needs]  # of all arguments, defaults filled in
    weighted: bool = True  # whether `weight` and `hard_weight` are arguments too
    parts: Callable[[Mapping[str, Any], Shapes, Shapes], nn.Module] | None = None
    head: Callable[[Tensor, nn.Module], Tensor] | None = None
    of_features: bool = False  # a loss of what was seen alone
    sees: bool = False  # whether the loss is given what was seen


def make(name: str, **args: Any) -> Method:
    """The method of a name. Raises ConfigError for an unknown name or argument, naming the nearest, and for bad values.

        kd      temperature, alpha=1, tail="bucket", label_smoothing=0, backend="auto"; see `kd_loss`
        hard    label_smoothing=0; ground truth alone, the baseline
        dkd     temperature=4, alpha=1, beta=8, standardized=False, tail=None, backend="auto"
        lskd    temperature=2
        nkd     temperature=1, gamma=1.5, tail=None
        wsld    temperature=4, alpha=2.25, tail=None
        dist    temperature=1, beta=1, gamma=1, tail=None
        ttm     temperature=4, weighted=False; wttm is ttm with weighted
        ofa     temperature=1, eps=1.5, tail=None
        mlkd    temperatures=(2, 3, 4, 5, 6), tail=None
        ctkd    start=1, span=20, ramp_steps=0; a learned temperature
        aekt    temperature=4, explicit=1, implicit=1, max_ratio=2, tail=None; a learned head
        dml     teacher=False; mutual learning of several students, with a cached teacher as one more peer
        one     node, branches=3, temperature=3, teacher=False; branches of one student and their gate, with their own
                cross-entropy
        sum     terms: a list of methods, each with its `weight`

    From dkd to aekt, the loss is `weight * method + hard_weight * cross-entropy` (both 1 by default), and all classes
    are needed (k = C), unless `tail` names how to spread the rest: uniform or renorm. See the functions of these names.

    On features and relations, with `weight` and `hard_weight` too, and no soft labels:

        at, nst, ft                teacher_nodes, student_nodes: lists of layers, compared one by one; at: eps=0
        fitnets, vid, ofd, ab      the same, with learned parts; ab: margin=1; ofd: teacher_weights=None,
                                   batchnorms=None (the teacher_nodes): margins from the teacher's BatchNorms
        reviewkd                   the same, from shallow to deep; max_middle=512
        fsp                        teacher_pairs, student_pairs: lists of two layers each
        sp, rkd, pkt, cc           teacher_output="embedding", student_output="embedding", or features:NODE;
                                   rkd: distance_weight=25, angle_weight=50
        crd                        the same, and num_images, width=128, negatives=16384, temperature=0.07, momentum=0.5
        bss                        temperature=3; the student also answers the stored boundary samples
        srrl                       classifier (the teacher's weights), classifier_layer="fc", student_nodes (one),
                                   alpha=1, beta=5

    In a sum, `weight` is 1 where it is not named and `hard_weight` 0, so that cross-entropy is a term of its own
    ({name: hard}), or part of kd's alpha.
    """
    if name == "sum":
        return _make_sum(**args)
    if name not in METHODS:
        raise unknown("method.name", name, [*METHODS, "sum"])
    entry = METHODS[name]
    known = {key: p for key, p in inspect.signature(entry.loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    values = {key: p.default for key, p in known.items() if key not in _OF_A_BATCH}
    values |= _WEIGHTS if entry.weighted else {}
    for key, value in args.items():
        if key not in values:
            raise unknown(f"an argument of method {name}", key, list(values))
        check_value(key, value, "float" if key in _WEIGHTS else known[key].annotation)
    values |= args
    missing = [key for key, value in values.items() if value is inspect.Parameter.empty]
    if missing:
        raise ConfigError(f"method {name} needs {', '.join(missing)}", actual=args or "no arguments")
    if name == "kd":
        KDArgs(**values)  # checks them, before any image is read
    needs = entry.needs(values)
    build = None if entry.parts is None else partial(entry.parts, dict(values))
    if not entry.weighted:
        return Method(name=name, needs=needs, loss=partial(entry.loss, **values))
    weight, hard_weight = (values.pop(key) for key in _WEIGHTS)
    inner = partial(_of_features, term=partial(entry.loss, **values)) if entry.of_features else None
    loss = partial(
        _weighted,
        loss=inner or partial(entry.loss, **values),
        weight=weight,
        hard_weight=hard_weight,
        head=entry.head,
        sees=entry.of_features or entry.sees,
    )
    needs = replace(needs, targets=needs.targets or hard_weight != 0)
    return Method(name=name, needs=needs, loss=loss, build=build, head=entry.head)


def _make_sum(**args: Any) -> Method:
    """`terms` is a list of methods by name, each with its weight."""
    terms = args.pop("terms", None)
    listed = isinstance(terms, (list, tuple)) and len(terms) > 0
    if args or not listed or not all(isinstance(x, Mapping) and isinstance(x.get("name"), str) for x in terms):
        raise ConfigError(
            "method sum has one argument, terms: a list of methods",
            actual=[*args, "terms"] if args else terms,
            fix="such as terms: [{name: kd, temperature: 4, weight: 1}, {name: sp, weight: 3000}]",
        )
    made, weights = [], []
    for term in terms:
        values = dict(term)
        weighted = values["name"] in METHODS and METHODS[values["name"]].weighted
        weights.append(1.0 if weighted else values.pop("weight", 1.0))
        check_value("weight", weights[-1], "float")
        made.append(make(**({"hard_weight": 0.0} | values if weighted else values)))
    return sum_of(made, weights)


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
        raise ConfigError("cross-entropy needs targets_B", actual="None", fix=HARD_ALONE)
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
    head: Callable[[Tensor, nn.Module], Tensor] | None,
    sees: bool,
    seen: Seen | None = None,
    targets2_B: Tensor | None = None,
    lam: float | Tensor = 1.0,
    **more: Any,
) -> Tensor:
    look = {"seen": seen} if sees else {}
    total = weight * loss(student_logits_BC, labels, targets_B, **look, **more)
    if not hard_weight:
        return total
    answer_BC = student_logits_BC
    if head is not None:
        assert seen is not None
        assert seen.parts is not None
        answer_BC = head(student_logits_BC, seen.parts)
    hard = _hard(answer_BC, labels, targets_B, targets2_B=targets2_B, lam=lam, **more)
    return total + hard_weight * hard


def _of_features(
    student_logits_BC: Tensor,
    labels: object,
    targets_B: object,
    *,
    term: Callable[..., Tensor],
    seen: Seen,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """A mean over the batch, which every row carries whole."""
    if weights_B is not None:
        raise ConfigError("losses on features weigh all rows alike", actual="weights_B", fix="leave weights_B out")
    value = term(seen)
    if reduction == "mean":
        return value
    value_B = value.expand(len(student_logits_BC))
    return value_B if reduction == "none" else value_B.sum()


def _mlkd(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None,
    *,
    seen: Seen,
    temperatures: Sequence[float] = MLKD_TEMPERATURES,
    tail: DenseTail | None = None,
    **more: Any,
) -> Tensor:
    """Of the views of each image apart: its first one in the batch among the first ones, and so on."""
    return mlkd_loss(
        student_logits_BC, labels, targets_B, temperatures=temperatures, tail=tail, image_ids=seen.image_ids, **more
    )


def _ctkd(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None,
    *,
    seen: Seen,
    start: float = 1.0,
    span: float = 20.0,
    ramp_steps: int = 0,
    **more: Any,
) -> Tensor:
    assert seen.parts is not None
    return ctkd_loss(student_logits_BC, labels, targets_B, temperature=seen.parts(), **more)


def _dml(
    student_logits_BC: Tensor,
    labels: SoftLabels | None,
    targets_B: Tensor | None,
    *,
    seen: Seen,
    teacher: bool = False,
    ignore_index: int = -100,
    **more: Any,
) -> Tensor:
    return dml_loss(student_logits_BC, seen.student["peers"], labels if teacher else None, **more)


def _one(
    student_logits_BC: Tensor,
    labels: SoftLabels | None,
    targets_B: Tensor | None,
    *,
    node: str,
    seen: Seen | None = None,
    branches: int = 3,
    temperature: float = 3.0,
    teacher: bool = False,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    if targets_B is None or seen is None:
        raise ConfigError("method one needs targets_B and its branches", actual="None", fix=HARD_ALONE)
    return one_loss(
        seen.student["branches"],
        seen.student["gate"],
        targets_B,
        labels if teacher else None,
        temperature=temperature,
        reduction=reduction,
        ignore_index=ignore_index,
        weights_B=weights_B,
    )


def _dml_needs(args: dict[str, Any]) -> Needs:
    return Needs(cohort="peers", temperatures=(1.0,) if args["teacher"] else (), one_target=True)


def _one_needs(args: dict[str, Any]) -> Needs:
    if args["branches"] < 2:
        raise ConfigError("method one has two branches or more", actual=args["branches"], where="method.branches")
    return Needs(
        cohort="branches",
        branches=args["branches"],
        node=args["node"],
        temperatures=(args["temperature"],) if args["teacher"] else (),
        targets=True,
        one_target=True,
    )


def _without(args: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key not in names}


def _class_head(logits_BC: Tensor, parts: nn.Module) -> Tensor:
    return parts(logits_BC)


def _dense(args: dict[str, Any], *, targets: bool = False, at_1: bool = False) -> Needs:
    """Of a loss over all classes: at T, and where `at_1` also at temperature 1."""
    temperatures = (1.0, args["temperature"]) if at_1 else (args["temperature"],)
    all_classes = args.get("tail") is None or args.get("standardized", False)
    return Needs(temperatures=temperatures, all_classes=all_classes, targets=targets, one_target=targets)


def _kd_needs(args: dict[str, Any]) -> Needs:
    return Needs(temperatures=(args["temperature"],), targets=args["alpha"] < 1, sampled=args["tail"] == "sampled")


METHODS: dict[str, _Entry] = {
    "kd": _Entry(kd_loss, _kd_needs, weighted=False),
    "hard": _Entry(_hard, lambda args: Needs(targets=True), weighted=False),
    "dkd": _Entry(dkd_loss, partial(_dense, targets=True)),
    "lskd": _Entry(lskd_loss, _dense),
    "nkd": _Entry(nkd_loss, partial(_dense, targets=True, at_1=True)),
    "wsld": _Entry(wsld_loss, partial(_dense, targets=True, at_1=True)),
    "dist": _Entry(dist_loss, _dense),
    "ttm": _Entry(ttm_loss, _dense),
    "wttm": _Entry(wttm_loss, _dense),
    "ofa": _Entry(ofa_loss, partial(_dense, targets=True)),
    "mlkd": _Entry(
        _mlkd,
        lambda args: Needs(
            temperatures=tuple(args["temperatures"]), all_classes=args["tail"] is None, views=2, image_ids=True
        ),
        sees=True,
    ),
    "ctkd": _Entry(
        _ctkd,
        lambda args: Needs(temperatures=(1.0,), all_classes=True, parts=True),
        parts=lambda args, student, teacher: LearnedTemperature(**_without(args, *_WEIGHTS)),
        sees=True,
    ),
    "aekt": _Entry(
        aekt_loss,
        lambda args: replace(_dense(args, targets=True), parts=True, head=True),
        parts=lambda args, student, teacher: ClassHead(*student["logits"]),
        head=_class_head,
    ),
    "dml": _Entry(_dml, _dml_needs, sees=True),
    "one": _Entry(_one, _one_needs, weighted=False, sees=True),
    **{name: _Entry(term.loss, term.needs, parts=term.parts, of_features=True) for name, term in TERMS.items()},
}
