"""Knowledge distillation from sparse soft labels: checks, reductions, choice of backend. The arithmetic is in rows.py.

Trade-off: one function with many keyword arguments, because one pass over the logits serves all of them.

Shapes: B rows, C classes, K kept classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kddata.errors import ConfigError, LabelError
from kddata.labels import SoftLabels
from kddata.losses.fused import Backend, fused_kd_loss, kernels_for
from kddata.losses.hard import Reduction, check_logits, hard_term, row_weights
from kddata.losses.rows import TAILS, HardTerm, RowStats, SoftTerm, Tail, row_losses


def kd_loss(
    student_logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor | None = None,
    *,
    temperature: float,
    tail: Tail = "bucket",
    alpha: float = 1.0,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    targets2_B: Tensor | None = None,
    lam: float | Tensor = 1.0,
    weights_B: Tensor | None = None,
    backend: Backend = "auto",
    on_stats: Callable[[RowStats], None] | None = None,
    debug: bool = False,
) -> Tensor:
    """The distillation loss of a batch, differentiable (once) in the student's logits.

        loss = alpha T^2 mean_i KL(teacher_T || student_T) + (1 - alpha) mean_i CE(student_1, targets)

    With p the teacher and q the student at T on the kept classes S, p_t and q_t their masses elsewhere, KL is

        bucket   sum_S p log(p/q) + p_t log(p_t/q_t): exact between the coarse distributions, at most the full KL
        renorm   sum_S p' log(p'/q), p' = p / sum_S p: drives the student's own tail to zero
        uniform  sum_S p log(p/q) + sum_off u log(u/q), u = p_t / (C - K): the tail is spread evenly
        support  sum_S p' log(p'/q'), q' = q / sum_S q: says nothing about other classes, and costs no pass over them
        sampled  sum_S w log(w/q): for labels whose classes were drawn at random; log_p holds log w, w summing to 1.
                 Its gradient and its cross-entropy are unbiased; its value is higher than the full KL, by what the
                 draws' entropy lacks, which no student changes

    Where K = C the first four are the dense KL, `T^2 F.kl_div(log_softmax(x/T), softmax(teacher/T), "batchmean")`.
    Sources: Hinton et al., arXiv 1503.02531; Anshumann et al., arXiv 2503.16870 (sampled).

    Reductions, with w = weights_B (all 1 by default): none is each row's `w_i (alpha T^2 KL_i + (1 - alpha) CE_i)`, sum
    their sum. In mean each term has its own denominator: all rows for the soft term, the rows whose target is not
    ignored for the hard term, as in F.cross_entropy; an ignored target takes nothing from the soft term, weights
    enter no denominator, and a mean over nothing is 0.

    Args:
        student_logits_BC: float16, bfloat16, float32 or float64; computed in float32 at least, in float64 for float64.
            The loss has the dtype of the computation, the gradient that of the logits, rounded once.
        labels: B rows on the logits' device, with T among its declared temperatures (any T where K = C).
        targets_B: integer class ids or `ignore_index`; needed where alpha < 1.
        alpha: share of the soft term, from 0 to 1.
        label_smoothing, targets2_B, lam: of the hard term, as in `hard_loss`.
        weights_B: factors of the rows' losses.
        backend: auto is triton on CUDA where it is installed (not for float64), else torch. triton on CPU needs
            TRITON_INTERPRET=1.
        on_stats: called once with the RowStats of this batch.
        debug: check the contents of labels and targets too (class ids in range and distinct); waits for a GPU.

    Raises:
        ConfigError: shape, dtype or device that does not fit; alpha < 1 without targets; a backend that is not there.
        LabelError: an undeclared temperature; labels of other classes, rows or device; broken ones if `debug`.
    """
    args = KDArgs(
        temperature=temperature,
        tail=tail,
        alpha=alpha,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        targets2_B=targets2_B,
        lam=lam,
        weights_B=weights_B,
        backend=backend,
        debug=debug,
    )
    check_batch(student_logits_BC, labels, targets_B, args)
    kernels, want_stats = kernels_for(backend, student_logits_BC, labels), on_stats is not None
    if kernels is not None:
        loss, stats = fused_kd_loss(kernels, student_logits_BC, labels, targets_B, args, stats=want_stats)
    else:
        soft, hard = kd_terms(student_logits_BC, labels, targets_B, args, all_terms=want_stats)
        loss, stats = row_losses(student_logits_BC, soft, hard, stats=want_stats)
        loss = loss if reduction == "none" else loss.sum()
    if on_stats is not None and stats is not None:
        on_stats(stats)
    return loss


@dataclass(frozen=True, kw_only=True)
class KDArgs:
    """The arguments of `kd_loss` and `kd_linear_loss`, checked for making sense alone and together."""

    temperature: float
    tail: Tail = "bucket"
    alpha: float = 1.0
    reduction: Reduction = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    targets2_B: Tensor | None = None
    lam: float | Tensor = 1.0
    weights_B: Tensor | None = None
    backend: Backend = "auto"
    debug: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("tail", self.tail, TAILS),
            ("reduction", self.reduction, ("mean", "sum", "none")),
            ("backend", self.backend, ("auto", "torch", "triton")),
        ):
            if value not in known:
                raise ConfigError(f"{name} is one of {', '.join(known)}", actual=repr(value))
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError("temperature is a positive number", actual=self.temperature)
        if not 0 <= self.alpha <= 1:
            raise ConfigError("alpha is between 0 (hard term alone) and 1 (soft term alone)", actual=self.alpha)
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError("label_smoothing is between 0 and 1", actual=self.label_smoothing)
        if self.tail == "sampled" and self.temperature != 1:
            raise ConfigError(
                "sampled labels are used at temperature 1: importance weights cannot be tempered afterwards",
                actual=f"temperature {self.temperature:g}",
            )


def kd_terms(
    logits_BC: Tensor, labels: SoftLabels, targets_B: Tensor | None, args: KDArgs, *, all_terms: bool = False
) -> tuple[SoftTerm | None, HardTerm | None]:
    """The two terms, whose weighted sum over rows is the loss. Of the logits only shape, dtype and device are used.

    A term that alpha makes 0 is left out, unless `all_terms` asks for it for the sake of statistics.
    """
    soft, hard = None, None
    if args.alpha > 0 or all_terms:
        weight_B = args.alpha * args.temperature**2 * row_weights(logits_BC, args.weights_B, args.reduction, None)
        exact = dataclasses.replace(labels, log_p_BK=labels.log_p_BK.detach().to(weight_B.dtype))
        log_p_BK, log_tail_B = exact.at(args.temperature)
        soft = SoftTerm(
            ids_BK=labels.ids_BK,
            log_p_BK=log_p_BK,
            log_tail_B=log_tail_B,
            temperature=args.temperature,
            tail=args.tail,
            weight_B=weight_B,
        )
    if targets_B is not None and (args.alpha < 1 or all_terms):
        hard = hard_term(
            logits_BC,
            targets_B,
            factor=1 - args.alpha,
            reduction=args.reduction,
            ignore_index=args.ignore_index,
            label_smoothing=args.label_smoothing,
            targets2_B=args.targets2_B,
            lam=args.lam,
            weights_B=args.weights_B,
            check_ids=args.debug,
        )
    return soft, hard


def check_batch(logits_BC: Tensor, labels: SoftLabels, targets_B: Tensor | None, args: KDArgs) -> None:
    """Raises ConfigError or LabelError unless logits, labels and targets fit each other and what `args` ask for."""
    check_logits(logits_BC)
    if args.alpha < 1 and targets_B is None:
        raise ConfigError(
            "alpha < 1 asks for a hard term, and that needs targets",
            actual=f"alpha = {args.alpha:g} and no targets_B",
            fix="pass the ground truth as targets_B, or set alpha to 1 (soft labels alone, for images without labels)",
        )
    check_labels(logits_BC, labels, sampled=args.tail == "sampled")
    if args.debug:
        labels.validate()


def check_labels(logits_BC: Tensor, labels: SoftLabels, *, sampled: bool = False) -> None:
    """Raises LabelError unless soft labels fit these logits, by shapes and device, and are not sampled unwanted."""
    if labels.sampled and not sampled:
        raise LabelError(
            "sampled labels are learned from by method kd with tail sampled",
            actual="a loss that takes them for the top classes",
            fix='kd_loss(..., temperature=1, tail="sampled"), or label again with labels.keep=top',
        )
    if (len(labels), labels.num_classes) != tuple(logits_BC.shape):
        raise LabelError(
            "soft labels have the rows and classes of the student's logits",
            actual=f"labels of {len(labels)} rows and {labels.num_classes} classes, logits {tuple(logits_BC.shape)}",
        )
    if labels.k < 1 or labels.ids_BK.shape != labels.log_p_BK.shape:
        raise LabelError(
            "ids and log_p of soft labels are [B, K] with K >= 1",
            actual=f"{tuple(labels.ids_BK.shape)} and {tuple(labels.log_p_BK.shape)}",
        )
    devices = {labels.ids_BK.device, labels.log_p_BK.device, labels.log_tail_BT.device}
    if devices != {logits_BC.device}:
        raise LabelError(
            f"soft labels are on the device of the student's logits, {logits_BC.device}",
            actual=", ".join(sorted(map(str, devices))),
            fix="labels.to(student_logits_BC.device)",
        )
