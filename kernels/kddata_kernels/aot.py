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

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Facts of one compiled kernel. `loads` and `stores` count instructions by bits moved per thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    barriers: int
    loads: dict[int, int]
    stores: dict[int, int]


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
    )


def _widths(lines: list[str], opcode: str) -> dict[int, int]:
    """Instructions of one opcode by bits per thread: LDG.E is 32, LDG.E.128 is 128, LDG.E.U16 is 16."""
    found: Counter[int] = Counter()
    for line in lines:
        if match := re.search(rf"\b{opcode}\.E(\S*)", line):
            width = re.search(r"\.[US]?(8|16|64|128)\b", match.group(1))
            found[int(width.group(1)) if width else 32] += 1
    return dict(sorted(found.items()))


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
