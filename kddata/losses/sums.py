"""A sum of methods, each with its weight, as one method: its needs are those of all, its parts a list of theirs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.method import Method
from kddata.losses.needs import Needs, Seen
from kddata.losses.terms import Shapes


def sum_of(terms: Sequence[Method], weights: Sequence[float]) -> Method:
    """The method whose loss is the sum of weight * loss. Raises ConfigError for terms that cannot learn together."""
    if len({x.needs.sampled for x in terms if x.needs.temperatures}) > 1:
        raise ConfigError("terms of a sum learn from one kind of labels", actual="sampled and top classes")
    if live := [x.name for x in terms if x.needs.cohort]:
        raise ConfigError("terms of a sum are of one student", actual=f"method {live[0]}", fix="train with it alone")
    heads = [i for i, x in enumerate(terms) if x.head is not None]
    if len(heads) > 1:
        raise ConfigError("at most one term of a sum has a head", actual=[terms[i].name for i in heads])
    return Method(
        name="sum",
        needs=_joined([x.needs for x in terms]),
        loss=partial(_sum_of, terms=tuple(terms), weights=tuple(weights)),
        build=partial(_build, terms=tuple(terms)),
        head=partial(_head_of, term=terms[heads[0]], index=heads[0]) if heads else None,
        terms=tuple(terms),
    )


def _joined(needs: list[Needs]) -> Needs:
    """What all of them need."""
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(Needs)):
        values = [getattr(x, name) for x in needs]
        if isinstance(values[0], bool):
            found[name] = any(values)
        elif isinstance(values[0], str):
            found[name] = values[0]
        elif isinstance(values[0], int):
            found[name] = max(values)
        else:
            found[name] = tuple(dict.fromkeys(itertools.chain(*values)))
    return Needs(**found)


def _build(student: Shapes, teacher: Shapes, *, terms: tuple[Method, ...]) -> nn.Module:
    return nn.ModuleList(term.parts(student, teacher) for term in terms)


def _head_of(logits_BC: Tensor, parts: nn.Module, *, term: Method, index: int) -> Tensor:
    assert isinstance(parts, nn.ModuleList)
    return term.answer(logits_BC, parts[index])


def _sum_of(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None,
    *,
    terms: tuple[Method, ...],
    weights: tuple[float, ...],
    seen: Seen | None = None,
    **more: Any,
) -> Tensor:
    total = []
    for i, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        look: dict[str, Any] = {}
        if seen is not None and term.needs.sees:
            parts = seen.parts[i] if isinstance(seen.parts, nn.ModuleList) else None
            look = {"parts": parts, "student": seen.student, "outputs": seen.outputs, "image_ids": seen.image_ids}
        total.append(weight * term(student_logits_BC, labels, targets_B, **look, **more))
    return torch.stack(total).sum(0)
