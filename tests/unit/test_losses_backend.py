"""Which backend serves a call, what is said where it cannot, and that both mean the same."""

import os
import subprocess
import sys

import pytest
import torch

from kddata.errors import ConfigError
from kddata.labels import SoftLabels
from kddata.losses import kd_linear_loss, kd_loss, rows

pytest.importorskip("triton")

COMPARISON = """
import dataclasses, torch
from kddata.labels import SoftLabels
from kddata.losses import dkd_loss, kd_linear_loss, kd_loss, rows

device = {device!r}
generator = torch.Generator().manual_seed(0)
randn = lambda *shape: (3 * torch.randn(*shape, generator=generator)).to(device)
labels = SoftLabels.from_logits(randn(5, 37), k=4, temperatures=(2.0,))
labels = dataclasses.replace(labels, ids_BK=labels.ids_BK.to(torch.uint16), log_p_BK=labels.log_p_BK.half())
y, y2 = torch.tensor([[0, 1, -1, 36, 5], [0, 7, -1, -1, 2]], device=device)
more = dict(alpha=0.3, ignore_index=-1, label_smoothing=0.1, targets2_B=y2, lam=0.6, weights_B=randn(5).abs())
x, features, weight, bias = (t.requires_grad_() for t in (randn(5, 37), randn(5, 8), randn(37, 8), randn(37)))

def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)

for tail in rows.TAILS:
    args = dict(temperature=1.0 if tail == "sampled" else 2.0, tail=tail)
    for options in ({{}}, {{"targets_B": y, **more}}, {{"targets_B": y, **more, "reduction": "none"}}):
        results = []
        for backend in ("torch", "triton"):
            stats = []
            loss = kd_loss(x, labels, **args, **options, backend=backend, on_stats=stats.append)
            results.append((loss, *torch.autograd.grad(loss.sum(), x), *stats[0]))
        close(*results)
results = []
for backend in ("torch", "triton"):
    loss = kd_linear_loss(features, weight, labels, y, bias_C=bias, temperature=2.0, **more, backend=backend)
    results.append((loss, *torch.autograd.grad(loss, (features, weight, bias))))
close(*results)
dense = SoftLabels.from_logits(randn(5, 37), k=37)
for options in ({{}}, {{"weights_B": more["weights_B"], "reduction": "none"}}):
    results = []
    for backend in ("torch", "triton"):
        loss = dkd_loss(x, dense, y, temperature=2.0, ignore_index=-1, **options, backend=backend)
        results.append((loss, torch.autograd.grad(loss.sum(), x)[0]))
    close(*results)
print("equal")
"""


def small() -> tuple[torch.Tensor, SoftLabels]:
    return torch.zeros(2, 7), SoftLabels.from_logits(torch.eye(2, 7), k=3)


def test_auto_on_cpu_is_plain_torch_without_triton() -> None:
    """In a fresh process, where TRITON_INTERPRET would otherwise let the kernels run."""
    code = (
        "import sys, torch; from kddata.losses import kd_loss; from kddata.labels import SoftLabels;"
        "kd_loss(torch.zeros(2, 7), SoftLabels.from_logits(torch.eye(2, 7), k=3), temperature=1.0);"
        "assert 'kddata_kernels' not in sys.modules; print('plain')"
    )
    assert _python(code) == "plain"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves CPU tensors")
def test_triton_on_cpu_says_what_is_missing() -> None:
    x, labels = small()
    with pytest.raises(ConfigError, match=r"backend triton needs a CUDA device \(or TRITON_INTERPRET=1\).*device cpu"):
        kd_loss(x, labels, temperature=1.0, backend="triton")
    with pytest.raises(ConfigError, match=r"backend triton needs .*device cpu"):
        kd_linear_loss(torch.zeros(2, 3), torch.zeros(7, 3), labels, temperature=1.0, backend="triton")


def test_float64_is_not_for_the_kernels() -> None:
    x, labels = small()
    with pytest.raises(ConfigError, match="got float64 logits, and the kernels compute in float32"):
        kd_loss(x.double(), labels, temperature=1.0, backend="triton")


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kddata_kernels", None)
    x, labels = small()
    with pytest.raises(ConfigError, match="got import of kddata_kernels halted"):
        kd_loss(x, labels, temperature=1.0, backend="triton")


def test_both_backends_agree_in_the_interpreter() -> None:
    """In a process of its own: TRITON_INTERPRET has to be set before triton is imported."""
    assert _python(COMPARISON.format(device="cpu"), TRITON_INTERPRET="1") == "equal"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_both_backends_agree_on_a_gpu() -> None:
    assert _python(COMPARISON.format(device="cuda")) == "equal"


def _python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_every_tail_is_known_to_the_kernels() -> None:
    import kddata_kernels

    assert set(kddata_kernels.TAILS) == set(rows.TAILS)
