"""Correlation congruence, in the form that its author gave: neighbours in a batch err in different places."""

from __future__ import annotations

from torch import Tensor

from kddata.losses.maps import flat, pair, same_shape


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over neighbouring rows i of sum_d |s_i - t_i|_d |s_(i+1) - t_(i+1)|_d; both sides [B, D] of one width.

    Of one image it is 0: it has no neighbour. Source: Peng et al., arXiv 1904.01802; the form is that of the reference
    in RepDistiller, which differs from the paper's equation 4.
    """
    s, t = pair(student, teacher)
    s, t = flat(s), flat(t)
    same_shape(s, t, "project the student's embedding to the teacher's width")
    delta = (s - t).abs()
    return (delta[:-1] * delta[1:]).sum() / max(1, len(s) - 1)
