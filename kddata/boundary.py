"""Boundary samples: images moved to the edge between two classes of a teacher, and which class each is moved towards.

A boundary sample depends on the teacher, the image and the attack class alone, so that it can be made once and stored,
as the outputs `boundary` and `boundary_logits`. Nothing here stores or learns.

Shapes: B images, C classes, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("boundary", "boundary_logits")
STEP_SIZE = 0.3
NUM_STEPS = 10


def boundary_samples(
    teacher: Callable[[Tensor], Tensor],
    images_B3HW: Tensor,
    attack_class_B: Tensor,
    *,
    step_size: float = STEP_SIZE,
    num_steps: int = NUM_STEPS,
    lowest: float | Tensor = -2.5,
    highest: float | Tensor = 2.5,
) -> Tensor:
    """Images walked towards the boundary between the teacher's own class and an attack class, until they cross it.

    Each step of an image that is still the teacher's first class b goes along the gradient of z_a - z_b, normalised,
    by step_size (z_b - z_a + 1e-4); values stay between `lowest` and `highest` of the normalised input. An image that
    does not cross in `num_steps` is given back as far as it came. Nothing learns.

    Source: Heo et al., "Knowledge distillation with adversarial samples supporting decision boundary" (AAAI 2019),
    equations 4 to 6.
    """
    clean, moved, base = images_B3HW.detach(), images_B3HW.detach(), None
    low, high = (torch.as_tensor(x, dtype=clean.dtype, device=clean.device) for x in (lowest, highest))
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
        moved = (clean + (moved + length[:, None, None, None] * grad - clean)).clamp(low, high)
    return moved


def attack_classes(logits_BC: Tensor, start_B: Tensor) -> Tensor:
    """int64 [B]: for each row one class that is not its first, drawn by the probabilities at temperature 1.

    Args:
        start_B: the draws, float64 in [0, 1): the class in whose stretch of the cumulative probabilities it lies.

    Source: the same, section 3.3.
    """
    first_B1 = logits_BC.argmax(1, keepdim=True)
    others_BC = logits_BC.double().scatter(1, first_B1, -math.inf)
    edges_BC = others_BC.softmax(1).cumsum(1)
    total_B1 = edges_BC[:, -1:]
    point_B1 = torch.minimum(start_B.to(edges_BC)[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    drawn_B1 = torch.searchsorted(edges_BC, point_B1, right=True)
    return drawn_B1[:, 0].clamp_max(logits_BC.shape[1] - 1)  # NaN, where all others are -inf: nothing moves then


def to_pixels(x_B3SS: Tensor, mean_311: Tensor, std_311: Tensor) -> Tensor:
    """A teacher's input in pixels of 0 to 255, rounded to float16 (by 1/16 at most), as it is stored."""
    return ((x_B3SS * std_311 + mean_311) * 255).clamp(0, 255).half()
