"""Branches: a student that is cut in two behind one module, with further copies of its upper part, and a gate.

The cut is made in the graph of the student's own forward pass (torch.fx), so that any architecture serves whose pass
can be traced and goes through that module alone; both are found out, and said. Nothing of the student changes: its
lower and upper part hold its own modules, and call them, so that what is random in training (dropout, stochastic depth)
stays so.

Shapes: B views, M branches, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, fx, nn

from kddata.errors import ConfigError
from kddata.features import has_channels_last
from kddata.losses import Gate


class Branched(nn.Module):
    """A student whose upper part there are several of. Called with pixels, it gives the logits of the student itself
    [B, C], those of all branches [B, M, C], the student first, and their gate [B, M].

    `parts` holds the other branches and the gate.
    """

    def __init__(self, student: nn.Module, others: Sequence[nn.Module], node: str, pixels: Tensor) -> None:
        super().__init__()
        self.lower, self.upper = cut(student, node, pixels)
        with torch.inference_mode():
            features = self.lower(pixels)
        if not isinstance(features, Tensor) or features.ndim not in (2, 4):
            raise ConfigError("branches part behind features [B, D] or [B, C, H, W]", actual=type(features), where=node)
        if has_channels_last(features):
            raise ConfigError("features are [B, C, H, W], channels first", actual=tuple(features.shape), where=node)
        uppers = [cut(other, node, pixels)[1] for other in others]
        gate = Gate(features.shape[1], len(uppers) + 1)
        self.parts = nn.ModuleDict({"uppers": nn.ModuleList(uppers), "gate": gate}).to(features.device)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.lower(pixels)
        own_BC, uppers = self.upper(features), self.parts["uppers"]
        assert isinstance(uppers, nn.ModuleList)
        return own_BC, torch.stack([own_BC, *(upper(features) for upper in uppers)], 1), self.parts["gate"](features)


def cut(network: nn.Module, node: str, pixels: Tensor) -> tuple[nn.Module, nn.Module]:
    """(what comes before and with the module `node`, what comes after it), of the network's own modules.

    Raises ConfigError for a module that is not there, for a forward pass that cannot be traced, is another than its
    trace, or another in training than in evaluation beside what its modules do, and for what leads past the module.
    """
    modules = dict(network.named_modules())
    if node not in modules or not node:
        raise ConfigError("branches part behind a module of the student", actual=repr(node), where="method.node")
    training = network.training
    try:
        graph, of_evaluation = (_Tracer(node).trace(network.train(mode)) for mode in (True, False))
    except Exception as error:  # whatever a forward pass does with what it takes for tensors
        raise ConfigError(
            "branches are of students whose forward pass torch.fx can trace",
            actual=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            where=type(network).__name__,
        ) from error
    finally:
        network.train(training)
    lines = (x.python_code("self").src.splitlines() for x in (graph, of_evaluation))
    other = [(line or in_evaluation).strip() for line, in_evaluation in zip_longest(*lines) if line != in_evaluation]
    if other:
        raise ConfigError(
            "the pass of a student with branches is the same in training and evaluation, but for what its modules do",
            actual=f"otherwise in {other[0].split(';')[0]}",
            where=type(network).__name__,
            fix="let a module do it, such as nn.Dropout, or use a student of another architecture",
        )
    calls = [x for x in graph.nodes if x.op == "call_module" and x.target == node]
    if len(calls) != 1:
        raise ConfigError(
            "branches part behind a module that is called once",
            actual=f"{len(calls)} calls of {node}",
            where="method.node",
        )
    (output,) = [x for x in graph.nodes if x.op == "output"]
    before, after = _needed(calls[0], until=None), _needed(output, until=calls[0])
    past = [x for x in after if x.op == "placeholder"]
    if past:
        raise ConfigError(
            "all of a student's pass goes through the module where branches part",
            actual=f"{past[0].name} reaches the logits by another way",
            where="method.node",
        )
    lower, upper = fx.Graph(), fx.Graph()
    below: dict[fx.Node, fx.Node] = {}
    above = {calls[0]: upper.placeholder("features")}
    for x in graph.nodes:
        if x in before:
            below[x] = lower.node_copy(x, below.__getitem__)
        if x in after:
            above[x] = upper.node_copy(x, above.__getitem__)
    lower.output(below[calls[0]])
    parts = fx.GraphModule(network, lower), fx.GraphModule(network, upper)
    network.eval()
    with torch.inference_mode():
        same = torch.equal(parts[1].eval()(parts[0].eval()(pixels)), network(pixels))
    network.train(training)
    if not same:
        raise ConfigError("a student's trace answers as it does", actual="other logits", where=type(network).__name__)
    return parts


def _needed(last: fx.Node, *, until: fx.Node | None) -> set[fx.Node]:
    """All that a node is made of, itself included; what `until` is made of, and itself, are left out."""
    found: set[fx.Node] = set()
    left = [last]
    while left:
        x = left.pop()
        if x is not until and x not in found:
            found.add(x)
            left += x.all_input_nodes
    return found


class _Tracer(fx.Tracer):
    """Takes the module of that name whole, and those without modules in them, which ask for their mode in each pass."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = module_qualified_name == self._node or next(m.children(), None) is None
        return whole or super().is_leaf_module(m, module_qualified_name)
