"""Factor transfer, on features themselves: the paper's paraphraser and translator are not part of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kddata.losses.maps import flat, pair, same_size


def ft_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Mean of |Q_s / |Q_s| - Q_t / |Q_t||, Q the channel mean of F^2 at each position, at the smaller of the two sizes.

    Source: Kim et al., arXiv 1802.04977, equation 3 with p = 1, on factors as RepDistiller forms them.
    """
    s, t = (F.normalize(flat(x.square().mean(1)), dim=1) for x in same_size(*pair(student_BCHW, teacher_BCHW)))
    return (s - t).abs().mean()
