"""Program: a student as a torch.export program, model.pt2, which runs without kddata and without the code of its class.

    logits_BC = torch.export.load("model.pt2").module()(pixels)     # float32 [B, 3, S, S], normalised as card.json says

Not every network can be exported (one whose Python branches on pixels cannot), and the exporter may fail in any way: a
failure is a line of the card, never the end of a run. kddata loads no program but the one it has just made, to compare.
Trade-off: the weights lie in it a second time.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kddata import rng

FILE = "model.pt2"
_TOLERANCE = 1e-4  # of the largest logit: kernels that are chosen for another graph round otherwise, in float32
_log = logging.getLogger(__name__)


def exported(student: nn.Module, *, size_px: int) -> tuple[bytes | None, dict[str, Any]]:
    """The program of a student with any number of rows, and what its card says of it.

    The bytes are None where the student could not be exported, or where the program, loaded again, answers another
    number of rows with other logits than the student; the card then says why.
    """
    network = copy.deepcopy(student).cpu().eval()
    try:
        data = _program(network, _pixels(2, size_px))
        sample = _pixels(3, size_px)
        with torch.inference_mode():
            wanted = network(sample)
            found = torch.export.load(io.BytesIO(data)).module()(sample)
        difference, most = float((found - wanted).abs().max()), _TOLERANCE * max(1.0, float(wanted.abs().max()))
        if not difference <= most:
            raise ValueError(f"its logits differ from the student's by {difference:.3g}, where {most:.3g} is rounding")
    except Exception as error:  # of the exporter, which documents none
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        _log.warning("no %s is kept, since the student could not be exported: %s", FILE, reason)
        return None, {"file": None, "reason": reason}
    return data, {"file": FILE, "input": ["batch", 3, size_px, size_px], "largest_difference": difference}


def _program(network: nn.Module, example: Tensor) -> bytes:
    batch, file = torch.export.Dim("batch"), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=False)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths and source lines of this machine
        program.example_inputs = None  # they would be the one pickle in the file
        torch.export.save(program, file)
    return file.getvalue()


def _pixels(rows: int, size_px: int) -> Tensor:
    """Noise that is the same in every run, float32 [rows, 3, S, S]."""
    return torch.from_numpy(rng.stream(0, "program", rows).standard_normal((rows, 3, size_px, size_px))).float()
