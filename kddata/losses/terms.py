"""Methods on features and relations: which tensors each compares, by name, and which learned parts stand between.

A term is a function of what was seen in a step; the losses themselves are plain functions in the files of their names.
Trade-off: nodes of both sides are named by the job, in one order, since no rule pairs layers of two architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.ab import ab_loss
from kddata.losses.at import at_loss
from kddata.losses.bss import bss_loss
from kddata.losses.cc import cc_loss
from kddata.losses.crd import ContrastiveBank
from kddata.losses.fitnets import HintRegressor, fitnets_loss
from kddata.losses.fsp import fsp_loss
from kddata.losses.ft import ft_loss
from kddata.losses.maps import flat, same_size
from kddata.losses.needs import Needs, Seen
from kddata.losses.nst import nst_loss
from kddata.losses.ofd import batchnorm_margin, ofd_loss, ofd_margin
from kddata.losses.pkt import pkt_loss
from kddata.losses.reviewkd import ReviewFusion, reviewkd_loss
from kddata.losses.rkd import rkd_loss
from kddata.losses.sp import sp_loss
from kddata.losses.srrl import Connector, TeacherClassifier, srrl_loss
from kddata.losses.vid import VariationalRegressor
from kddata.losses.weights import read_weights

Nodes = Sequence[str]
Pairs = Sequence[Sequence[str]]
Shapes = Mapping[str, Sequence[int]]
"""Of tensors by name, without the batch: (C, H, W), or (D,)."""

Arguments = Mapping[str, Any]


class Term(NamedTuple):
    """A loss of what was seen, what it compares, and the parts it learns, or checks shapes with (None: neither)."""

    loss: Callable[..., Tensor]  # (seen, **arguments) -> the mean over the batch
    outputs: Callable[[Arguments], tuple[str, ...]]
    student: Callable[[Arguments], tuple[str, ...]]
    parts: Callable[[Arguments, Shapes, Shapes], nn.Module] | None = None
    image_ids: bool = False
    boundary: bool = False
    classifiers: Callable[[Arguments], tuple[tuple[str, str], ...]] = lambda args: ()

    def needs(self, args: Arguments) -> Needs:
        """Raises ConfigError where the two sides name different numbers of tensors."""
        outputs, student = self.outputs(args), self.student(args)
        if len(outputs) != len(student):
            raise ConfigError("a method names as many teacher's as student's tensors", actual=f"{outputs}, {student}")
        parts = self.parts is not None
        return Needs(
            outputs=("boundary", *outputs) if self.boundary else outputs,
            student=student,
            parts=parts,
            image_ids=self.image_ids,
            one_worker=self.image_ids,  # a bank of all images
            boundary=self.boundary,
            classifiers=self.classifiers(args),
        )


def _stored(kind: str) -> Callable[[Arguments], tuple[str, ...]]:
    return lambda args: tuple(f"{kind}:{node}" for node in args["teacher_nodes"])


def _captured(args: Arguments) -> tuple[str, ...]:
    return tuple(f"features:{node}" for node in args["student_nodes"])


def _sides(seen: Seen, student: tuple[str, ...], outputs: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    return [seen.student[name] for name in student], [seen.outputs[name] for name in outputs]


def _maps(
    seen: Seen, teacher_nodes: Nodes, student_nodes: Nodes, kind: str = "features"
) -> tuple[list[Tensor], list[Tensor]]:
    args = {"teacher_nodes": teacher_nodes, "student_nodes": student_nodes}
    return _sides(seen, _captured(args), _stored(kind)(args))


def _channels(shapes: Shapes, names: tuple[str, ...]) -> list[int]:
    for name in names:
        if len(shapes[name]) != 3:
            raise ConfigError("a feature map is [C, H, W]", actual=tuple(shapes[name]), where=name)
    return [shapes[name][0] for name in names]


def _for_each(part: Callable[[int, int], nn.Module]) -> Callable[[Arguments, Shapes, Shapes], nn.Module]:
    """Of each pair of nodes, built from the channels of both sides."""

    def build(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
        channels = _channels(student, _captured(args)), _channels(teacher, _stored("features")(args))
        return nn.ModuleList(part(s, t) for s, t in zip(*channels, strict=True))

    return build


def _at(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes, eps: float = 0.0) -> Tensor:
    return at_loss(*_maps(seen, teacher_nodes, student_nodes, "attention"), eps=eps)


def _nst(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes) -> Tensor:
    return nst_loss(*_maps(seen, teacher_nodes, student_nodes))


def _ft(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes) -> Tensor:
    return _sum(ft_loss(s, t) for s, t in zip(*_maps(seen, teacher_nodes, student_nodes), strict=True))


def _fitnets(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes) -> Tensor:
    stages = zip(_list(seen), *_maps(seen, teacher_nodes, student_nodes), strict=True)
    return _sum(fitnets_loss(*regressor(s, t)) for regressor, s, t in stages)


def _vid(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes) -> Tensor:
    stages = zip(_list(seen), *_maps(seen, teacher_nodes, student_nodes), strict=True)
    return _sum(regressor(s, t) for regressor, s, t in stages)


def _ofd(
    seen: Seen,
    *,
    teacher_nodes: Nodes,
    student_nodes: Nodes,
    teacher_weights: str | None = None,
    batchnorms: Nodes | None = None,
) -> Tensor:
    """Earlier stages count half as much as the next."""
    student, teacher = _maps(seen, teacher_nodes, student_nodes)
    total = []
    for i, (connect, s, t) in enumerate(zip(_list(seen), student, teacher, strict=True)):
        margin = ofd_margin(t) if teacher_weights is None else connect.get_buffer("margin_1C11")
        s, t = same_size(connect(s), t)
        total.append(ofd_loss(s, t, margin) / 2 ** (len(student) - 1 - i))
    return _sum(total)


def _ofd_parts(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
    """Connectors, which hold the margins where these come from the teacher's BatchNorms."""
    parts = _for_each(_before_relu)(args, student, teacher)
    assert isinstance(parts, nn.ModuleList)
    url, layers = args["teacher_weights"], args["batchnorms"] or args["teacher_nodes"]
    if url is None and args["batchnorms"] is None:
        return parts
    if url is None or len(layers) != len(parts):
        raise ConfigError(
            f"ofd's margins are of {len(parts)} BatchNorms in the teacher's weights, one for each of its nodes",
            actual=f"method.teacher_weights {url}, method.batchnorms {list(layers)}",
        )
    fix = "set method.batchnorms to the BatchNorm before each node's ReLU, or leave method.teacher_weights out"
    for part, layer, node in zip(parts, layers, _stored("features")(args), strict=True):
        names = [f"{layer}.weight", f"{layer}.bias"]
        found = read_weights(url, "teacher_weights", names, ndim=1, kind="BatchNorm", fix=fix)
        (channels,) = _channels(teacher, (node,))
        if found[0].shape != (channels,):
            raise ConfigError(
                f"a BatchNorm has the {channels} channels of {node}",
                actual=list(found[0].shape),
                where=f"{url}, {layer}",
            )
        part.register_buffer("margin_1C11", batchnorm_margin(*found).float())
    return parts


