"""Relational knowledge distillation: distances between pairs of images, and angles within triplets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kddata.losses.maps import flat, pair


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all B x B pairs of the smooth L1 (beta 1) between distances, each side divided by its mean distance.

    Of one image it is 0: there is no pair. Source: Park et al., arXiv 1904.05068, equations 4 to 6.
    """
    s, t = pair(student, teacher)
    if len(s) < 2:
        return _nothing(s)
    return F.smooth_l1_loss(_distances(flat(s)), _distances(flat(t)))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all B^3 triplets of the smooth L1 (beta 1) between the cosines of the angles at their middle image.

    Holds differences [B, B, D] of both sides and cosines [B, B, B]. Source: the same, equations 7 and 8.
    """
    s, t = pair(student, teacher)
    if len(s) < 2:
        return _nothing(s)
    return F.smooth_l1_loss(_cosines(flat(s)), _cosines(flat(t)))


def rkd_loss(student: Tensor, teacher: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """distance_weight * rkd_distance_loss + angle_weight * rkd_angle_loss. Widths of the two sides may differ."""
    return distance_weight * rkd_distance_loss(student, teacher) + angle_weight * rkd_angle_loss(student, teacher)


def _nothing(student: Tensor) -> Tensor:
    """0, with a gradient of 0."""
    return (student * 0).sum()


def _distances(x_BD: Tensor) -> Tensor:
    """L2 distances [B, B], over the mean of those between different images."""
    x = x_BD - x_BD.mean(0)  # distances are the same, and lose less to rounding
    squares = x.square().sum(1)
    d = (squares[:, None] + squares[None, :] - 2 * x @ x.T).clamp_min(1e-12).sqrt()
    off = 1 - x.new_ones(len(x)).diag()
    d = d * off
    return d / (d.sum() / off.sum())


def _cosines(x_BD: Tensor) -> Tensor:
    """[B, B, B]: at image j between the directions to i and k; 0 where one of them is j itself."""
    towards = F.normalize(x_BD[None] - x_BD[:, None], dim=2)
    return towards @ towards.transpose(1, 2)
