"""Flow of solution procedure: how features of one layer go together with those of a later one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kddata.losses.maps import pairs, same_shape


def fsp_loss(student_matrices: Sequence[Tensor], teacher_matrices: Sequence[Tensor]) -> Tensor:
    """Sum over pairs of layers of mean (G_s - G_t)^2, G as from `features.fsp_matrix`: both sides have the same widths.

    The paper trains with this alone first, and with the task's loss afterwards.
    Source: Yim et al., CVPR 2017, equation 2.
    """
    total = student_matrices[0].new_zeros(())
    for s, t in pairs(student_matrices, teacher_matrices):
        same_shape(s, t, "take layers of one width on both sides (FSP has no regressor)")
        total = total + (s - t).square().mean()
    return total
