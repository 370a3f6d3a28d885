"""The one typed way to start the row kernel: tensors and numbers in, tiles and flags of the kernel worked out here.

Deliberately without checks of shapes and dtypes: callers have made them (`checks.py`), and may be under capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kddata_kernels.plan import Tiles, next_power_of_2, tiles
from kddata_kernels.rows import kd_rows_kernel
from kddata_kernels.tails import TAILS


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tensors in. `ce_scale` is one float32 number on the device that multiplies the hard term, or None."""

    logits_NC: Tensor
    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor | None
    targets_N: Tensor | None
    targets_b_N: Tensor | None
    lam_N: Tensor | None
    weights_N: Tensor | None
    ce_scale: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers in. A row's loss is w (alpha T^2 kd_scale KL + (1 - alpha) ce_scale CE)."""

    temperature: float
    alpha: float
    tail: str
    label_smoothing: float
    ignore_index: int
    kd_scale: float
    ce_scale: float


@dataclass(frozen=True, kw_only=True)
class Out:
    """Tensors to fill, every element of them; None where not wanted.

    Attributes:
        loss_N: float32.
        grad_NC: in the dtype of the logits; may be the logits themselves.
        grad_out_N: float32, multiplies each row's gradient before it is rounded; with `skip_ones` rows (tiles of
            rows) whose factor is 1 are left as they are.
        stats_3N: float32: KL, CE (0 without labels), the student's mass outside ids at T.
        top1_N: int32, the student's most probable class, the lowest of equal ones.
    """

    loss_N: Tensor | None = None
    grad_NC: Tensor | None = None
    grad_out_N: Tensor | None = None
    skip_ones: bool = False
    stats_3N: Tensor | None = None
    top1_N: Tensor | None = None


def launch_kd_rows(rows: Rows, recipe: Recipe, out: Out, *, tiling: Tiles | None = None) -> None:
    """Starts the kernel on the device of the logits; fills `out`."""
    if len(rows.logits_NC) == 0:
        return
    arguments = kd_rows_arguments(rows, recipe, out, tiling=tiling)
    with torch.cuda.device_of(rows.logits_NC):
        kd_rows_kernel[(triton.cdiv(arguments["N"], arguments["R"]),)](**arguments)


def kd_rows_arguments(rows: Rows, recipe: Recipe, out: Out, *, tiling: Tiles | None = None) -> dict[str, Any]:
    """The arguments of one launch of cdiv(N, R) programs."""
    num_rows, num_classes = rows.logits_NC.shape
    stats = out.stats_3N is not None
    kd = 2 if recipe.alpha != 0 else int(stats)
    ce = 0 if rows.targets_N is None else 2 if recipe.alpha != 1 else int(stats)
    k = rows.ids_NK.shape[1] if kd else 0
    t = recipe.temperature if kd else 1.0
    smooth = bool(ce and recipe.label_smoothing)
    wide = (kd > 0 and ce > 0 and t != 1) or smooth or (kd > 0 and recipe.tail == "uniform")
    tile = tiling or tiles(num_classes, k, wide=wide)
    align = 8 if _aligned(rows.logits_NC) and (out.grad_NC is None or _aligned(out.grad_NC)) else 1
    return dict(  # noqa: C408
        logits_ptr=rows.logits_NC,
        logits_stride=_row_stride(rows.logits_NC) // align,
        grad_ptr=out.grad_NC,
        grad_stride=0 if out.grad_NC is None else _row_stride(out.grad_NC) // align,
        reach=-(-num_classes // align),
        ids_ptr=rows.ids_NK,
        ids_stride=rows.ids_NK.stride(0),
        log_p_ptr=rows.log_p_NK,
        log_p_stride=rows.log_p_NK.stride(0),
        log_tail_ptr=rows.log_tail_N if kd and k < num_classes and recipe.tail in ("bucket", "uniform") else None,
        targets_ptr=rows.targets_N if ce else None,
        targets_b_ptr=rows.targets_b_N if ce else None,
        lam_ptr=rows.lam_N if ce and rows.targets_b_N is not None else None,
        weights_ptr=rows.weights_N,
        ce_scale_ptr=rows.ce_scale,
        grad_out_ptr=out.grad_out_N,
        grad_out_stride=0 if out.grad_out_N is None else out.grad_out_N.stride(0),
        loss_ptr=out.loss_N,
        stats_ptr=out.stats_3N,
        top1_ptr=out.top1_N,
        N=num_rows,
        C=num_classes,
        K=k,
        inv_t=1.0 / t,
        kd_scale=recipe.alpha * t * t * recipe.kd_scale,
        ce_scale=(1.0 - recipe.alpha) * recipe.ce_scale,
        smoothing=recipe.label_smoothing,
        ignore_index=recipe.ignore_index,
        TAIL=TAILS[recipe.tail],
        KD=kd,
        CE=ce,
        SMOOTH=smooth,
        POWER=int(t) if t in (1, 2, 3, 4) else 0,
        ALL_KEPT=k == num_classes,
        SKIP_ONES=out.skip_ones,
        IN_PLACE=out.grad_NC is not None and out.grad_NC.data_ptr() == rows.logits_NC.data_ptr(),
        ALIGN=align,
        R=tile.rows,
        BLOCK=tile.block,
        LOOPED=tile.looped,
        KP=max(16, next_power_of_2(k)),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,  # as by default, but Triton 3.9 warns where it is not said
    )


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 8 elements and may be read and written up to the next one."""
    stride, width = _row_stride(x), -(-x.shape[1] // 8) * 8
    end = x.storage_offset() + (x.shape[0] - 1) * stride + width
    return bool(stride % 8 == 0 and width <= stride and end * x.element_size() <= x.untyped_storage().nbytes())
