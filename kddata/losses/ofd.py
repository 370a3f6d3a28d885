"""Overhaul of feature distillation: what a teacher's ReLU lets through, and little of what it holds back."""

from __future__ import annotations

from torch import Tensor

from kddata.losses.maps import pair, same_shape, wide


def ofd_margin(teacher_BCHW: Tensor) -> Tensor:
    """Mean over images and positions of the negative responses of each channel: [1, C, 1, 1], 0 where there is none.

    Of features before their ReLU. Source: Heo et al., arXiv 1904.01866, section 3.1: taken from data, as here, or from
    the BatchNorm before the ReLU.
    """
    teacher_BCHW = wide(teacher_BCHW)
    below = teacher_BCHW.clamp_max(0)
    count = (teacher_BCHW < 0).sum((0, 2, 3), keepdim=True)
    return below.sum((0, 2, 3), keepdim=True) / count.clamp_min(1)


def ofd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, margin_1C11: Tensor) -> Tensor:
    """Partial L2: sum over elements of the squared distance of s to max(t, margin), the mean over images.

    Nothing where s <= t <= 0 or where both are below the margin. Source: the same, equations 1, 2 and 5.
    """
    s, t = pair(student_BCHW, teacher_BCHW)
    same_shape(s, t, "put the student's map through a Connector")
    target = t.maximum(margin_1C11.to(s))
    kept = (t > 0) | (s > target)
    return ((s - target).square() * kept).sum() / max(1, len(s))
