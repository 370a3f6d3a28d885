"""Similarity preserving: images that look alike to the teacher look alike to the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kddata.losses.maps import flat, pairs


def sp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over the listed tensors of |N(A_s A_s^T) - N(A_t A_t^T)|^2 / B^2.

    A is [B, D]: embeddings, or feature maps made flat; N divides each row of the B x B matrix by its L2 norm. Widths of
    the two sides may differ. Of one image it is 0. Source: Tung & Mori, arXiv 1907.09682, equations 2 to 4.
    """
    total = student[0].new_zeros(())
    for s, t in pairs(student, teacher):
        gram_s, gram_t = (F.normalize(flat(x) @ flat(x).T, dim=1) for x in (s, t))
        total = total + (gram_s - gram_t).square().sum() / max(1, len(s)) ** 2
    return total
