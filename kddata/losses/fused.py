"""The seam to the Triton kernels: whether they serve a call, and labels and arguments as the plain tensors they take.

`kddata_kernels` is imported here alone, when first asked for: importing kddata loads no triton.

Shapes: B rows, C classes, D embedding width.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses.rows import RowStats

if TYPE_CHECKING:
    from kddata.losses.kd import KDArgs

Backend = Literal["auto", "torch", "triton"]

logger = logging.getLogger(__name__)


def kernels_for(backend: Backend, logits_BC: Tensor, labels: SoftLabels) -> ModuleType | None:
    """The kernels' package where `backend` asks for it and it serves these inputs; None means plain torch.

    Raises ConfigError where backend is triton and something is missing, saying what.
    """
    if backend == "torch" or (backend == "auto" and logits_BC.device.type != "cuda"):
        return None
    try:
        import kddata_kernels
    except ImportError as error:
        missing: str | None = f"{error}"
    else:
        missing = kddata_kernels.unavailable(logits_BC.device)
        if logits_BC.dtype == torch.float64:
            missing = "float64 logits, and the kernels compute in float32"
        elif labels.k > kddata_kernels.MAX_K:
            missing = f"k = {labels.k}, and the kernels keep at most {kddata_kernels.MAX_K} classes"
        if missing is None:
            return kddata_kernels
    if backend == "triton":
        raise ConfigError(
            "backend triton needs a CUDA device (or TRITON_INTERPRET=1) and float32, bfloat16 or float16 logits",
            actual=missing,
            fix="use backend auto, which takes plain torch where the kernels cannot run",
        )
    logger.info("losses are computed in plain torch: %s", missing)
    return None


def fused_kd_loss(
    kernels: ModuleType, logits_BC: Tensor, labels: SoftLabels, targets_B: Tensor | None, args: KDArgs, *, stats: bool
) -> tuple[Tensor, RowStats | None]:
    """`kd_loss` by the kernels, and the statistics if asked for."""
    logits_BC = _rows(logits_BC)
    tensors, options = _plain(logits_BC, labels, targets_B, args)
    if not stats:
        return kernels.kd_loss(logits_BC, *tensors, **options), None
    loss, found = kernels.kd_loss(logits_BC, *tensors, **options, stats=True)
    ce_B = found.ce if targets_B is not None else torch.full_like(found.ce, torch.nan)
    return loss, RowStats(found.kl, ce_B, found.tail, found.top1.long())


def fused_kd_linear_loss(
    kernels: ModuleType,
    features_BD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    labels: SoftLabels,
    targets_B: Tensor | None,
    args: KDArgs,
) -> Tensor:
    """`kd_linear_loss` by the kernels."""
    tensors, options = _plain(features_BD, labels, targets_B, args)
    return kernels.kd_linear_loss(features_BD.contiguous(), weight_CD.contiguous(), bias_C, *tensors, **options)


def fused_dkd_loss(
    kernels: ModuleType,
    logits_BC: Tensor,
    labels: SoftLabels,
    targets_B: Tensor,
    *,
    temperature: float,
    weights_B: Tensor | None,
    **options: Any,
) -> Tensor:
    """`dkd_loss` of labels of all classes by the kernels."""
    log_p_BK = labels.at(temperature)[0].detach().float().contiguous()
    weights = None if weights_B is None else weights_B.detach().float().contiguous()
    tensors = (_rows(logits_BC), labels.ids_BK.contiguous(), log_p_BK, targets_B.contiguous())
    return kernels.dkd_loss(*tensors, temperature=temperature, weights_N=weights, **options)


def _rows(logits_BC: Tensor) -> Tensor:
    """Logits whose classes lie side by side; padded rows are welcome."""
    return logits_BC if logits_BC.stride(-1) == 1 else logits_BC.contiguous()


def _plain(
    rows_B: Tensor, labels: SoftLabels, targets_B: Tensor | None, args: KDArgs
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """(ids, log_p, log_tail, targets) and the keyword arguments that both entries of the kernels take."""
    log_p_BK, log_tail_B = labels.at(args.temperature)
    lam_B = None
    if targets_B is not None and args.targets2_B is not None:
        lam_B = torch.as_tensor(args.lam, dtype=torch.float32, device=rows_B.device).detach().expand(len(rows_B))
    options = {
        "temperature": args.temperature,
        "alpha": args.alpha,
        "tail": args.tail,
        "targets_b_N": None if lam_B is None or args.targets2_B is None else args.targets2_B.contiguous(),
        "lam_N": None if lam_B is None else lam_B.contiguous(),
        "label_smoothing": args.label_smoothing,
        "ignore_index": args.ignore_index,
        "weights_N": None if args.weights_B is None else args.weights_B.detach().float().contiguous(),
        "reduction": args.reduction,
        "debug": args.debug,
    }
    targets = None if targets_B is None else targets_B.contiguous()
    kept = (
        labels.ids_BK.contiguous(),
        log_p_BK.detach().float().contiguous(),
        log_tail_B.detach().float().contiguous(),
    )
    return (*kept, targets), options
