"""The loss on boundary supporting samples; `kddata.boundary` makes the samples."""

from __future__ import annotations

from torch import Tensor

from kddata.boundary import boundary_samples as boundary_samples
from kddata.labels import SoftLabels
from kddata.losses.kd import kd_loss


def bss_loss(student_logits_BC: Tensor, labels: SoftLabels, *, temperature: float = 3.0) -> Tensor:
    """KL(teacher_T || student_T) on boundary samples, without T^2: the term that is added to KD, times a weight.

    Source: Heo et al., "Knowledge distillation with adversarial samples supporting decision boundary" (AAAI 2019),
    equation 3.
    """
    return kd_loss(student_logits_BC, labels, temperature=temperature) / temperature**2
