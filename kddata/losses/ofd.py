"""Overhaul of feature distillation: what a teacher's ReLU lets through, and little of what it holds back."""

from __future__ import annotations

import torch
from torch import Tensor

from kddata.losses.maps import pair, same_shape, wide

_SELDOM = 0.001


def ofd_margin(teacher_BCHW: Tensor) -> Tensor:
    """Mean over images and positions of the negative responses of each channel: [1, C, 1, 1], 0 where there is none.

    Of features before their ReLU. Source: Heo et al., arXiv 1904.01866, section 3.1: taken from data, as here, or from
    the BatchNorm before the ReLU, as in `batchnorm_margin`.
    """
    teacher_BCHW = wide(teacher_BCHW)
    below = teacher_BCHW.clamp_max(0)
    count = (teacher_BCHW < 0).sum((0, 2, 3), keepdim=True)
    return below.sum((0, 2, 3), keepdim=True) / count.clamp_min(1)


def batchnorm_margin(weight_C: Tensor, bias_C: Tensor) -> Tensor:
    """The expected negative response of each channel behind a BatchNorm: E[x | x < 0], x normal (bias, |weight|).

        margin = b - |w| phi(b / w) / Phi(-b / |w|), and -3 |w| for channels that are negative once in 1000 or less

    [1, C, 1, 1], float64, never above 0. Source: the same, section 3.1; the rule for channels that are hardly ever
    negative is that of its released code.
    """
    w, b = weight_C.double().abs(), bias_C.double()
    z = b / w.clamp_min(torch.finfo(torch.float64).tiny)
    share_below = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    mean_below = b - w * density / share_below.clamp_min(torch.finfo(torch.float64).tiny)
    margin = torch.where(share_below > _SELDOM, mean_below, -3 * w)
    return torch.where(w > 0, margin, b.clamp_max(0)).reshape(1, -1, 1, 1)


def ofd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, margin_1C11: Tensor) -> Tensor:
    """Partial L2: sum over elements of the squared distance of s to max(t, margin), the mean over images.

    Nothing where s <= t <= 0 or where both are below the margin. Source: the same, equations 1, 2 and 5.
    """
    s, t = pair(student_BCHW, teacher_BCHW)
    same_shape(s, t, "put the student's map through a Connector")
    target = t.maximum(margin_1C11.to(s))
    kept = (t > 0) | (s > target)
    return ((s - target).square() * kept).sum() / max(1, len(s))
