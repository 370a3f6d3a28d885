"""Knowledge review: deep features of a student, folded into its shallow ones, give the teacher's shallow ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kddata.losses.maps import pairs, same_shape

_POOLED = (4, 2, 1)


def reviewkd_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the hierarchical context loss, on maps of one shape.

    The weighted mean of squared differences at full size (weight 1) and averaged to 4 x 4, 2 x 2 and 1 x 1 (weights
    1/2, 1/4, 1/8, those smaller than the map). Source: Chen et al., arXiv 2104.09044, section 3.3.
    """
    total = student_maps[0].new_zeros(())
    for s, t in pairs(student_maps, teacher_maps):
        same_shape(s, t, "put the student's maps through ReviewFusion")
        stage, weight, weights = (s - t).square().mean(), 1.0, 1.0
        for side in (side for side in _POOLED if side < s.shape[2]):
            weight /= 2
            weights += weight
            difference = F.adaptive_avg_pool2d(s, side) - F.adaptive_avg_pool2d(t, side)
            stage = stage + weight * difference.square().mean()
        total = total + stage / weights
    return total


class Fusion(nn.Module):
    """Attention-based fusion of a stage with the residual of the deeper one: the stage's output and its own residual.

    Without `fuse` there is no deeper one. Source: the same, section 3.2 and figure 3.
    """

    def __init__(self, student_channels: int, middle: int, teacher_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student_channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.widen = nn.Sequential(
            nn.Conv2d(middle, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        for weight in (self.narrow.get_parameter("0.weight"), self.widen.get_parameter("0.weight")):
            nn.init.kaiming_uniform_(weight, a=1)

    def forward(self, student_BCHW: Tensor, residual: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """(output [B, C of teacher, *size], residual)."""
        x = self.narrow(student_BCHW)
        if self.attention is not None:
            assert residual is not None
            y = F.interpolate(residual, x.shape[-2:], mode="nearest")
            share = self.attention(torch.cat([x, y], 1))
            x = x * share[:, :1] + y * share[:, 1:]
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.widen(x), x


class ReviewFusion(nn.Module):
    """A `Fusion` for each stage, from the deepest to the shallowest; stages are given from shallow to deep."""

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], *, max_middle: int = 512):
        super().__init__()
        middle, last = min(max_middle, student_channels[-1]), len(student_channels) - 1
        self.stages = nn.ModuleList(
            Fusion(s, middle, t, fuse=i < last)
            for i, (s, t) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    def forward(self, student_maps: Sequence[Tensor], sizes: Sequence[torch.Size]) -> list[Tensor]:
        found: list[Tensor] = []
        residual = None
        for i in reversed(range(len(self.stages))):
            output, residual = self.stages[i](student_maps[i], residual, sizes[i])
            found.insert(0, output)
        return found
