"""How a row is cut into tiles: a table, not autotuning, so that the first call costs what every call costs.

Trade-off: the numbers come from reading compiled kernels (registers, spills, width of loads; see kernels/README.md),
and hold for a whole range of C; they may leave a few percent on the table for one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_K = 4096
RESIDENT_MAX_C = 32768


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One program's share: `rows` rows of `block` classes, held in registers, or walked over when `looped`."""

    rows: int
    block: int
    looped: bool
    num_warps: int


def tiles(num_classes: int, k: int, *, wide: bool = False) -> Tiles:
    """The tiles for rows of `num_classes` logits and k kept classes.

    Up to 32768 classes a row stays in registers: one read, one write. `wide` says that an element needs more than one
    register (two exponentials, or the sum of logits too): that spills, so it ends at 16384. Longer rows are read twice,
    the second time backwards, so that the end of a row is still in the L2 cache; few, large programs keep the rows in
    flight within that cache. A tile of 1024 elements takes one warp, which needs no barriers; short rows share it.
    """
    block = max(32, next_power_of_2(num_classes))
    k_block = max(16, next_power_of_2(k))
    if block > (RESIDENT_MAX_C // 2 if wide else RESIDENT_MAX_C):
        return Tiles(rows=1, block=16384, looped=True, num_warps=16)
    rows = min(8, max(1, 1024 // block))
    elements_per_warp = 1024 if block <= 4096 else 2048
    return Tiles(
        rows=rows,
        block=block,
        looped=False,
        num_warps=max(1, rows * block // elements_per_warp, rows * k_block // 256),
    )


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
