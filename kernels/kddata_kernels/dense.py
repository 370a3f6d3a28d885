"""The pass over all classes but the fixed ones: jitted helpers of the kernel in `rows.py`.

A row's fixed classes are its k kept ones and its labels. They are gathered and worked out one by one; the dense pass
leaves them out of its sums. So the mass outside the kept classes is summed, never found as one minus the rest: exact
when it is 1e-12, and exact in the log domain when it underflows. Leaving them out takes a bitmap, one bit a class,
built in registers from the ids: about k / 8 + 3 integer operations an element, no memory traffic.

Shapes: R rows of a program, BLOCK classes of a tile, W = BLOCK / 32 words of the bitmap.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite(m):  # type: ignore[no-untyped-def]
    """m, or 0 where it is -inf: a safe reference for exp(x - m) when no class is left."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def power(e, POWER: tl.constexpr):  # type: ignore[no-untyped-def]
    """e to a whole power by multiplication."""
    if POWER == 1:
        return e
    if POWER == 2:
        return e * e
    if POWER == 3:
        return e * e * e
    return (e * e) * (e * e)


@triton.jit
def exps(x, ref, inv_t, DENSE_KD: tl.constexpr, DENSE_CE: tl.constexpr, POWER: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp((x - ref) / T) and exp(x - ref), with one exponential where T is a small integer or one is not wanted."""
    if DENSE_KD:
        e = tl.exp((x - ref) * inv_t)
    else:
        e = tl.exp(x - ref)
    if not (DENSE_KD and DENSE_CE):
        return e, e
    if POWER > 0:
        return e, power(e, POWER)
    return e, tl.exp(x - ref)


@triton.jit
def load_tile(logits_row, offs, live, width):  # type: ignore[no-untyped-def]
    """float32 [R, BLOCK]. Up to `width`, which may lie in the padding of a row: a mask at an odd C splits the loads."""
    mask = live[:, None] & (offs < width)[None, :]
    return tl.load(logits_row[:, None] + offs[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def bit_of(local, word):  # type: ignore[no-untyped-def]
    """The bit of class `local` where it lies in `word`, else 0. A class before the tile is negative: in none."""
    return tl.where((local >> 5) == word, 1 << (local & 31), 0)


@triton.jit
def fixed_bits(ids_ptr, ids_row, live, K, y1, y2, start, R: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [R, BLOCK]: 1 where a class of the tile at `start` is kept (K > 0) or a label (y >= 0)."""
    W: tl.constexpr = BLOCK // 32
    word = tl.arange(0, W)
    words = bit_of(y1[:, None] - start, word[None, :]) | bit_of(y2[:, None] - start, word[None, :])
    for j0 in range(0, K, 16):
        j = j0 + tl.arange(0, 16)
        ids = tl.load(ids_ptr + ids_row[:, None] + j[None, :], mask=live[:, None] & (j < K)[None, :], other=0)
        local = tl.where((j < K)[None, :], ids.to(tl.int32) - start, -1)
        words |= tl.sum(bit_of(local[:, :, None], word[None, None, :]), 1)  # ids are distinct, so the sum is an "or"
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (R, BLOCK))
