"""On-the-fly native ensemble: branches of one network learn from their own gated ensemble.

Shapes: B rows, M branches, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.dense import kl
from kddata.losses.hard import Reduction, hard_loss, row_weights
from kddata.losses.kd import kd_loss
from kddata.losses.rows import compute_dtype


def one_loss(
    branch_logits_BMC: Tensor,
    gate_BM: Tensor,
    targets_B: Tensor,
    labels: SoftLabels | None = None,
    *,
    temperature: float = 3.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    weights_B: Tensor | None = None,
) -> Tensor:
    """sum_m CE(z_m) + CE(z_e) + T^2 sum_m KL(softmax(z_e / T) || softmax(z_m / T)), with z_e = sum_m gate_m z_m.

    The ensemble is a target as it is: KL has no gradient in z_e, which learns, with the gate, by its cross-entropy.
    With labels, a cached teacher is one more to learn from: T^2 sum_m KL(teacher_T || softmax(z_m / T)) is added.

    Source: Lan et al., "Knowledge distillation by on-the-fly native ensemble" (NeurIPS 2018), equations 4 to 8. Unlike
    the authors' code, this adds no 1e-7 to the ensemble's probabilities, and no ramp of the KL over the first epochs.
    """
    if branch_logits_BMC.ndim != 3 or gate_BM.shape != branch_logits_BMC.shape[:2]:
        raise ConfigError(
            "branches are [B, M, C] and their gate [B, M]",
            actual=f"{tuple(branch_logits_BMC.shape)} and {tuple(gate_BM.shape)}",
        )
    branches = branch_logits_BMC.to(compute_dtype(branch_logits_BMC.dtype))
    ensemble_BC = (branches * gate_BM.to(branches.dtype)[:, :, None]).sum(1)
    log_p_BC = (ensemble_BC.detach() / temperature).log_softmax(1)

    def hard(logits_BC: Tensor) -> Tensor:
        return hard_loss(logits_BC, targets_B, reduction="none", ignore_index=ignore_index)

    loss_B = hard(ensemble_BC)
    for logits_BC in branches.unbind(1):
        loss_B = loss_B + hard(logits_BC) + temperature**2 * kl(log_p_BC, (logits_BC / temperature).log_softmax(1))
        if labels is not None:
            loss_B = loss_B + kd_loss(logits_BC, labels, temperature=temperature, reduction="none")
    weighted_B = loss_B * row_weights(branches[:, 0], weights_B, reduction, None)
    return weighted_B if reduction == "none" else weighted_B.sum()


class Gate(nn.Module):
    """How much each branch counts, of the features that they share: softmax(ReLU(BatchNorm(linear(mean over H x W)))).

    Source: the same, section 3.2.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(self, features: Tensor) -> Tensor:
        """[B, M] of features [B, D] or [B, D, H, W]."""
        pooled_BD = features.flatten(2).mean(2) if features.ndim > 2 else features
        return torch.relu(self.norm(self.linear(pooled_BD))).softmax(1)
