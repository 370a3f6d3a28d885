"""Stages: a run whose first epochs train by another method, such as the hints of FitNets or FSP, before its own.

The first stage is a run by itself, in the folder `first` of the run that it belongs to, and its result is what the
student of the second one starts from: so each of them goes on from its own checkpoints, and a finished one is not done
again. Trade-off: the optimizer starts anew between them, as the papers have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kddata.losses.methods import METHODS
from kddata.training.job import TrainingJob
from kddata.training.results import Progress

_FOLDER = "first"


def first_stage_of(job: TrainingJob) -> TrainingJob:
    """The job of the first stage: hints alone (`hard_weight` is 0 where it is not named), and nothing is judged."""
    stage = job.first_stage
    assert stage is not None
    name = str(stage.method.get("name"))
    hints = {"hard_weight": 0.0, **stage.method} if name in METHODS and METHODS[name].weighted else stage.method
    optimizer = dataclasses.replace(
        job.optimizer,
        epochs=stage.epochs,
        lr=job.optimizer.lr if stage.lr is None else stage.lr,
        weight_decay=stage.weight_decay,
        warmup_epochs=min(job.optimizer.warmup_epochs, stage.epochs),
    )
    return dataclasses.replace(
        job,
        run=f"{job.run}/{_FOLDER}",
        method=hints,
        optimizer=optimizer,
        evaluate=None,
        first_stage=None,
        export=False,
    )


def second_stage_of(job: TrainingJob) -> TrainingJob:
    """The same job, whose student starts from what the first stage left."""
    weights = f"{job.run}/{_FOLDER}/model.safetensors"
    return dataclasses.replace(job, student=dataclasses.replace(job.student, weights=weights, new_head=False))


def reported(job: TrainingJob, report: Callable[[Progress], None], *, first: bool) -> Callable[[Progress], None]:
    """`report` for one of the stages of a job, with steps and epochs counted over both."""
    stage = job.first_stage
    if stage is None:
        return report
    early, late = stage.epochs, job.optimizer.epochs

    def of_both(progress: Progress) -> None:
        per_epoch = progress.num_steps // (early if first else late)
        report(
            dataclasses.replace(
                progress,
                step=progress.step + (0 if first else early * per_epoch),
                num_steps=(early + late) * per_epoch,
                epoch=progress.epoch + (0 if first else early),
            )
        )

    return of_both
