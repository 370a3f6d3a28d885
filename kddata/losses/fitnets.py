"""FitNets: a student's middle layer, through a learned regressor, gives its teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kddata.losses.maps import pair, same_shape, same_size


def fitnets_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of (s - t)^2: the hint loss, on a student's map that was regressed to the teacher's shape.

    The paper trains a student's layers up to the hint with this alone first, and then the whole with KD.
    Source: Romero et al., arXiv 1412.6550, equation 3 (with a mean in place of half the sum).
    """
    s, t = pair(student, teacher)
    same_shape(s, t, "put the student's map through a HintRegressor")
    return F.mse_loss(s, t)


class HintRegressor(nn.Module):
    """relu(batchnorm(1 x 1 convolution)): a student's channels to its teacher's; maps at the smaller of the two sizes.

    `forward(student_BCHW, teacher_BCHW)` gives both, of one shape.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, 1)
        self.bn = nn.BatchNorm2d(teacher_channels)

    def forward(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = same_size(student_BCHW, teacher_BCHW)
        return self.bn(self.conv(student)).relu(), teacher
