"""Features: tensors inside a network, captured while it answers, under names that teachers and students share.

    embedding           [D]            what the last linear layer is given
    features:NODE       [C, H, W]      the output of a module
    attention:NODE      [H, W]         mean over channels of its squares
    fsp:NODE:NODE       [C, C']        how two layers' channels go together

Two more are not captured but made, by `kddata.boundary`: `boundary` [3, S, S] and `boundary_logits` [C].

NODE is the dotted name of a module, as in `network.named_modules()`. Hooks take the tensors as the network computes
them, so that any architecture serves, in training as in evaluation, with gradients where there are any; a graph
extractor would have to trace the network first, which many cannot be.

Trade-off: a node that the layer after it overwrites in place cannot be captured as features; that is found and said.

Shapes: B views, C channels, H x W positions, D width of an embedding.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kddata import boundary
from kddata.errors import ConfigError, TeacherError

KINDS = {
    "embedding": 0,
    "features": 1,
    "attention": 1,
    "fsp": 2,
    **dict.fromkeys(boundary.NAMES, 0),
}  # and how many nodes each has


def parse(name: str) -> tuple[str, tuple[str, ...]]:
    """(kind, nodes) of a name. Raises ConfigError for one that names nothing."""
    kind, *nodes = name.split(":")
    if kind not in KINDS or len(nodes) != KINDS[kind] or not all(nodes):
        raise ConfigError(
            "an output is named embedding, features:NODE, attention:NODE, fsp:NODE:NODE, boundary or boundary_logits",
            actual=repr(name),
            fix="NODE is the dotted name of a module of the network, such as layer2",
        )
    return kind, tuple(nodes)


def attention_map(features_BCHW: Tensor) -> Tensor:
    """Mean over channels of F^2: [B, H, W], in float32 at least. What a store keeps as `attention:NODE`."""
    return _wide(features_BCHW).square().mean(1)


def fsp_matrix(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """F_first F_second^T / HW: [B, C of first, C of second], at the smaller of the two sizes.

    The larger one is averaged over its cells, as the public implementation does that golden vectors hold it to, and not
    max-pooled. What a store keeps as `fsp:FIRST:SECOND`. Source: Yim et al., CVPR 2017, equation 1.
    """
    first, second = (x.flatten(2) for x in same_size(_wide(first_BCHW), _wide(second_BCHW)))
    return first @ second.transpose(1, 2) / first.shape[2]


def same_size(a_BCHW: Tensor, b_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller one's H x W: the larger is averaged over its cells."""
    size_a, size_b = a_BCHW.shape[-2:], b_BCHW.shape[-2:]
    if size_a == size_b:
        return a_BCHW, b_BCHW
    size = (min(size_a[0], size_b[0]), min(size_a[1], size_b[1]))
    return F.adaptive_avg_pool2d(a_BCHW, size), F.adaptive_avg_pool2d(b_BCHW, size)


def has_channels_last(x: Tensor) -> bool:
    """Whether a tensor is [B, H, W, C]: views are square, and so are their maps. Never where C = H = W."""
    return x.ndim == 4 and x.shape[1] == x.shape[2] != x.shape[3]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Capture:
    """Watches a network, and gives the named tensors of its last forward pass. Owns the hooks; `close` removes them.

    Names of what is not captured (boundary samples) are left out. Raises ConfigError for a name that is none, or whose
    nodes the network does not have, naming the nearest.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._names = [(name, *parse(name)) for name in names if name not in boundary.NAMES]
        modules = dict(network.named_modules())
        nodes = {node for _, _, named in self._names for node in named}
        for node in sorted(nodes):
            if node not in modules:
                near = difflib.get_close_matches(node, [known for known in modules if known], n=1)
                raise ConfigError(
                    "an output names modules of its network",
                    actual=f"no module {node!r} in {type(network).__name__}",
                    fix=f"perhaps {near[0]} was meant" if near else "see network.named_modules()",
                )
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._hooks = [modules[node].register_forward_hook(partial(self._take_output, node)) for node in nodes]
        if any(kind == "embedding" for _, kind, _ in self._names):
            linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
            if not linear:
                self.close()
                raise ConfigError(
                    "an embedding is what the last linear layer of a network is given",
                    actual=f"no linear layer in {type(network).__name__}",
                    fix="name a node instead, such as features:NODE",
                )
            self._hooks.append(linear[-1].register_forward_pre_hook(self._take_input))

    def take(self) -> dict[str, Tensor]:
        """The tensors of the forward pass just done, by name; they are let go of here.

        Raises TeacherError for a node that was not reached, is no map, or was overwritten by what came after it.
        """
        seen, self._seen = self._seen, {}
        found = {}
        for name, kind, nodes in self._names:
            tensors = [self._checked(seen, node, name) for node in nodes or ("",)]
            if kind in ("attention", "fsp") and any(x.ndim != 4 for x in tensors):
                raise TeacherError(
                    f"{kind} is of feature maps [B, C, H, W]", actual=[tuple(x.shape) for x in tensors], where=name
                )
            if last := [x for x in tensors if has_channels_last(x)]:
                raise TeacherError(
                    "feature maps are [B, C, H, W], which Swin and a few others do not give",
                    actual=f"{tuple(last[0].shape)}, with the channels last",
                    where=name,
                    fix="name a module whose output has the channels first, or wrap the network in one that turns it",
                )
            if kind == "attention":
                found[name] = attention_map(*tensors)
            elif kind == "fsp":
                found[name] = fsp_matrix(*tensors)
            else:
                found[name] = tensors[0].flatten(1) if kind == "embedding" else tensors[0]
        return found

    def forget(self) -> None:
        """Lets go of what was seen since `take`."""
        self._seen = {}

    def close(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()

    def _checked(self, seen: dict[str, tuple[Tensor, int]], node: str, name: str) -> Tensor:
        tensor, version = seen.get(node, (None, 0))
        if tensor is None:
            raise TeacherError("a captured node is reached in every forward pass, and gives one tensor", where=name)
        if not tensor.is_inference() and tensor._version != version:
            raise TeacherError(
                "a captured node keeps its values",
                actual="the layer after it writes in place",
                where=name,
                fix="name that layer instead",
            )
        return tensor

    def _take_output(self, node: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._see(node, output)

    def _take_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._see("", inputs[0])

    def _see(self, node: str, tensor: Tensor) -> None:
        # Tensors of inference mode count no versions: a copy is safe, and has no gradient to keep.
        if tensor.is_inference():
            tensor = tensor.clone()
        self._seen[node] = tensor, 0 if tensor.is_inference() else tensor._version
