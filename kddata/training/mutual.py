"""Mutual steps: peers that learn from each other, one after the other, within each batch.

As in the paper: a peer takes its step against what the others say now, and says anew what it then thinks, before the
next one learns. So a batch passes through every peer but the last twice, and their BatchNorms see it twice.

Source: Zhang et al., "Deep mutual learning" (CVPR 2018), algorithm 1.

Shapes: B rows of this rank's share of a step, P other peers, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kddata import rng
from kddata.losses import Method
from kddata.replay import Batch
from kddata.training.steps import Step
from kddata.training.students import to_train_mode


def mutual_steps(
    networks: Sequence[nn.Module],
    batches: Iterable[Batch],
    optimizers: Sequence[Optimizer],
    method: Method,
    *,
    first_step: int,
    learning_rate: Callable[[int], float],
    pixels_of: Callable[[Tensor], Tensor],
    clip_norm: float | None = None,
    bfloat16: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Step]:
    """Takes one step of every peer for each batch, and yields after it. Its loss is the mean over peers.

    Args: as of `training_steps`, with a network and an optimizer for each peer.
    """

    def answer(network: nn.Module, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return network(pixels)

    begin = time.perf_counter()
    for number, batch in enumerate(batches, first_step):
        wait_s = time.perf_counter() - begin
        torch.manual_seed(int.from_bytes(rng.key_bytes(seed, "step", number, rank)[:8], "little"))
        pixels, lr = pixels_of(batch.pixels_u8_B3SS), learning_rate(number)
        labels = batch.labels.to(pixels.device, non_blocking=True)
        targets_B = batch.targets_B.to(pixels.device, non_blocking=True)
        for network, optimizer in zip(networks, optimizers, strict=True):
            to_train_mode(network)  # evaluation may have come between
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
        with torch.no_grad():
            said = [None, *(answer(network, pixels) for network in networks[1:])]
        losses = []
        for peer, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            logits_BC = answer(network, pixels)
            others = torch.stack([x for i, x in enumerate(said) if i != peer and x is not None], 1)
            loss_B = method(logits_BC, labels, targets_B, student={"peers": others}, reduction="none", ignore_index=-1)
            loss = loss_B.sum() / batch.step_rows
            optimizer.zero_grad()
            (loss * world_size).backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            losses.append(loss.detach())
            if peer + 1 < len(networks):
                with torch.no_grad():
                    said[peer] = answer(network, pixels)
        end = time.perf_counter()
        yield Step(
            number=number,
            loss=torch.stack(losses).mean(),
            lr=lr,
            rows=batch.step_rows,
            image_ids=batch.image_ids,
            view_indices=batch.view_indices,
            wait_s=wait_s,
            seconds=end - begin,
        )
        begin = time.perf_counter()
