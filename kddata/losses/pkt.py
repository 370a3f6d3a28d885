"""Probabilistic knowledge transfer: whom an image resembles, as a distribution over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from kddata.losses.maps import flat, pair


def pkt_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Mean over B x B of p log((p + eps) / (q + eps)).

    p (teacher) and q (student) are rows of (1 + cosine) / 2, each divided by its sum; norms have eps added. Widths of
    the two sides may differ. Of one image it is 0. Source: Passalis & Tefas, ECCV 2018, equations 5 to 7.
    """
    s, t = pair(student, teacher)
    q, p = (_resemblance(flat(x), eps) for x in (s, t))
    return (p * ((p + eps) / (q + eps)).log()).mean()


def _resemblance(x_BD: Tensor, eps: float) -> Tensor:
    x = x_BD / (torch.linalg.vector_norm(x_BD, dim=1, keepdim=True) + eps)
    similarity = (x @ x.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)
