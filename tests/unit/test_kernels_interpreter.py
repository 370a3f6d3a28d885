"""The kernels' tests in Triton's interpreter: the interpreter is chosen at import, so each file has its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)  # a minute on an idle machine, most of it Python in the interpreter
@pytest.mark.parametrize("name", ["values", "edges", "autograd", "linear"])
def test_kernels_in_the_interpreter(name: str) -> None:
    said = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"tests/gpu/test_kernel_{name}.py")
    assert " passed" in said


def test_the_benchmark_in_the_interpreter(tmp_path: Path) -> None:
    """All of its code but the timer; every provider's gradient is compared with float64's before it has a turn."""
    results = tmp_path / "kernels.json"
    # Liger's KL takes a number that the interpreter cannot; compiling takes long and is torch's own affair.
    skip = ("--skip", "compile", "Liger KL")
    said = interpreted("benchmarks/kernels.py", "--tiny", *skip, "--out", str(results))
    written = json.loads(results.read_text())
    names = {row["provider"] for row in written["measured"]}
    assert {"copy", "fused, renorm", "fused, bucket", "torch eager, sparse", "fused linear: teacher"} <= names
    assert all(row["median_us"] > 0 for row in written["measured"])
    assert {"commit", "versions"} <= set(written["environment"])
    assert written["interpreted"]
    assert "fused, bucket" in said
    assert "median us" in said


def test_the_benchmark_times_no_provider_that_computes_something_else() -> None:
    code = """if True:
        import sys, torch
        sys.path.insert(0, "benchmarks")
        import kernels
        logits, teacher, targets = kernels.tensors(8, 64, 0, "cpu")
        exact = kernels.exact_gradient(logits, teacher, targets, 2.0, 0.5, "renorm")
        kernels.check_equal({"right": lambda: (exact.sum(), exact)}, lambda name: exact)
        try:
            kernels.check_equal({"wrong": lambda: (exact.sum(), 1.05 * exact)}, lambda name: exact)
        except SystemExit as refusal:
            print(refusal)
    """
    assert "wrong computes something else: its gradient is off by 0.05" in interpreted("-c", code)


def interpreted(*command: str) -> str:
    """What a Python process printed, with the kernels in the interpreter; fails the test if it fails."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    line = [sys.executable, "-W", "ignore", *command]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout
