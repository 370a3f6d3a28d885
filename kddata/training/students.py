"""Students: built, started from weights of another task, with BatchNorm frozen, and averaged over their steps.

Nothing here knows a loss or a batch. Trade-off: what is frozen is set again at every step, since evaluation between
steps leaves a network in another mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kddata.errors import ConfigError, TeacherError
from kddata.teacher import build_network
from kddata.training.job import OptimizerArgs, StudentArgs


def build_student(
    args: StudentArgs, *, size_px: int, seed: int, pixels_of: Callable[[Tensor], Tensor], device: str
) -> nn.Module:
    """The student on its device. Raises TeacherError unless it answers with one logit a class."""
    student = build_network(
        args.arch, num_classes=args.num_classes, weights=args.weights, seed=seed, new_head=args.new_head
    )
    if args.freeze_batchnorm:
        frozen = [module for module in student.modules() if isinstance(module, _BatchNorm)]
        if not frozen:
            raise ConfigError("student.freeze_batchnorm is for students with BatchNorm", actual="none", where=args.arch)
        for module in frozen:
            module.requires_grad_(False)
    student = student.to(device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = student(pixels_of(torch.zeros(1, 3, size_px, size_px, dtype=torch.uint8)))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, args.num_classes):
        raise TeacherError(
            f"a student answers a view with {args.num_classes} logits",
            actual=tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__,
            where=args.arch,
            fix="set student.num_classes to the width of the network's output",
        )
    return student


def to_train_mode(network: nn.Module) -> None:
    """Training mode, but for BatchNorm that is frozen: it keeps its statistics, and its weights have no gradient."""
    network.train()
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a student's weights and buffers: `average = decay average + (1 - decay) now`.

    It begins as the student after its first step. Call `update_parameters(student)` after each.
    """
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def make_optimizer(args: OptimizerArgs, network: nn.Module, student: nn.Module) -> Optimizer:
    """The optimizer of a student, and of what is learned beside it (`network` holds both), which learns at scale 1.

    Layers are the student's modules with weights of their own, in the order in which it was built. Counted from the
    last one, 0, the n-th has the scale `layer_lr_decay^n`, times `backbone_lr_scale` but for the last. A `scale` other
    than 1 anywhere makes a group for each.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [{"params": parameters}]
    if args.backbone_lr_scale != 1 or args.layer_lr_decay != 1:
        layers = [list(module.parameters(recurse=False)) for module in student.modules()]
        layers = [layer for layer in layers if layer]
        by_scale: dict[float, list[nn.Parameter]] = {}
        for depth, layer in enumerate(reversed(layers)):
            scale = args.layer_lr_decay**depth * (args.backbone_lr_scale if depth else 1.0)
            by_scale.setdefault(scale, []).extend(x for x in layer if x.requires_grad)
        own = {x for layer in layers for x in layer}
        by_scale.setdefault(1.0, []).extend(x for x in parameters if x not in own)
        groups = [{"params": found, "scale": scale} for scale, found in sorted(by_scale.items()) if found]
    if args.name == "adamw":
        betas = (args.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=args.lr, betas=betas, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
