"""How fast the fused distillation loss is, beside a plain copy and its peers, forward and backward as one call.

    python benchmarks/kernels.py                   every shape, on a GPU; a table, and benchmarks/results/kernels.json
    python benchmarks/kernels.py --sweep           the row kernel alone, over ways to tile a row
    python benchmarks/kernels.py --compiled        registers, spills and widths of loads for sm_90; needs no GPU
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny   the same code on a CPU, where times mean nothing

One process, the same tensors for everyone, providers in turn, several rounds. All provide the same loss: the renorm
tail is the one that has a dense teacher, which peers need. Before anything is timed, every provider's gradient is
compared with float64's. Every provider is charged the ideal bytes: one read and one write of the logits.
Peers live in the extra `bench`; one that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kddata_kernels as kernels
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kddata_kernels import launch
from kddata_kernels.aot import compile_for, example_arguments
from kddata_kernels.checks import INTERPRETED
from kddata_kernels.plan import Tiles
from kddata_kernels.rows import kd_rows_kernel
from results import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# rows, classes, padding of a row, goal in microseconds for a teacher alone at T = 1
SHAPES = [
    (4096, 1000, 0, 8.0),
    (1024, 21841, 0, None),
    (1024, 21841, 7, 26.0),
    (8192, 32000, 0, 305.0),
    (8192, 128256, 0, 1400.0),
]
LINEAR_SHAPES = [(8192, 4096, 32000), (8192, 4096, 128256)]
TERMS = {"teacher, T=1": (1.0, 1.0), "teacher and labels, T=2": (2.0, 0.5)}
K = 10
CHECKED_ROWS = 64

Step = Callable[[], tuple[Tensor, ...]]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one tiny shape on a CPU, in the interpreter")
    parser.add_argument("--sweep", action="store_true", help="tilings of the row kernel")
    parser.add_argument("--compiled", action="store_true", help="facts of the machine code, without a GPU")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="WORD", help="leave out providers with this in their name"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels.json")
    args = parser.parse_args()
    console = Console(width=200)
    if args.compiled:
        console.print(compiled_table())
        return
    if args.tiny != INTERPRETED or (not args.tiny and not torch.cuda.is_available()):
        parser.error("a CUDA device is needed; or TRITON_INTERPRET=1 with --tiny; or --compiled, which needs neither")
    device = "cpu" if args.tiny else "cuda"
    shapes = [(8, 64, 0, None)] if args.tiny else SHAPES
    measured: list[dict[str, Any]] = []
    for (n, c, padding, goal), (terms, (temperature, alpha)) in itertools.product(shapes, TERMS.items()):
        where = {"shape": f"{n} x {c}" + (f" (+{padding})" if padding else ""), "terms": terms}
        logits, teacher, targets = tensors(n, c, padding, device)
        if args.sweep:
            steps = swept(logits, teacher, targets, temperature, alpha)
        else:
            steps = providers(logits, teacher, targets, temperature, alpha)
        steps = {name: step for name, step in steps.items() if not any(word in name for word in args.skip)}
        exact = {
            tail: exact_gradient(logits, teacher, targets, temperature, alpha, tail) for tail in ("renorm", "bucket")
        }
        check_equal(steps, lambda name, exact=exact: exact["bucket" if "bucket" in name else "renorm"])
        rows = timed(steps, rounds=args.rounds, ideal_bytes=2 * logits.element_size() * n * c, interpreted=args.tiny)
        measured += [
            where | row | {"goal_us": goal if alpha == 1 and "fused" in row["provider"] else None} for row in rows
        ]
    if not args.sweep:
        for n, d, c in [(16, 8, 64)] if args.tiny else LINEAR_SHAPES:
            steps, gradients = linear_providers(n, d, c, device)
            steps = {name: step for name, step in steps.items() if not any(word in name for word in args.skip)}
            check_equal(steps, lambda name, gradients=gradients: gradients[name.split(": ")[1]])
            where = {"shape": f"{n} x {d} x {c}", "terms": "linear"}
            rows = timed(steps, rounds=args.rounds, ideal_bytes=None, interpreted=args.tiny)
            measured += [where | row for row in rows]
    console.print(measured_table(measured))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "clocks": clocks(), "interpreted": args.tiny, "measured": measured}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {args.out}")


def tensors(n: int, c: int, padding: int, device: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """(bf16 logits, (ids, logits of the teacher on them, log tail), targets)."""
    g = torch.Generator(device=device).manual_seed(0)
    logits = torch.empty(n, c + padding, dtype=torch.bfloat16, device=device).normal_(0, 3, generator=g)[:, :c]
    ids = torch.rand(n, c, device=device, generator=g).topk(K, 1).indices.to(torch.int32)
    kept = torch.randn(n, K, device=device, generator=g).sort(1, descending=True).values
    targets = torch.randint(0, c, (n,), device=device, generator=g)
    return logits.requires_grad_(), (ids, kept, torch.full((n,), math.log(0.1), device=device)), targets


def providers(
    logits: Tensor, teacher: tuple[Tensor, Tensor, Tensor], targets: Tensor, temperature: float, alpha: float
) -> dict[str, Step]:
    """Name -> a call of forward and backward that returns (loss, gradient). The copy returns nothing."""
    ids, kept, log_tail = teacher
    index, log_p = ids.long(), torch.log_softmax(kept / temperature, 1)
    p = log_p.exp()
    t2, hard = temperature**2, alpha < 1
    y = targets if hard else None

    def fused(tail: str, recompute: bool) -> Tensor:
        options = {"temperature": temperature, "alpha": alpha, "tail": tail, "recompute": recompute}
        return kernels.kd_loss(logits, ids, log_p, log_tail, y, **options)

    def eager_sparse() -> Tensor:
        x = logits.float()
        lse = torch.logsumexp(x / temperature, 1)
        soft = (p * (log_p - x.gather(1, index) / temperature)).sum(1) + lse
        return alpha * t2 * soft.mean() + ((1 - alpha) * F.cross_entropy(x, targets) if hard else 0)

    dense = torch.zeros(logits.shape, device=logits.device).scatter_(1, index, p)

    def eager_dense() -> Tensor:
        x = logits.float()
        soft = F.kl_div(torch.log_softmax(x / temperature, 1), dense, reduction="batchmean")
        return alpha * t2 * soft + ((1 - alpha) * F.cross_entropy(x, targets) if hard else 0)

    flat = logits.detach().as_strided((logits.shape[0] * logits.stride(0),), (1,))  # its padding too
    target = torch.empty_like(flat)

    def copy() -> tuple[Tensor, ...]:
        copy_kernel[(triton.cdiv(flat.numel(), 8192),)](flat, target, flat.numel(), BLOCK=8192, num_warps=8)
        return ()

    losses: dict[str, Callable[[], Tensor]] = {
        "fused, renorm": lambda: fused("renorm", False),
        "fused, bucket": lambda: fused("bucket", False),
        "fused, renorm, gradient in backward": lambda: fused("renorm", True),
        "torch eager, sparse": eager_sparse,
        "torch eager, dense": eager_dense,
        "torch.compile, sparse": torch.compile(eager_sparse),
        "torch.compile, dense": torch.compile(eager_dense),
    }
    if liger := installed("liger_kernel.transformers"):
        kl, ce = liger.LigerKLDIVLoss(reduction="batchmean"), liger.LigerCrossEntropyLoss()
        low = dense.to(torch.float32)

        def liger_loss() -> Tensor:
            soft = kl(torch.log_softmax(logits.float() / temperature, 1), low)
            return alpha * t2 * soft + ((1 - alpha) * ce(logits.float(), targets) if hard else 0)

        losses["Liger KL and CE, dense"] = liger_loss
    return {"copy": copy} | {name: with_backward(loss, (logits,)) for name, loss in losses.items()}


def linear_providers(n: int, d: int, c: int, device: str) -> tuple[dict[str, Step], dict[str, Tensor]]:
    """Name -> a call that returns (loss, gradients of features and weight); and what each kind of loss should be.

    Labels alone are what all classifiers can do. Liger's KL takes the features and the classifier of a dense teacher,
    and runs it too: more work, shown for want of a closer peer.
    """
    g = torch.Generator(device=device).manual_seed(0)
    x, other = (torch.empty(n, d, dtype=torch.bfloat16, device=device).normal_(generator=g) for _ in range(2))
    weight = torch.empty(c, d, dtype=torch.bfloat16, device=device).normal_(0, d**-0.5, generator=g).requires_grad_()
    x.requires_grad_()
    _, (ids, kept, log_tail), targets = tensors(n, c, 0, device)
    log_p = torch.log_softmax(kept, 1)
    linear = kernels.kd_linear_loss
    losses: dict[str, Callable[[], Tensor]] = {
        "fused linear: labels": lambda: linear(x, weight, None, ids, log_p, log_tail, targets, alpha=0.0),
        "fused linear: teacher": lambda: linear(x, weight, None, ids, log_p, log_tail),
        "torch eager: labels": lambda: F.cross_entropy((x @ weight.t()).float(), targets),
        "all logits, fused loss: teacher": lambda: kernels.kd_loss(x @ weight.t(), ids, log_p, log_tail),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy: labels"] = lambda: F.linear_cross_entropy(x, weight, targets)
    if liger := installed("liger_kernel.transformers"):
        fused_ce, fused_jsd = liger.LigerFusedLinearCrossEntropyLoss(), liger.LigerFusedLinearJSD(jsd_beta=0.0)
        losses["Liger fused linear CE: labels"] = lambda: fused_ce(weight, x, targets)
        losses["Liger fused linear KL: dense teacher"] = lambda: fused_jsd(x, weight, other, weight.detach(), None)

    some = slice(0, CHECKED_ROWS)
    exact, rows = weight.detach().double(), x.detach()[some].double().requires_grad_()
    logits = rows @ exact.t()
    dense = torch.softmax(other[some].double() @ exact.t(), 1)
    soft = exact_kd(logits, ids[some], log_p[some].double(), log_tail[some].double(), "bucket", 1.0)
    wanted = {
        "labels": F.cross_entropy(logits, targets[some], reduction="sum"),
        "teacher": soft,
        "dense teacher": F.kl_div(torch.log_softmax(logits, 1), dense, reduction="sum"),
    }
    gradients = {name: torch.autograd.grad(value / n, rows, retain_graph=True)[0] for name, value in wanted.items()}
    return {name: with_backward(loss, (x, weight)) for name, loss in losses.items()}, gradients


def swept(
    logits: Tensor, teacher: tuple[Tensor, Tensor, Tensor], targets: Tensor, temperature: float, alpha: float
) -> dict[str, Step]:
    """The copy, and the row kernel with other tiles than the table's."""
    every = providers(logits, teacher, targets, temperature, alpha)
    c = logits.shape[1]
    block = launch.next_power_of_2(c)
    candidates = [
        Tiles(rows=r, block=block, looped=False, num_warps=w) for r in (1, 2, 4) for w in (1, 2, 4, 8, 16, 32)
    ]
    candidates = [t for t in candidates if 256 <= t.rows * block / t.num_warps <= 4096]
    candidates += [
        Tiles(rows=1, block=b, looped=True, num_warps=w)
        for b in (2048, 4096, 8192, 16384)
        for w in (4, 8, 16)
        if b < c and 256 <= b / w <= 2048
    ]
    steps = {"copy": every["copy"], "fused, bucket, table": every["fused, bucket"]}
    for tiling in candidates:
        kind = "looped" if tiling.looped else "resident"
        name = f"fused, bucket, {tiling.rows} x {tiling.block} {kind}, {tiling.num_warps} warps"
        steps[name] = with_tiles(every["fused, bucket"], tiling)
    return steps