def _ab(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes, margin: float = 1.0) -> Tensor:
    student, teacher = _maps(seen, teacher_nodes, student_nodes)
    sized = [same_size(connect(s), t) for connect, s, t in zip(_list(seen), student, teacher, strict=True)]
    return ab_loss([s for s, _ in sized], [t for _, t in sized], margin=margin)


def _reviewkd(seen: Seen, *, teacher_nodes: Nodes, student_nodes: Nodes, max_middle: int = 512) -> Tensor:
    student, teacher = _maps(seen, teacher_nodes, student_nodes)
    assert seen.parts is not None
    return reviewkd_loss(seen.parts(student, [t.shape[-2:] for t in teacher]), teacher)


def _fusion(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
    channels = _channels(student, _captured(args)), _channels(teacher, _stored("features")(args))
    return ReviewFusion(*channels, max_middle=args["max_middle"])


def _fsp_names(side: str) -> Callable[[Arguments], tuple[str, ...]]:
    return lambda args: tuple(f"fsp:{first}:{second}" for first, second in args[f"{side}_pairs"])


def _fsp(seen: Seen, *, teacher_pairs: Pairs, student_pairs: Pairs) -> Tensor:
    args = {"teacher_pairs": teacher_pairs, "student_pairs": student_pairs}
    return fsp_loss(*_sides(seen, _fsp_names("student")(args), _fsp_names("teacher")(args)))


def _fsp_fits(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
    """Nothing to learn; refuses layers of other widths before the first step."""
    for mine, theirs in zip(_fsp_names("student")(args), _fsp_names("teacher")(args), strict=True):
        if tuple(student[mine]) != tuple(teacher[theirs]):
            raise ConfigError(
                "FSP compares layers of the same widths",
                actual=f"{mine} {list(student[mine])} and {theirs} {list(teacher[theirs])}",
                fix="name pairs of layers whose numbers of channels agree",
            )
    return nn.Module()


def _of_vectors(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def term(seen: Seen, *, teacher_output: str = "embedding", student_output: str = "embedding") -> Tensor:
        return loss(seen.student[student_output], seen.outputs[teacher_output])

    return term


def _rkd(
    seen: Seen,
    *,
    teacher_output: str = "embedding",
    student_output: str = "embedding",
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    weights = {"distance_weight": distance_weight, "angle_weight": angle_weight}
    return rkd_loss(seen.student[student_output], seen.outputs[teacher_output], **weights)


def _cc(seen: Seen, *, teacher_output: str = "embedding", student_output: str = "embedding") -> Tensor:
    assert seen.parts is not None
    return cc_loss(seen.parts(flat(seen.student[student_output])), flat(seen.outputs[teacher_output]))


def _projector(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
    return nn.Linear(math.prod(student[args["student_output"]]), math.prod(teacher[args["teacher_output"]]))


def _crd(
    seen: Seen,
    *,
    num_images: int,
    teacher_output: str = "embedding",
    student_output: str = "embedding",
    width: int = 128,
    negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> Tensor:
    bank = seen.parts
    assert isinstance(bank, ContrastiveBank)
    assert seen.image_ids is not None
    rows = bank.rows_of(seen.image_ids)
    return bank(flat(seen.student[student_output]), flat(seen.outputs[teacher_output]), rows, bank.others(rows))


def _bank(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
    widths = math.prod(student[args["student_output"]]), math.prod(teacher[args["teacher_output"]])
    options = {name: args[name] for name in ("width", "negatives", "temperature", "momentum")}
    return ContrastiveBank(*widths, num_rows=args["num_images"], **options)


def _srrl(
    seen: Seen,
    *,
    classifier: str,
    student_nodes: Nodes,
    classifier_layer: str = "fc",
    alpha: float = 1.0,
    beta: float = 5.0,
) -> Tensor:
    assert isinstance(seen.parts, nn.ModuleDict)
    (name,) = _captured({"student_nodes": student_nodes})
    student, teacher = seen.parts["connector"](seen.student[name]), seen.outputs["embedding"]
    logits, of_teacher = (seen.parts["classifier"](x) for x in (student.flatten(2).mean(2), teacher))
    return srrl_loss(student, teacher, logits, of_teacher, alpha=alpha, beta=beta)


def _classifier(args: Arguments) -> tuple[tuple[str, str], ...]:
    return ((args["classifier"], args["classifier_layer"]),)


def _srrl_parts(args: Arguments, student: Shapes, teacher: Shapes) -> nn.Module:
    classifier = TeacherClassifier.load(args["classifier"], args["classifier_layer"])
    (channels,), (width,) = _channels(student, _captured(args)), teacher["embedding"]
    if classifier.weight_CD.shape[1] != width:
        raise ConfigError(
            f"the teacher's classifier takes its embedding of {width} values",
            actual=f"weight {tuple(classifier.weight_CD.shape)}",
            where=f"{args['classifier']}, {args['classifier_layer']}.weight",
        )
    return nn.ModuleDict({"connector": Connector(channels, width), "classifier": classifier})


def _bss(seen: Seen, *, temperature: float = 3.0) -> Tensor:
    """Of every view alike: the paper leaves out views that teacher or student are wrong about, and its weight falls."""
    logits_BC = seen.outputs["boundary_logits"]
    labels = SoftLabels.from_logits(logits_BC, k=logits_BC.shape[1])
    return bss_loss(seen.student["boundary_logits"], labels, temperature=temperature)


def _boundary_logits(args: Arguments) -> tuple[str, ...]:
    return ("boundary_logits",)


def _list(seen: Seen) -> nn.ModuleList:
    assert isinstance(seen.parts, nn.ModuleList)
    return seen.parts


def _sum(values: Any) -> Tensor:
    return torch.stack(list(values)).sum()


def _before_relu(student_channels: int, teacher_channels: int) -> nn.Module:
    return Connector(student_channels, teacher_channels, relu=False)


def _vectors(side: str) -> Callable[[Arguments], tuple[str, ...]]:
    return lambda args: (args[f"{side}_output"],)


_FEATURES, _TEACHER, _STUDENT = _stored("features"), _vectors("teacher"), _vectors("student")

TERMS: dict[str, Term] = {
    "at": Term(_at, _stored("attention"), _captured),
    "sp": Term(_of_vectors(lambda s, t: sp_loss([s], [t])), _TEACHER, _STUDENT),
    "rkd": Term(_rkd, _TEACHER, _STUDENT),
    "fsp": Term(_fsp, _fsp_names("teacher"), _fsp_names("student"), _fsp_fits),
    "fitnets": Term(_fitnets, _FEATURES, _captured, _for_each(HintRegressor)),
    "pkt": Term(_of_vectors(pkt_loss), _TEACHER, _STUDENT),
    "cc": Term(_cc, _TEACHER, _STUDENT, _projector),
    "nst": Term(_nst, _FEATURES, _captured),
    "vid": Term(_vid, _FEATURES, _captured, _for_each(VariationalRegressor)),
    "srrl": Term(_srrl, lambda args: ("embedding",), _captured, _srrl_parts, classifiers=_classifier),
    "crd": Term(_crd, _TEACHER, _STUDENT, _bank, image_ids=True),
    "reviewkd": Term(_reviewkd, _FEATURES, _captured, _fusion),
    "ofd": Term(_ofd, _FEATURES, _captured, _ofd_parts),
    "ft": Term(_ft, _FEATURES, _captured),
    "bss": Term(_bss, _boundary_logits, _boundary_logits, boundary=True),
    "ab": Term(_ab, _FEATURES, _captured, _for_each(_before_relu)),
}
