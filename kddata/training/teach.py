"""Teach: a teacher trained or fine-tuned on labelled images, by a job, before any store is there.

What it leaves in its run's folder is what a label job takes as `teacher`, and its card has the hash of the labels that
it was trained on. Trade-off: one process without checkpoints, by `supervised.fit`: a stop begins it anew, and a large
teacher is better brought along.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kddata import __version__
from kddata.errors import ConfigError
from kddata.images import open_source
from kddata.replay import EvaluationImages, step_loader
from kddata.teacher import weights_sha256
from kddata.training.driving import driving_run, tidy_up
from kddata.training.job import OptimizerArgs, StudentArgs
from kddata.training.predict import normaliser, predict
from kddata.training.run import Run
from kddata.training.students import build_student
from kddata.training.supervised import LabelledViews, fit
from kddata.views import ViewPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TeachingJob:
    """One network and the labelled images that it learns from.

    Attributes:
        images: location of the images, as `open_source` takes it.
        run: URL of the folder of the result.
        network: who learns; weights of another task are a start, with `new_head` where its classes are others.
        plan: how the random half of its views is drawn; see `supervised.LabelledViews`.
        size_px, mean, std: of its input.
        batch_size: rows of a step.
        seed: of order and initial weights.
        optimizer: SGD with Nesterov momentum, and how long.
        evaluate: images that it is judged on in the end.
    """

    images: str | tuple[str, ...]
    run: str
    network: StudentArgs
    plan: ViewPlan
    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int
    optimizer: OptimizerArgs
    seed: int = 0
    evaluate: str | tuple[str, ...] | None = None


def teach(
    job: TeachingJob,
    *,
    threads: int = 1,
    num_workers: int = 0,
    report: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> dict[str, Any]:
    """The card of a teacher, trained by a job, or read back where that has been done.

    Args:
        threads: of torch. num_workers: processes that read and render ahead.
        report: called after each step with its number from 1, the number of steps, and its loss.

    Raises SourceError for images without labels, TeacherError or ConfigError for a network that cannot be built or does
    not fit them, and ConfigError for a run of this name with another job.
    """
    views = LabelledViews(
        open_source(job.images), plan=job.plan, size_px=job.size_px, batch_size=job.batch_size, seed=job.seed
    )
    _require_classes(views.highest_label, job.network.num_classes, where=job.images)
    run = Run(job.run)
    run.check(_identity(job, views))
    done = run.result()
    if done is not None:
        tidy_up(job.run)
        _log.info("%s has finished already; nothing is done", job.run)
        return done[0]
    with driving_run(job.run) as still_driving:
        done = run.result()  # by another process, meanwhile
        if done is not None:
            return done[0]
        card = _teach(job, run, views, threads=threads, num_workers=num_workers, report=report, check=still_driving)
        run.tidy()
        return card


def _teach(
    job: TeachingJob,
    run: Run,
    views: LabelledViews,
    *,
    threads: int,
    num_workers: int,
    report: Callable[[int, int, float], None],
    check: Callable[[], None],
) -> dict[str, Any]:
    """`teach`, of a run that has not finished and that this process drives."""
    # All that can be wrong is found before the name of the run is taken, and before hours of training.
    judged_on = None if job.evaluate is None else _judged_on(job)
    torch.set_num_threads(threads)
    pixels_of = normaliser(job.mean, job.std, "cpu")
    network = build_student(job.network, size_px=job.size_px, seed=job.seed, pixels_of=pixels_of, device="cpu")
    run.begin(_identity(job, views))
    loss_S: list[float] = []

    def note(step: int, num_steps: int, loss: float) -> None:
        check()
        loss_S.append(loss)
        report(step, num_steps, loss)

    fit(
        network,
        views,
        mean=job.mean,
        std=job.std,
        optimizer=job.optimizer,
        threads=threads,
        num_workers=num_workers,
        report=note,
    )
    metrics: dict[str, Any] = {"loss": sum(loss_S[-views.steps_per_epoch :]) / views.steps_per_epoch}
    if judged_on is not None:
        batches = step_loader(judged_on, range(len(judged_on)), num_workers=num_workers, pin_memory=False)
        metrics |= predict(network, batches, pixels_of).score().summary()
    fields = dataclasses.asdict(job)
    card = {
        "student": fields["network"],
        "method": {"name": "hard"},
        **{name: fields[name] for name in ("batch_size", "seed", "optimizer", "evaluate")},
        "input": {"size_px": job.size_px, "mean": job.mean, "std": job.std, "interpolation": job.plan.interpolation},
        "weights_sha256": weights_sha256(network),
        "labels_sha256": views.labels_sha256,
        "metrics": metrics,
        "versions": {"kddata": __version__, "torch": torch.__version__},
    }
    card = json.loads(json.dumps(card))  # as it will be read back
    run.finish(network.state_dict(), card=card, metrics={"loss_S": loss_S, "epochs": [metrics]})
    return card


def _identity(job: TeachingJob, views: LabelledViews) -> dict[str, Any]:
    """What makes two jobs one run."""
    fields = dataclasses.asdict(job)
    kept = {key: value for key, value in fields.items() if key not in ("images", "run", "evaluate")}
    return kept | {"labels_sha256": views.labels_sha256}


def _judged_on(job: TeachingJob) -> EvaluationImages:
    assert job.evaluate is not None
    images = EvaluationImages(open_source(job.evaluate), size_px=job.size_px, interpolation=job.plan.interpolation)
    _require_classes(images.highest_label, job.network.num_classes, where=job.evaluate)
    return images


def _require_classes(highest: int, num_classes: int, *, where: object) -> None:
    if highest >= num_classes:
        raise ConfigError(
            f"ground-truth classes are below the network's {num_classes}",
            actual=f"class {highest}",
            where=where,
            fix="set teacher.num_classes to the number of classes of the images",
        )
