"""Curriculum temperature: a learned temperature that works against the student, more so as training goes on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kddata.labels import SoftLabels
from kddata.losses.dense import batch, kl, reduce_rows, teacher_log_p
from kddata.losses.hard import Reduction


def ctkd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperature: Tensor,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """T^2 KL(teacher_T || student_T), differentiable in T too. Targets are not used.

    Needs all classes (k = C), since T is not known beforehand. Source: Li et al., arXiv 2211.16231, equation 2.
    """
    dense = batch(student_logits_BC, labels)
    t = temperature.to(dense.logits_BC)
    log_p = (teacher_log_p(dense, temperature=1.0) / t).log_softmax(1)
    loss_B = t**2 * kl(log_p, (dense.logits_BC / t).log_softmax(1))
    return reduce_rows(dense, loss_B, reduction=reduction, weights_B=weights_B, known_only=False)


class LearnedTemperature(nn.Module):
    """start + span * sigmoid(x) of one learned number x, whose gradient is reversed: it climbs the loss.

    The reversal's strength rises as half a cosine from 0 to 1 over the first `ramp_steps` calls in training mode; the
    count of them is part of the state. Source: the same, equations 4, 6 and 7 (its global form).
    """

    calls: Tensor

    def __init__(self, *, start: float = 1.0, span: float = 20.0, ramp_steps: int = 0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(1))
        self.start, self.span, self.ramp_steps = start, span, ramp_steps
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        share = min(1.0, int(self.calls) / self.ramp_steps) if self.ramp_steps else 1.0
        if self.training:
            self.calls += 1
        return self.start + self.span * _Reversed.apply(self.x, (1 - math.cos(math.pi * share)) / 2).sigmoid()


class _Reversed(torch.autograd.Function):
    """x itself, with -strength times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -ctx.strength * grad, None
