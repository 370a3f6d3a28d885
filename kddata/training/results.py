"""Results: where a run stands, what it leaves, and the card that says who learned what from whom.

Nothing here trains. Trade-off: the loss of every step is kept as plain numbers, 8 bytes each, in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kddata import __version__
from kddata.store import LabelStore
from kddata.teacher import weights_sha256
from kddata.training.checks import content_sha256, ensemble_of, trained_labels_sha256
from kddata.training.job import TrainingJob
from kddata.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: steps taken, of `num_steps`.
        epoch: in which the last of them lies, from 0.
        loss: of that step, the mean over its rows.
        lr: its learning rate.
        images_per_s: over all ranks, since the report before.
        data_wait: share of that time in which this rank waited for its batch.
        epoch_record: what `TrainingResult.epochs` holds of an epoch that has just ended.
    """

    step: int
    num_steps: int
    epoch: int
    loss: float
    lr: float
    images_per_s: float
    data_wait: float
    epoch_record: Mapping[str, Any] | None = None


@dataclass(kw_only=True)
class History:
    """What was seen so far; see `TrainingResult`, whose fields these become."""

    loss_S: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    cached_loss_S: list[float] = field(default_factory=list)

    def to_checkpoint(self) -> dict[str, Any]:
        """As values that a checkpoint can hold; all of them exact."""
        losses_S = {"loss_S": self.loss_S, "cached_loss_S": self.cached_loss_S}
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses_S.items()}
        return {**tensors, "epochs": json.dumps(self.epochs)}

    @staticmethod
    def from_checkpoint(checkpoint: Mapping[str, Any]) -> History:
        """What `to_checkpoint` was made of."""
        return History(
            loss_S=checkpoint["loss_S"].tolist(),
            epochs=json.loads(checkpoint["epochs"]),
            cached_loss_S=checkpoint["cached_loss_S"].tolist(),
        )

    def metrics(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"loss_S": self.loss_S, "epochs": self.epochs, "cached_loss_S": self.cached_loss_S}


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run leaves in its folder, beside model.safetensors.

    Attributes:
        card: who learned what from whom, and the record of the epoch whose student is kept (card.json).
        loss_S: of each step, the mean over its rows (metrics.json, as the next).
        epochs: a record of each: epoch, loss, lr, seconds since it began or was resumed, images_per_s, data_wait, and
            what evaluation found, which is on rank 0 alone.
        cached_loss_S: with a teacher in the loop, what the stored labels would have made of each step's loss; it
            differs from loss_S by the rounding of what is stored.
    """

    card: dict[str, Any]
    loss_S: list[float]
    epochs: list[dict[str, Any]]
    cached_loss_S: list[float] = field(default_factory=list)


def finished(job: TrainingJob) -> TrainingResult | None:
    """The result in a job's run folder, or None before the run has finished."""
    result = Run(job.run).result()
    return None if result is None else TrainingResult(card=result[0], **result[1])


def card_of(
    job: TrainingJob, stores: Sequence[LabelStore], student: nn.Module, epochs: Sequence[Mapping[str, Any]], kept: int
) -> dict[str, Any]:
    """The card of a student that learned from these stores, in its state after the epoch `kept` of these records."""
    fields, store = dataclasses.asdict(job), stores[0]
    patience = None if job.evaluate is None else job.evaluate.patience
    card = {
        **{name: fields[name] for name in ("student", "method", "data", "optimizer", "evaluate")},
        "input": {
            "size_px": job.data.size_px,
            "mean": store.spec.teacher.mean,
            "std": store.spec.teacher.std,
            "interpolation": store.spec.plan.interpolation,
        },
        "weights_sha256": weights_sha256(student),
        "labels_sha256": trained_labels_sha256(job, store),
        "teacher_in_the_loop": job.teacher is not None,
        "store": {"content_sha256": content_sha256(store), "fingerprint": store.spec.fingerprint},
        "teacher": store.spec.to_json()["teacher"],
        **({"peers": fields["peers"]} if job.peers else {}),
        **({"first_stage": fields["first_stage"]} if job.first_stage is not None else {}),
        **({"ensemble": ensemble_of(job, stores)} if len(stores) > 1 else {}),
        **({} if patience is None else {"early_stop": {"best_epoch": kept, "epochs_trained": len(epochs)}}),
        "metrics": dict(epochs[kept]),
        "versions": {"kddata": __version__, "torch": torch.__version__},
    }
    return json.loads(json.dumps(card))  # as it will be read back: lists for tuples
