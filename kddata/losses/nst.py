"""Neuron selectivity transfer: what each channel looks at, as a distribution over channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kddata.losses.maps import pairs, same_size


def nst_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the squared maximum mean discrepancy between channels, under the kernel (a . b)^2.

        mean k(t, t) + mean k(s, s) - 2 mean k(s, t), means over images and pairs of channels

    s and t are channels [HW] of L2 norm 1, at the smaller of the two sizes. Numbers of channels may differ.
    Source: Huang & Wang, arXiv 1707.01219, equation 4, polynomial kernel with d = 2 and c = 0.
    """
    total = student_maps[0].new_zeros(())
    for student, teacher in pairs(student_maps, teacher_maps):
        s, t = (F.normalize(x.flatten(2), dim=2) for x in same_size(student, teacher))
        of_t, of_s, of_both = ((a @ b.transpose(1, 2)).square().mean() for a, b in ((t, t), (s, s), (s, t)))
        total = total + of_t + of_s - 2 * of_both
    return total
