"""Boundary supporting samples: images moved to the edge between two classes of the teacher, and the loss on them.

A boundary sample depends on the teacher, the image and the attack class alone, so that it can be made once.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kddata.labels import SoftLabels
from kddata.losses.kd import kd_loss


def boundary_samples(
    teacher: Callable[[Tensor], Tensor],
    images_B3HW: Tensor,
    attack_class_B: Tensor,
    *,
    step_size: float = 0.3,
    num_steps: int = 10,
    lowest: float = -2.5,
    highest: float = 2.5,
) -> Tensor:
    """Images walked towards the boundary between the teacher's own class and an attack class, until they cross it.

    Each step of an image that is still the teacher's first class b goes along the gradient of z_a - z_b, normalised,
    by step_size (z_b - z_a + 1e-4); values stay between `lowest` and `highest` of the normalised input. An image that
    does not cross in `num_steps` is given back as far as it came. Nothing learns.

    Source: Heo et al., "Knowledge distillation with adversarial samples supporting decision boundary" (AAAI 2019),
    equations 4 to 6.
    """
    clean, moved, base = images_B3HW.detach(), images_B3HW.detach(), None
    for _ in range(num_steps):
        x = moved.clone().requires_grad_()
        with torch.enable_grad():
            logits = teacher(x)
            first = logits.argmax(1)
            base = first if base is None else base
            gap_B = (logits.gather(1, attack_class_B[:, None]) - logits.gather(1, base[:, None]))[:, 0]
            (grad,) = torch.autograd.grad(gap_B.sum(), x)
        going = first == base
        if not bool(going.any()):
            break
        norm = torch.linalg.vector_norm(grad.flatten(1), dim=1).clamp_min(torch.finfo(grad.dtype).tiny)
        length = step_size * going * (1e-4 - gap_B.detach()) / norm
        moved = (clean + (moved + length[:, None, None, None] * grad - clean)).clamp(lowest, highest)
    return moved


def bss_loss(student_logits_BC: Tensor, labels: SoftLabels, *, temperature: float = 3.0) -> Tensor:
    """KL(teacher_T || student_T) on boundary samples, without T^2: the term that is added to KD, times a weight.

    Source: the same, equation 3.
    """
    return kd_loss(student_logits_BC, labels, temperature=temperature) / temperature**2
