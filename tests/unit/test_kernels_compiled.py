"""What Triton's own compiler makes of the kernels for sm_90, without a GPU: no wasteful loads, few or no spills."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kddata_kernels.aot import compile_for, example_arguments
from kddata_kernels.rows import kd_rows_kernel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HARD = {"alpha": 0.5, "temperature": 2.0}
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "1000": (1000, 10, {}),
    "1000, hard term": (1000, 10, HARD),
    "21841 padded": (21841, 10, {"row_stride": 21848}),
    "32000": (32000, 10, {}),
    "32000, hard term": (32000, 10, HARD),
    "32000, uniform": (32000, 10, {"tail": "uniform"}),
    "128256": (128256, 10, {}),
    "128256, hard term": (128256, 50, HARD),
}


@pytest.mark.parametrize("name", SHAPES)
def test_headline_shapes(name: str) -> None:
    """All bulk traffic moves 16 bytes a thread; other loads are of the kept classes. Spills stay within 64 bytes."""
    num_classes, k, options = SHAPES[name]
    arguments = example_arguments(num_classes, k, **options)
    made = compile_for(kd_rows_kernel, arguments)
    threads = 32 * arguments["num_warps"]
    wide = arguments["R"] * arguments["BLOCK"] // (8 * threads)  # bf16: 8 elements in 128 bits
    passes = 2 if arguments["LOOPED"] else 1
    assert made.loads.get(128) == wide * passes, made
    assert made.stores.get(128) == wide, made
    assert sum(count for bits, count in made.stores.items() if bits < 128) <= 4, made
    assert made.spill_bytes <= 64, made
    assert made.registers * threads <= 65536, made
    assert made.shared_bytes <= 8192, made


def test_rows_that_start_unaligned_move_two_bytes_at_a_time() -> None:
    """C = 21841 is odd: why a padded row stride is worth having."""
    made = compile_for(kd_rows_kernel, example_arguments(21841, 10))
    assert made.loads.get(128, 0) == 0
    assert made.loads[16] >= 64


def test_gradient_is_ordered_by_a_barrier() -> None:
    """Dense part, barrier, kept classes: with several warps the last two are in this order in the machine code."""
    made = compile_for(kd_rows_kernel, example_arguments(4096, 10))
    assert made.last_stores == ["dense", "barrier", "fixed"], made


@pytest.mark.parametrize(("tail", "dtype"), [("uniform", torch.float32), ("support", torch.float16)])
def test_other_tails_and_dtypes_compile(tail: str, dtype: torch.dtype) -> None:
    made = compile_for(kd_rows_kernel, example_arguments(5000, 7, dtype=dtype, tail=tail, alpha=0.5, temperature=0.5))
    assert made.registers <= 255


def test_all_classes_kept_needs_no_dense_pass() -> None:
    made = compile_for(kd_rows_kernel, example_arguments(1000, 1000))
    assert set(made.loads) <= {16, 32, 64}
    assert made.spill_bytes == 0
