"""Heads: where a method's answers are those of a learned affine layer behind the student's logits, that layer is folded
into the student's last linear one at the end. So a result has the architecture that was asked for, and no more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kddata.errors import ConfigError

Head = Callable[[Tensor], Tensor]
"""Logits [B, C] -> logits [B, C], affine."""


class Answering(nn.Module):
    """A student with a head behind it."""

    def __init__(self, student: nn.Module, head: Head) -> None:
        super().__init__()
        self.student, self._head = student, head

    def forward(self, pixels: Tensor) -> Tensor:
        return self._head(self.student(pixels))


@torch.no_grad()
def folded(student: nn.Module, head: Head, num_classes: int, *, where: str) -> nn.Module:
    """A copy of the student that answers as `head(student(x))` does, to rounding; the product is made in float64.

    Raises ConfigError where its last linear layer does not end in C logits with a bias.
    """
    found = copy.deepcopy(student)
    layers = [(name, layer) for name, layer in found.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or layers[-1][1].out_features != num_classes or layers[-1][1].bias is None:
        raise ConfigError(
            f"a method with a head needs a student that ends in a linear layer of {num_classes} logits with a bias",
            actual=f"{layers[-1][0]}: {layers[-1][1]}" if layers else "no linear layer",
            where=where,
        )
    last = layers[-1][1]
    eye = torch.eye(num_classes, device=last.weight.device)
    bias = head(torch.zeros_like(eye[:1])).double()
    matrix = head(eye).double() - bias  # rows are what each logit adds
    last.bias.copy_(last.bias.double() @ matrix + bias[0])
    last.weight.copy_(matrix.T @ last.weight.double())
    return found


def require_foldable(student: nn.Module, pixels: Tensor, num_classes: int, *, where: str) -> None:
    """Raises ConfigError unless a head can be folded into the student: found out by folding one, before training."""

    def head(logits: Tensor) -> Tensor:
        return logits.flip(1) * 2 + 1

    with torch.inference_mode():
        wanted, answer = head(student(pixels)), folded(student, head, num_classes, where=where)(pixels)
    if not torch.allclose(answer, wanted, rtol=1e-3, atol=1e-4):
        raise ConfigError(
            "a method with a head needs a student whose logits are the answer of its last linear layer",
            actual="something comes after it",
            where=where,
        )
