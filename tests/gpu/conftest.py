"""Tests of the Triton kernels: compiled on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1.

The interpreter is chosen when triton is imported, so tests/unit/test_kernels_interpreter.py runs this folder in
processes of its own. Elsewhere everything here is skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # kernel_reference.py, which is no test

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not INTERPRETED or item.get_closest_marker("needs_cuda"):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def empty_is_nan() -> Iterator[None]:
    """torch.empty hands out NaN (and the largest integer), so that an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


if INTERPRETED:
    import numpy as np
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        # Triton's interpreter before 3.7 turns loop bounds, arrays of one element, into ints as NumPy 2.4 refuses to.
        patch_tensor = interpreter._patch_lang_tensor

        def _patch(tensor: type, *rest: object) -> None:
            patch_tensor(tensor, *rest)
            tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

        interpreter._patch_lang_tensor = _patch