def with_tiles(step: Step, tiling: Tiles) -> Step:
    def run() -> tuple[Tensor, ...]:
        table, launch.tiles = launch.tiles, lambda *_, **__: tiling
        try:
            return step()
        finally:
            launch.tiles = table

    return run


def with_backward(loss: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Step:
    def run() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def exact_kd(x: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor, tail: str, temperature: float) -> Tensor:
    """The sum over rows of KL, from dense float64 tensors."""
    log_q = torch.log_softmax(x / temperature, 1)
    on = log_q.gather(1, ids.long())
    if tail == "renorm":
        return (log_p.exp() * (log_p - on)).sum()
    off = torch.logsumexp(log_q.scatter(1, ids.long(), -math.inf), 1)
    scaled = log_p + torch.log(-torch.expm1(log_tail))[:, None]
    return (scaled.exp() * (scaled - on)).sum() + (log_tail.exp() * (log_tail - off)).sum()


def exact_gradient(
    logits: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    temperature: float,
    alpha: float,
    tail: str,
) -> Tensor:
    """float64, for the first rows."""
    some = slice(0, CHECKED_ROWS)
    ids, kept, log_tail = (x[some] for x in teacher)
    x = logits.detach()[some].double().requires_grad_()
    log_p = torch.log_softmax(kept.double() / temperature, 1)
    loss = alpha * temperature**2 * exact_kd(x, ids, log_p, log_tail.double(), tail, temperature)
    if alpha < 1:
        loss = loss + (1 - alpha) * F.cross_entropy(x, targets[some], reduction="sum")
    return torch.autograd.grad(loss / logits.shape[0], x)[0]


def check_equal(steps: dict[str, Step], wanted_for: Callable[[str], Tensor]) -> None:
    """Raises SystemExit, naming the provider, unless its gradient is that of float64 in the first rows."""
    for name, step in steps.items():
        if found := step():
            wanted = wanted_for(name)
            error = float((found[1][:CHECKED_ROWS].double() - wanted).abs().max() / wanted.abs().max())
            if not error < 0.02:  # logits or gradients in bf16, with its 8 bits, lie within 1 %
                raise SystemExit(f"{name} computes something else: its gradient is off by {error:.3g} of its largest")


def timed(steps: dict[str, Step], *, rounds: int, ideal_bytes: int | None, interpreted: bool) -> list[dict[str, Any]]:
    """Medians over rounds in which every provider has a turn; with a CUDA graph too where launches would dominate."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    peak: dict[str, int] = {}
    for _ in range(1 if interpreted else rounds):
        for name, step in steps.items():
            found[name].append(once_us(step) if interpreted else 1e3 * triton.testing.do_bench(step, quantiles=[0.5]))
    if not interpreted:
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak[name] = torch.cuda.max_memory_allocated() - before
    small = ideal_bytes is not None and ideal_bytes < 2**26
    rows = []
    for name, step in steps.items():
        median = statistics.median(found[name])
        graph = None
        if small and not interpreted and "compile" not in name:
            graph = 1e3 * triton.testing.do_bench_cudagraph(step, quantiles=[0.5])
        rows.append(
            {
                "provider": name,
                "median_us": median,
                "spread_us": max(found[name]) - min(found[name]),
                "graph_us": graph,
                "ideal_gb_per_s": None if ideal_bytes is None else ideal_bytes / (graph or median) / 1e3,
                "peak_bytes": peak.get(name),
            }
        )
    if "copy" in steps:
        copied = next(row["ideal_gb_per_s"] for row in rows if row["provider"] == "copy")
        for row in rows:
            row["share_of_copy"] = row["ideal_gb_per_s"] / copied
    return rows


def once_us(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)


def measured_table(measured: list[dict[str, Any]]) -> Table:
    table = Table(
        "shape", "terms", "provider", "median us", "spread us", "graph us", "GB/s", "of copy", "goal us", "peak MiB"
    )
    for row in measured:
        table.add_row(
            row["shape"],
            row["terms"],
            row["provider"],
            f"{row['median_us']:.1f}",
            f"{row['spread_us']:.1f}",
            "" if row["graph_us"] is None else f"{row['graph_us']:.1f}",
            "" if row["ideal_gb_per_s"] is None else f"{row['ideal_gb_per_s']:.0f}",
            f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else "",
            "" if row.get("goal_us") is None else f"{row['goal_us']:.0f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        )
    return table


def compiled_table(capability: int = 90) -> Table:
    """What Triton's compiler makes of the row kernel for the benchmark's shapes."""
    table = Table(
        "C",
        "k",
        "terms",
        "rows x block",
        "warps",
        "registers",
        "spill B",
        "shared B",
        "loads",
        "stores",
        title=f"sm_{capability}",
    )
    for (_, c, padding, _), k, (terms, (temperature, alpha)) in itertools.product(SHAPES, (10, 50), TERMS.items()):
        arguments = example_arguments(c, k, row_stride=c + padding, temperature=temperature, alpha=alpha)
        made = compile_for(kd_rows_kernel, arguments, capability=capability)
        table.add_row(
            f"{c} (+{padding})" if padding else f"{c}",
            f"{k}",
            terms,
            f"{arguments['R']} x {arguments['BLOCK']}" + (" looped" if arguments["LOOPED"] else ""),
            f"{arguments['num_warps']}",
            f"{made.registers}",
            f"{made.spill_bytes}",
            f"{made.shared_bytes}",
            " ".join(f"{count}x{bits}" for bits, count in made.loads.items()),
            " ".join(f"{count}x{bits}" for bits, count in made.stores.items()),
        )
    return table


def installed(module: str) -> Any:
    """The module, or None (said once) where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(module)
    print(f"{module} is not installed and left out: pip install 'kddata[bench]'")
    return None


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the GPU, without which a time means little."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(query.split(","), said.splitlines()[0].split(", "), strict=True))


if __name__ == "__main__":
    main()
