"""Attention transfer: a student looks where its teacher looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kddata.losses.maps import flat, pairs, same_size

_SMALLEST_NORM = 1e-12


def at_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, eps: float = 0.0) -> Tensor:
    """Sum over stages of mean (Q_s / (|Q_s| + eps) - Q_t / (|Q_t| + eps))^2, over images and positions.

    Q is the sum over channels of F^2 at each position, |Q| its L2 norm over the positions of an image; the eps of one
    public implementation is 1e-6. A stage is a feature map [B, C, H, W] or an attention map [B, H, W] (which differs
    from Q by a factor that the norm removes). Of two sizes the larger is first averaged over its cells: a feature map
    before it is squared, an attention map as it is.
    Source: Zagoruyko & Komodakis, arXiv 1612.03928, equation 2 with p = 2 and squared distance.
    """
    total = student_maps[0].new_zeros(())
    for student, teacher in pairs(student_maps, teacher_maps):
        s, t = (x if x.ndim == 4 else x[:, None] for x in (student, teacher))
        s, t = same_size(s, t)
        q_s = _attention(s, squared=student.ndim == 4, eps=eps)
        total = total + (q_s - _attention(t, squared=teacher.ndim == 4, eps=eps)).square().mean()
    return total


def _attention(x_BCHW: Tensor, *, squared: bool, eps: float) -> Tensor:
    q = flat((x_BCHW.square() if squared else x_BCHW).sum(1))
    norm = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    return q / (norm + eps).clamp_min(_SMALLEST_NORM)
