"""Variational information distillation: a student's features tell their teacher's, with a variance for each channel."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kddata.losses.maps import pair, same_shape, same_size

EPS = 1e-5


def vid_loss(mean_BCHW: Tensor, teacher_BCHW: Tensor, log_scale_C: Tensor, *, eps: float = EPS) -> Tensor:
    """Mean of ((t - mean)^2 / v_c + log v_c) / 2, v = softplus(log_scale) + eps: a Gaussian's log-likelihood.

    Source: Ahn et al., arXiv 1904.05835, equation 6 (without its constant, and as a mean).
    """
    mean, t = pair(mean_BCHW, teacher_BCHW)
    same_shape(mean, t, "put the student's map through a VariationalRegressor")
    variance = (F.softplus(log_scale_C.to(mean.dtype)) + eps)[:, None, None]
    return 0.5 * ((mean - t).square() / variance + variance.log()).mean()


class VariationalRegressor(nn.Module):
    """Three 1 x 1 convolutions with ReLU between them give the mean; `log_scale` the variance of each channel.

    `forward(student_BCHW, teacher_BCHW)` is the loss, on maps at the smaller of the two sizes.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, first_variance: float = 5.0) -> None:
        super().__init__()
        widths = (student_channels, teacher_channels, teacher_channels, teacher_channels)
        convs = [nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(widths)]
        self.mean = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(first_variance - EPS))))

    def forward(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        student, teacher = same_size(student_BCHW, teacher_BCHW)
        return vid_loss(self.mean(student), teacher, self.log_scale)
