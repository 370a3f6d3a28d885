"""Stopping early: when evaluations no longer get better, and which of them was the best.

A pure function of the records of epochs, so that a run that goes on from a checkpoint decides as it would have, and
every rank as rank 0. Nothing here evaluates. Trade-off: of equal values the earlier epoch is the best, so that a
plateau is no improvement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kddata.evaluation import METRICS
from kddata.training.job import EvaluationArgs


def best_epoch(epochs: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The epoch whose evaluation was the best by a metric, or None before the first evaluation."""
    judged = [epoch for epoch, record in enumerate(epochs) if metric in record]
    return max(judged, key=lambda epoch: METRICS[metric] * epochs[epoch][metric], default=None)


def is_over(epochs: Sequence[Mapping[str, Any]], args: EvaluationArgs | None) -> bool:
    """Whether the last `args.patience` evaluations were all no better than the best one before them."""
    if args is None or args.patience is None:
        return False
    best = best_epoch(epochs, args.metric)
    if best is None:
        return False
    return sum(args.metric in record for record in epochs[best + 1 :]) >= args.patience


def of_rank_0(value: float | None, world_size: int, device: str) -> float:
    """The value that rank 0 has: it alone evaluates, and all ranks stop at one step."""
    if world_size == 1:
        assert value is not None
        return value
    told = torch.tensor([0.0 if value is None else value], dtype=torch.float64, device=device)
    torch.distributed.broadcast(told, src=0)
    return told.item()


def copied(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """A copy on the CPU of the states of modules by name."""
    return {name: {key: x.detach().cpu().clone() for key, x in module.items()} for name, module in state.items()}
