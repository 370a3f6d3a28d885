"""Distillation losses as Triton kernels: sparse teacher in, loss and gradient out; one read, one write of the logits.

Needs torch and triton, and knows nothing of kddata. Plain tensors go in; kddata.losses calls it, and so can anyone.
Every function equals a few lines of plain torch (kddata.losses holds them) without a dense teacher, a log-softmax
tensor or a host sync.

    kd_loss(logits_NC, ids_NK, log_p_NK, log_tail_N, targets_N=None, *, temperature=1.0, alpha=1.0, tail="bucket",
            targets_b_N=None, lam_N=None, label_smoothing=0.0, ignore_index=-100, weights_N=None, reduction="mean",
            stats=False, recompute=False, debug=False) -> Tensor, or (Tensor, KDStats) with stats=True
    kd_linear_loss(features_ND, weight_CD, bias_C, ids_NK, log_p_NK, log_tail_N, targets_N=None, *, the same without
            stats and recompute, chunk_rows=2048; reduction is mean or sum) -> Tensor
    dkd_loss(logits_NC, ids_NK, log_p_NK, targets_N, *, temperature=1.0, alpha=1.0, beta=8.0, ignore_index=-100,
            weights_N=None, reduction="mean", debug=False) -> Tensor        (K = C, at most MAX_K classes)
    unavailable(device) -> None where the kernels can run on that device, else a sentence that says what is missing

Shapes: N rows, C classes, K kept classes, D features.

    logits_NC    bf16, fp16 or fp32; last dimension contiguous, any row stride (padding is welcome, see README)
    ids_NK       uint16, int32 or int64; distinct in a row, in [0, C)
    log_p_NK     fp16 or fp32; log-probabilities at `temperature` (log importance weights for tail="sampled")
    log_tail_N   fp32; log of the teacher's softmax mass outside ids at `temperature`; None for the tails that do not
                 look at it (renorm, support, sampled) and for K = C
    targets_N    int64 or int32; `ignore_index` marks a row without a label
    targets_b_N  the second label of a mixed pair; the first weighs lam_N, this one 1 - lam_N
    lam_N        fp32 [N], or a float
    weights_N    fp32 [N]; multiplies each row's loss; does not enter the denominators of the mean

What is computed, for row i, with w its weight:

    loss_i = w (alpha T^2 KL_i + (1 - alpha) CE_i)          CE_i = 0 where every label of the row is ignored
    none:  loss_i, float32 [N]        sum:  their sum
    mean:  sum of w alpha T^2 KL_i / N  +  sum of w (1 - alpha) CE_i / (rows with a label, at least 1);  0 for N = 0

CE_i = lam CE(targets) + (1 - lam) CE(targets_b), an ignored label contributing 0, with torch's label smoothing. Five
tails are offered for KL_i (README has the formulas): bucket, renorm, uniform, support, sampled. Stored probabilities
are scaled to 1 - exp(log_tail) (bucket, uniform) or to 1. With K = C every tail is the dense KL; log_tail is not read.
A loss is +inf where the student gives a class of positive teacher probability no probability at all.
"""

from kddata_kernels.checks import unavailable
from kddata_kernels.dkd import dkd_loss
from kddata_kernels.linear import kd_linear_loss
from kddata_kernels.loss import KDStats, kd_loss
from kddata_kernels.plan import MAX_K
from kddata_kernels.tails import TAILS

__all__ = ["MAX_K", "TAILS", "KDStats", "dkd_loss", "kd_linear_loss", "kd_loss", "unavailable"]
