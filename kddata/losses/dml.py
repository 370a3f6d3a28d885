"""Deep mutual learning: what a peer learns from the others of its cohort, as they answer now.

Shapes: B rows, P other peers, C classes.
"""

from __future__ import annotations

from torch import Tensor

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.dense import kl
from kddata.losses.hard import Reduction, check_logits, row_weights
from kddata.losses.kd import kd_loss
from kddata.losses.rows import compute_dtype


def dml_loss(
    student_logits_BC: Tensor,
    peer_logits_BPC: Tensor,
    labels: SoftLabels | None = None,
    *,
    reduction: Reduction = "mean",
    weights_B: Tensor | None = None,
) -> Tensor:
    """Mean over the other peers of KL(peer || student) at temperature 1; no gradient reaches them.

    With labels, a cached teacher is one more peer, which the paper has not: KL(teacher || student), the classes that
    were not kept taken as one.

    Source: Zhang et al., "Deep mutual learning" (CVPR 2018), equations 4 and 8. Cross-entropy with the ground truth is
    added by whoever trains, as is the order of the updates.
    """
    check_logits(student_logits_BC)
    shape = tuple(peer_logits_BPC.shape)
    if len(shape) != 3 or (shape[0], shape[2]) != tuple(student_logits_BC.shape) or shape[1] + (labels is not None) < 1:
        raise ConfigError(
            "logits of peers are [B, P, C], of the student's rows and classes, with a peer or a teacher at least",
            actual=f"{shape} for a student's {tuple(student_logits_BC.shape)}",
        )
    log_q_BC = student_logits_BC.to(compute_dtype(student_logits_BC.dtype)).log_softmax(1)
    log_p_BPC = peer_logits_BPC.detach().to(log_q_BC.dtype).log_softmax(2)
    terms = [kl(log_p_BPC[:, peer], log_q_BC) for peer in range(shape[1])]
    if labels is not None:
        terms.append(kd_loss(student_logits_BC, labels, temperature=1, reduction="none").to(log_q_BC.dtype))
    weighted_B = sum(terms) / len(terms) * row_weights(student_logits_BC, weights_B, reduction, None)
    return weighted_B if reduction == "none" else weighted_B.sum()
