"""Activation boundaries: a student's neurons are on where its teacher's are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kddata.losses.maps import pairs, same_shape


def ab_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, margin: float = 1.0) -> Tensor:
    """0.003 / B times the sum over stages i of n of 2^(i + 1 - n) times the sum over elements of

        (s + margin)^2 where t <= 0 and s > -margin,   (s - margin)^2 where t > 0 and s <= margin

    s before its ReLU; t before or after. Source: Heo et al., arXiv 1811.03233, equation 5; factors as in
    RepDistiller.
    """
    total, stages = student_maps[0].new_zeros(()), pairs(student_maps, teacher_maps)
    for i, (s, t) in enumerate(stages):
        same_shape(s, t, "put the student's map through a Connector without ReLU")
        off = (s + margin).square() * ((s > -margin) & (t <= 0))
        on = (s - margin).square() * ((s <= margin) & (t > 0))
        total = total + 2.0 ** (i + 1 - len(stages)) * (off + on).sum() / max(1, len(s))
    return 0.003 * total
