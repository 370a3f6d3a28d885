"""What callers may hand in: every rule is checked here, once, on shapes, dtypes, strides and devices alone (no sync).

`debug=True` also reads the ids and labels, which waits for the device. Without it a class outside [0, C) turns its row
into NaN, and ids that repeat in a row give a wrong result for that row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kddata_kernels.count import label_share_kernel
from kddata_kernels.plan import MAX_K
from kddata_kernels.tails import TAILS

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = "Interpreted" in type(label_share_kernel).__name__


def unavailable(device: torch.device | str) -> str | None:
    """None where the kernels run on this device, else a sentence that says what is missing."""
    if INTERPRETED or torch.device(device).type == "cuda":
        return None
    return (
        f"the Triton kernels run on a CUDA device, or anywhere in Triton's interpreter; got device {device}. "
        "Next: move the tensors to a GPU, set TRITON_INTERPRET=1 before triton is imported (slow), or take plain torch"
    )


def reject(rule: str, actual: object, fix: str) -> ValueError:
    """An error in the house form: rule, actual value, what next."""
    return ValueError(f"{rule}; got {actual}. Next: {fix}.")


def check_numbers(
    *, temperature: float, alpha: float, tail: str, label_smoothing: float, reduction: str, reductions: tuple[str, ...]
) -> None:
    """Raises ValueError for a number or name out of range."""
    if tail not in TAILS:
        raise reject(f"tail is one of {', '.join(TAILS)}", repr(tail), "name one of them")
    if not (math.isfinite(temperature) and temperature > 0):
        raise reject("a temperature is a positive number", temperature, "the one of log_p and log_tail")
    if not 0 <= alpha <= 1:
        raise reject("alpha is between 0 (labels alone) and 1 (teacher alone)", alpha, "scale the loss itself instead")
    if not 0 <= label_smoothing <= 1:
        raise reject("label_smoothing is between 0 and 1", label_smoothing, "0 turns it off")
    if reduction not in reductions:
        raise reject(f"reduction is one of {', '.join(reductions)}", repr(reduction), "name one of them")


def check_rows(
    num_rows: int,
    num_classes: int,
    device: torch.device,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    log_tail_N: Tensor | None,
    *,
    tail: str,
    targets_N: Tensor | None = None,
    targets_b_N: Tensor | None = None,
    lam_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    needs_targets: bool = False,
) -> None:
    """Raises ValueError unless teacher and label tensors fit [num_rows, num_classes] logits on `device`."""
    if message := unavailable(device):
        raise ValueError(message + ".")
    if ids_NK.ndim != 2 or ids_NK.shape[0] != num_rows:
        raise reject(
            f"ids are [N, K] with N = {num_rows}", tuple(ids_NK.shape), "one row of ids for each row of logits"
        )
    k = ids_NK.shape[1]
    if not 1 <= k <= num_classes:
        raise reject(
            f"between 1 and C = {num_classes} classes are kept", f"k = {k}", "store labels with k of at least 1"
        )
    if k > MAX_K:
        raise reject(f"the kernel keeps at most {MAX_K} classes", f"k = {k}", "use the plain-torch loss")
    _check("ids", ids_NK, (num_rows, k), (torch.uint16, torch.int32, torch.int64), device)
    _check("log_p", log_p_NK, (num_rows, k), (torch.float16, torch.float32), device)
    if log_tail_N is None and tail in ("bucket", "uniform") and k < num_classes:
        raise reject(
            f"the {tail} tail needs the log of the teacher's mass outside ids",
            "log_tail = None",
            "pass it, or choose renorm",
        )
    if targets_N is None and (needs_targets or targets_b_N is not None):
        raise reject("alpha below 1 and second labels need targets", "targets = None", "pass them, or alpha = 1")
    if (targets_b_N is None) != (lam_N is None):
        raise reject("second labels and lam come together", "one of them", "pass both, or neither")
    labels = (torch.int32, torch.int64)
    for name, x, dtypes in (
        ("log_tail", log_tail_N, (torch.float32,)),
        ("targets", targets_N, labels),
        ("targets_b", targets_b_N, labels),
        ("lam", lam_N, (torch.float32,)),
        ("weights", weights_N, (torch.float32,)),
    ):
        if x is not None:
            _check(name, x, (num_rows,), dtypes, device)


def check_logits(logits_NC: Tensor) -> None:
    """Raises ValueError unless logits are [N, C], of a dtype the kernel reads, with classes side by side."""
    if logits_NC.ndim != 2 or logits_NC.shape[1] < 1:
        raise reject("logits are [N, C]", tuple(logits_NC.shape), "flatten other dimensions into rows")
    if logits_NC.dtype not in _FLOATS:
        raise reject("logits are bfloat16, float16 or float32", logits_NC.dtype, "use the plain-torch loss for float64")
    if logits_NC.shape[1] > 1 and logits_NC.stride(1) != 1:
        raise reject("the classes of a row lie side by side", f"strides {logits_NC.stride()}", "logits.contiguous()")


def check_classes(num_classes: int, ids_NK: Tensor, targets: tuple[Tensor | None, ...], ignore_index: int) -> None:
    """Debug mode, waits for the device: raises ValueError for ids that repeat, and ids or labels that are no class."""
    ids = ids_NK.long()
    ordered = ids.sort(dim=1).values
    rules = [
        (f"ids are in [0, {num_classes})", ((ids < 0) | (ids >= num_classes)).any(1)),
        ("ids are distinct in a row", (ordered[:, 1:] == ordered[:, :-1]).any(1)),
    ]
    for y in targets:
        if y is not None:
            outside = (y != ignore_index) & ((y < 0) | (y >= num_classes))
            rules.append((f"labels are in [0, {num_classes}) or {ignore_index}", outside))
    for rule, broken in rules:
        if bool(broken.any()):
            raise reject(
                rule, f"otherwise in rows {broken.nonzero()[:8, 0].tolist()}", "look at how these rows were read"
            )


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tuple(x.shape) != shape:
        raise reject(
            f"{name} has the shape {shape}", tuple(x.shape), "rows of logits, teacher and labels belong together"
        )
    if x.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise reject(f"{name} is {wanted}", x.dtype, f"convert {name}")
    if x.device != device:
        raise reject(f"{name} lies where the logits lie, on {device}", x.device, f"{name}.to(logits.device)")
    if x.requires_grad and torch.is_grad_enabled():
        raise reject(f"no gradient flows to {name}", "requires_grad", f"{name}.detach(), or the plain-torch loss")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise reject(f"the last dimension of {name} lies side by side", f"strides {x.stride()}", f"{name}.contiguous()")
