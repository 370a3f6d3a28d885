"""How many rows have a label, kept on the device: the denominator of the hard term's mean."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["N", "ignore_index"])
def label_share_kernel(out_ptr, targets_ptr, targets_b_ptr, N, ignore_index, numerator, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        has = tl.load(targets_ptr + i, mask=i < N, other=ignore_index) != ignore_index
        if targets_b_ptr is not None:
            has = has | (tl.load(targets_b_ptr + i, mask=i < N, other=ignore_index) != ignore_index)
        count += has.to(tl.int32)
    tl.store(out_ptr, numerator / tl.maximum(tl.sum(count, 0), 1).to(tl.float32))


def label_share(targets_N: Tensor, targets_b_N: Tensor | None, *, ignore_index: int, numerator: float) -> Tensor:
    """float32 [1]: numerator / (rows of which at least one label is not ignored, at least 1). No host sync."""
    out = torch.empty(1, dtype=torch.float32, device=targets_N.device)
    with torch.cuda.device_of(targets_N):
        label_share_kernel[(1,)](
            out, targets_N, targets_b_N, len(targets_N), ignore_index, float(numerator), BLOCK=_BLOCK, num_warps=8
        )
    return out
