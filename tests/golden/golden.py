"""Where the golden vectors are, and how a loss is compared with one."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(os.environ.get("KDDATA_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))
INDEX = json.loads((GOLDEN / "index.json").read_text()) if (GOLDEN / "index.json").is_file() else []
NEEDS_GOLDEN = pytest.mark.skipif(not INDEX, reason=f"no golden vectors: {GOLDEN} has no index.json")


def family(entry: dict[str, Any]) -> str:
    return entry["file"].removesuffix(".npz").split("__")[0]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as file:
        return dict(file)


def compare(ours: Tensor, x: Tensor, loss: np.ndarray | Tensor, grad: np.ndarray | Tensor) -> None:
    """At the tolerances that the folder's README states. A reference's NaN or infinity is not a target."""
    (ours_grad,) = torch.autograd.grad(ours, x, retain_graph=True)
    loss, grad = np.asarray(loss), np.asarray(grad)
    single = x.dtype == torch.float32
    if np.isfinite(loss):
        rtol, atol = (2e-4, 1e-5) if single else (1e-9, 1e-12)
        np.testing.assert_allclose(ours.item(), loss, rtol=rtol, atol=atol)
    if np.isfinite(grad).all():
        rtol, atol = (2e-4, 1e-5) if single else (1e-7, 1e-10)
        np.testing.assert_allclose(ours_grad.numpy(), grad, rtol=rtol, atol=atol)
    assert torch.isfinite(ours)
    assert torch.isfinite(ours_grad).all()
