"""Serving: whether what a label job keeps serves the methods that are to train from it, before any teacher is loaded.

Only what the job itself says is looked at: whether images have ground truth, and whether layers exist, is found later.
Trade-off: a method named without its arguments is taken to compare whatever the job keeps, so that a name alone finds a
missing kind of output, and the mapping finds a missing layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from kddata import losses
from kddata.errors import ConfigError
from kddata.features import parse
from kddata.labelling.job import LabellingJob
from kddata.losses.methods import METHODS

_KINDS = {"at": "attention", "fsp": "fsp"}  # of the outputs of other methods on nodes: features
_WRITE = {"features": "features:NODE", "attention": "attention:NODE", "fsp": "fsp:NODE:NODE"}


def require_served(job: LabellingJob, methods: Sequence[str | Mapping[str, Any]]) -> None:
    """Raises ConfigError naming the first piece that a method needs and the store of this job would not hold.

    Args:
        methods: each a name, or {"name": ..., and its arguments} as in a train job.
    """
    for method in methods:
        values = {"name": method} if isinstance(method, str) else dict(method)
        made = losses.make(**_filled(values, job))
        made.check(
            k=job.k,
            num_classes=job.teacher.num_classes,
            temperatures=(1.0, *(t for t in job.temperatures if t != 1)),
            has_targets=True,
            sampled=job.keep == "sampled",
            mixed=job.plan.has_mix,
            outputs=job.outputs,
            views=job.views_per_image,
            where="for_methods",
            by="set",
        )
        for url, layer in made.needs.classifiers:
            losses.TeacherClassifier.load(url, layer)


def _filled(values: dict[str, Any], job: LabellingJob) -> dict[str, Any]:
    """A method with the arguments that it lacks taken from the job, in the terms of a sum too.

    Nodes are those of the outputs that the job keeps; the classifier is that of the teacher.
    """
    name = values.get("name")
    if not isinstance(name, str):
        raise ConfigError(
            "a method has a name", actual=values, where="for_methods", fix="such as kd, or {name: kd, temperature: 4}"
        )
    if name == "sum" and isinstance(values.get("terms"), (list, tuple)):
        terms = [_filled(dict(term), job) if isinstance(term, Mapping) else term for term in values["terms"]]
        return {**values, "terms": terms}
    if name not in METHODS:
        return values  # `make` names the nearest
    known = inspect.signature(METHODS[name].loss).parameters.values()
    lacking = {p.name for p in known if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in values}
    if name == "kd" and "temperature" in lacking:
        values = {**values, "temperature": job.temperatures[0]}
        if job.keep == "sampled":
            values = {"tail": "sampled", **values}
    if "node" in lacking:  # of the student
        values = {**values, "node": "layer"}
    if "num_images" in lacking:
        values = {**values, "num_images": 1}
    if "classifier" in lacking:
        values = {**values, "classifier": _classifier_of(job)}
    sides = {"teacher_nodes", "student_nodes"}, {"teacher_pairs", "student_pairs"}
    for teacher, student in (sorted(side, reverse=True) for side in sides):
        if teacher in lacking:
            values = {**values, teacher: _kept(name, job)}
        if student in lacking:  # of which only their number matters to a store; srrl has one
            values = {**values, student: values.get(teacher, ["layer"])}
    return values


def _kept(name: str, job: LabellingJob) -> list[Any]:
    """The nodes, or pairs of nodes, of the outputs of a method's kind that a job keeps."""
    kind = _KINDS.get(name, "features")
    named = [parse(output) for output in job.outputs]
    nodes = [list(of) if kind == "fsp" else of[0] for found, of in named if found == kind]
    if not nodes:
        raise ConfigError(
            f"method {name} needs stored outputs {_WRITE[kind]}",
            actual=", ".join(job.outputs) or "none",
            where="for_methods",
            fix=f"set labels.outputs=[{', '.join([*job.outputs, _WRITE[kind]])}], NODE being a layer of the teacher",
        )
    return nodes


def _classifier_of(job: LabellingJob) -> str:
    url = job.teacher.weights
    if url is None or not url.endswith(".safetensors"):
        raise ConfigError(
            "the teacher's classifier is read from a safetensors file",
            actual=f"teacher.weights {url}",
            where="for_methods",
            fix="name it as in a train job: {name: srrl, classifier: FILE.safetensors, classifier_layer: LAYER}",
        )
    return url
