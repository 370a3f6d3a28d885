"""What the compiler makes of a launch, without a GPU: registers, spills, shared memory, widths of loads and stores.

Compiles for a compute capability with Triton's own compiler and reads the machine code with the two tools that ship
with it. It cannot show speed. Not for a process in which TRITON_INTERPRET is set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kddata_kernels.launch import Out, Recipe, Rows, kd_rows_arguments
from kddata_kernels.plan import Tiles


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Facts of one compiled kernel. `loads` and `stores` count instructions by bits moved per thread; `last_stores`
    is the order at its end: wide stores are dense, narrow ones fixed classes."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    barriers: int
    loads: dict[int, int]
    stores: dict[int, int]
    last_stores: list[str]


def compile_for(kernel: Any, arguments: dict[str, Any], *, capability: int = 90) -> Compiled:
    """Compiles a jitted kernel for the arguments of a launch (`kd_rows_arguments`), specialised as it would be."""
    options = {name: arguments[name] for name in ("num_warps", "enable_fp_fusion") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = _triton_type(value)
        if isinstance(value, Tensor) and value.data_ptr() % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", cubin), _tool("nvdisasm", "-c", cubin)
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        spill_bytes=int(re.findall(r"STACK:(\d+)", usage)[-1]) + int(re.findall(r"LOCAL:(\d+)", usage)[-1]),
        shared_bytes=compiled.metadata.shared,
        instructions=len(lines),
        barriers=sum("BAR.SYNC" in line for line in lines),
        loads=_widths(lines, "LDG"),
        stores=_widths(lines, "STG"),
        last_stores=_order_of_stores(lines),
    )


def example_arguments(
    num_classes: int,
    k: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    row_stride: int | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    tail: str = "bucket",
    tiling: Tiles | None = None,
) -> dict[str, Any]:
    """The arguments of a launch of the row kernel that makes loss and gradient, labels taking part where alpha < 1."""
    logits, grad = (torch.empty(2, row_stride or num_classes, dtype=dtype)[:, :num_classes] for _ in range(2))
    ids = torch.zeros(2, k, dtype=torch.int32).to(torch.uint16 if num_classes <= 65536 else torch.int32)
    rows = Rows(
        logits_NC=logits,
        ids_NK=ids,
        log_p_NK=torch.empty(2, k, dtype=torch.float16),
        log_tail_N=torch.empty(2),
        targets_N=torch.zeros(2, dtype=torch.int64) if alpha < 1 else None,
        targets_b_N=None,
        lam_N=None,
        weights_N=None,
        ce_scale=torch.ones(1) if alpha < 1 else None,
    )
    recipe = Recipe(
        temperature=temperature,
        alpha=alpha,
        tail=tail,
        label_smoothing=0.0,
        ignore_index=-100,
        kd_scale=0.5,
        ce_scale=1.0,
    )
    return kd_rows_arguments(rows, recipe, Out(loss_N=torch.empty(2), grad_NC=grad), tiling=tiling)


def _widths(lines: list[str], opcode: str) -> dict[int, int]:
    """Instructions of one opcode by bits per thread: LDG.E is 32, LDG.E.128 is 128, LDG.E.U16 is 16."""
    found: Counter[int] = Counter()
    for line in lines:
        if match := re.search(rf"\b{opcode}\.E(\S*)", line):
            width = re.search(r"\.[US]?(8|16|64|128)\b", match.group(1))
            found[int(width.group(1)) if width else 32] += 1
    return dict(sorted(found.items()))


def _order_of_stores(lines: list[str]) -> list[str]:
    """From the first wide store on: "dense" for runs of 128-bit stores, "fixed" for 16-bit ones, "barrier"."""
    order: list[str] = []
    for line in lines:
        kinds = {"STG.E.128": "dense", "STG.E.U16": "fixed", "BAR.SYNC": "barrier"}
        kind = next((name for opcode, name in kinds.items() if opcode in line), None)
        if kind and (order or kind == "dense") and order[-1:] != [kind]:
            order.append(kind)
    return order


def _triton_type(value: Any) -> str:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return (
            "*"
            + {
                "bfloat16": "bf16",
                "float16": "fp16",
                "float32": "fp32",
                "uint16": "u16",
                "int32": "i32",
                "int64": "i64",
            }[name]
        )
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _tool(name: str, *args: Any) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *map(str, args)], check=True, capture_output=True, text=True).stdout
