"""The training loop: a student from the labels of a store, from the last checkpoint to the result. No Ray here.

A run is a pure function of its job and its store: rows come in the store's order, the learning rate and the random
numbers of a step are functions of its number, so that a run that was stopped goes on as if it had not been.

Trade-off: evaluation happens on rank 0 while the others wait for it in the next step's gradients.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kddata import __version__, losses, rng
from kddata.cards import differences
from kddata.errors import ConfigError, StoreMismatchError
from kddata.features import Capture
from kddata.images import open_source
from kddata.losses import Method
from kddata.replay import Batch, EvaluationImages, ImageBatch, Replay, replay_loader, step_loader
from kddata.store import LabelStore
from kddata.teacher import TeacherArgs, load_teacher, weights_sha256
from kddata.training.checks import (
    check_job,
    content_sha256,
    ensemble_of,
    identity,
    require_same_start,
    trained_labels_sha256,
    weights,
)
from kddata.training.head import Answering, folded, require_foldable
from kddata.training.job import EvaluationArgs, TrainingJob
from kddata.training.predict import normaliser, predict
from kddata.training.run import Run
from kddata.training.steps import Meter, Step, Taught, mean_losses, require_finite, training_steps
from kddata.training.students import average_of, build_student, make_optimizer

_LOOK_STEPS = 16
_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run leaves in its folder, beside model.safetensors.

    Attributes:
        card: who learned what from whom, and the last epoch's record (card.json).
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


def train(
    job: TrainingJob,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    threads: int = 1,
    num_workers: int = 0,
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
    report: Callable[[Progress], None] = lambda progress: None,
) -> TrainingResult:
    """The result of a run: trained from its last checkpoint on, or read back if it had finished.

    Every rank calls this with one job. With world_size > 1 the default process group is up, `wrap` makes a network
    average its gradients over it (DistributedDataParallel), and `job.run` is a folder that all ranks see. `report` is
    called by every rank at the same steps. Sets torch's thread count, and seeds torch's global random numbers.

    Raises before the first step: StoreMissingError for a store that is not committed, ConfigError or
    StoreMismatchError for a student, method, teacher or batch size that does not fit it, ConfigError for a run of this
    name with another job. Later: TeacherError for a loss that is not finite, naming the images of its step.
    """
    torch.set_num_threads(threads)
    store, method, run = check(job, world_size=world_size)
    others = _open_others(job)
    result = finished(job)
    if result is not None:
        _log.info("%s has finished already; nothing is done", job.run)
        return result

    on_gpu = device.startswith("cuda")
    pixels_of = normaliser(store.spec.teacher.mean, store.spec.teacher.std, device)
    teach = None if job.teacher is None else _teacher_in_the_loop(job.teacher, store, method, device)
    student = build_student(
        job.student, size_px=job.data.size_px, seed=job.data.seed, pixels_of=pixels_of, device=device
    )
    average = None if job.optimizer.ema is None else average_of(student, job.optimizer.ema)
    capture = Capture(student, method.needs.student) if method.needs.student else None
    parts = _parts(job, store, method, student, capture, pixels_of, device)
    pupil = student if parts is None else _Pupil(student, parts)
    optimizer = make_optimizer(job.optimizer, pupil, student)
    judged = student if average is None else average.module
    answering = judged if method.head is None else Answering(judged, lambda x: method.answer(x, parts))
    loss_S: list[float] = []
    cached_loss_S: list[float] = []
    epochs: list[dict[str, Any]] = []
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        student.load_state_dict(checkpoint["student"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if parts is not None:
            parts.load_state_dict(checkpoint["parts"])
        if average is not None:
            average.load_state_dict(checkpoint["average"])
        loss_S, epochs = checkpoint["loss_S"].tolist(), json.loads(checkpoint["epochs"])
        cached_loss_S = checkpoint["cached_loss_S"].tolist()
    require_same_start(len(loss_S), world_size, device, where=job.run)

    replay = Replay(
        store,
        images=job.images,
        batch_size=job.data.batch_size,
        size_px=job.data.size_px,
        seed=job.data.seed,
        rank=rank,
        world_size=world_size,
        teacher_px=None if teach is None else store.spec.teacher.size_px,
        outputs=method.needs.outputs,
        others=others,
        subset=job.data.subset,
        noise=job.data.noise,
        imbalance=job.data.imbalance,
        views_per_visit=job.data.views_per_visit,
    )
    exam = None
    if job.evaluate is not None and rank == 0:
        exam = _exam(job.evaluate, job.data.size_px, store, num_workers=num_workers, pin_memory=on_gpu)
    run.begin(identity(job, store, others))

    per_epoch = replay.steps_per_epoch
    num_steps = job.optimizer.epochs * per_epoch
    steps = training_steps(
        wrap(pupil),
        replay_loader(replay, range(len(loss_S), num_steps), num_workers=num_workers, pin_memory=on_gpu),
        optimizer,
        method,
        first_step=len(loss_S),
        weights=weights(job),
        mixture=job.combine == "mixture",
        learning_rate=lambda step: job.optimizer.learning_rate(step, per_epoch),
        pixels_of=pixels_of,
        teach=teach,
        parts=parts,
        capture=capture,
        clip_norm=job.optimizer.clip_norm,
        bfloat16=job.student.precision == "bfloat16",
        seed=job.data.seed,
        rank=rank,
        world_size=world_size,
    )
    unseen: list[Step] = []  # since the last look at the losses
    of_look, of_epoch = Meter(), Meter()
    for step in steps:
        if average is not None:
            average.update_parameters(student)
        unseen.append(step)
        of_look.add(step)
        of_epoch.add(step)
        taken = step.number + 1
        epoch_ends = taken % per_epoch == 0
        save = epoch_ends or (job.checkpoint_steps is not None and taken % job.checkpoint_steps == 0)
        if not (save or len(unseen) == _LOOK_STEPS):
            continue
        loss_S += mean_losses(unseen, world_size)
        cached = [dataclasses.replace(step, loss=step.cached_loss) for step in unseen if step.cached_loss is not None]
        if cached:
            cached_loss_S += mean_losses(cached, world_size)
        record: dict[str, Any] | None = None
        if epoch_ends:
            record = {
                "epoch": len(epochs),
                "loss": sum(loss_S[-per_epoch:]) / per_epoch,
                "lr": step.lr,
                "images_per_s": of_epoch.images_per_s,
                "data_wait": of_epoch.data_wait,
                "seconds": of_epoch.seconds,
            }
            if exam is not None and job.evaluate is not None and job.evaluate.is_due(len(epochs), job.optimizer.epochs):
                record |= predict(answering, exam, pixels_of).score().summary()
            epochs.append(record)
            of_epoch = Meter()
        if save:
            require_finite(pupil, step)
        if save and rank == 0:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            if parts is not None:
                state["parts"] = parts.state_dict()
            if average is not None:
                state["average"] = average.state_dict()
            losses_S = {"loss_S": loss_S, "cached_loss_S": cached_loss_S}
            history = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses_S.items()}
            run.save_checkpoint(taken, state | history | {"epochs": json.dumps(epochs)})
        report(
            Progress(
                step=taken,
                num_steps=num_steps,
                epoch=step.number // per_epoch,
                loss=loss_S[-1],
                lr=step.lr,
                images_per_s=of_look.images_per_s,
                data_wait=of_look.data_wait,
                epoch_record=record,
            )
        )
        unseen, of_look = [], Meter()

    if capture is not None:
        capture.close()
    metrics: dict[str, Any] = {"loss_S": loss_S, "epochs": epochs, "cached_loss_S": cached_loss_S}
    student = judged
    if method.head is not None:
        student = folded(student, lambda x: method.answer(x, parts), job.student.num_classes, where=job.student.arch)
    card = _card(job, [store, *others], student, epochs[-1])
    if rank == 0:
        run.finish(student.state_dict(), card=card, metrics=metrics)
    return TrainingResult(card=card, **metrics)


def check(job: TrainingJob, *, world_size: int = 1) -> tuple[LabelStore, Method, Run]:
    """The store, the method and the run of a job, checked against each other. Nothing is written.

    Raises what `train` raises before its first step, apart from what building the student and the teacher finds.
    """
    store = LabelStore.open(job.store)
    method = losses.make(**job.method)
    others = _open_others(job)
    check_job(job, store, others, method, world_size)
    run = Run(job.run)
    run.check(identity(job, store, others))
    return store, method, run


def _open_others(job: TrainingJob) -> list[LabelStore]:
    return [LabelStore.open(member.url) for member in job.others]


def finished(job: TrainingJob) -> TrainingResult | None:
    """The result in a job's run folder, or None before the run has finished."""
    result = Run(job.run).result()
    return None if result is None else TrainingResult(card=result[0], **result[1])


class _Pupil(nn.Module):
    """Answers as the student; holds the method's parts too, so that ranks share their gradients."""

    def __init__(self, student: nn.Module, parts: nn.Module) -> None:
        super().__init__()
        self.student, self.parts = student, parts

    def forward(self, pixels: Tensor) -> Tensor:
        return self.student(pixels)


def _parts(
    job: TrainingJob,
    store: LabelStore,
    method: Method,
    student: nn.Module,
    capture: Capture | None,
    pixels_of: Callable[[Tensor], Tensor],
    device: str,
) -> nn.Module | None:
    """What the method learns beside the student, from random numbers of the run's seed; None where it has none.

    Raises ConfigError where tensors of the two sides cannot be compared, and where the method has a head and the
    student cannot take it in at the end; TeacherError where the student has no such tensor.
    """
    num_classes, size_px = job.student.num_classes, job.data.size_px
    pixels = pixels_of(torch.arange(3 * size_px**2).remainder(256).view(1, 3, size_px, size_px).to(torch.uint8))
    student_shapes: dict[str, Sequence[int]] = {"logits": (num_classes,)}
    if capture is not None:
        with torch.inference_mode():
            student(pixels)
        student_shapes |= {name: tuple(x.shape[1:]) for name, x in capture.take().items()}
    if not method.needs.parts:
        return None
    if method.head is not None:
        require_foldable(student, pixels, num_classes, where=job.student.arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(rng.key_bytes(job.data.seed, "parts")[:8], "little"))
        parts = method.parts(student_shapes, {output.name: output.shape for output in store.spec.outputs})
    return parts.to(device)


def _teacher_in_the_loop(
    args: TeacherArgs, store: LabelStore, method: Method, device: str
) -> Callable[[Batch], Taught]:
    """Labels a batch anew, as the store was labelled. Raises StoreMismatchError for another teacher than its own."""
    spec = store.spec
    teacher = load_teacher(
        args,
        device=device,
        batch_size=spec.batch_size,
        threads=spec.threads,
        memory_format=spec.memory_format,
        outputs=method.needs.outputs,
    )
    found = differences(dataclasses.asdict(spec.teacher), dataclasses.asdict(teacher.card))
    if found:
        raise StoreMismatchError(
            "a teacher in the loop is the store's own",
            actual="; ".join(f"{key}: stored {mine!r}, asked {theirs!r}" for key, mine, theirs in found),
            where=store.url,
        )

    def teach(batch: Batch) -> Taught:
        assert batch.teacher_pixels_u8 is not None
        logits, outputs = teacher.answer(batch.teacher_pixels_u8)
        outputs = {name: x.clone() for name, x in outputs.items()}  # autograd keeps no tensors of inference mode
        return Taught(spec.labels_of(logits, batch.image_ids, batch.view_indices), outputs)

    return teach


def _exam(
    args: EvaluationArgs, size_px: int, store: LabelStore, *, num_workers: int, pin_memory: bool
) -> Iterable[ImageBatch]:
    """The images that a student is judged on. Raises ConfigError where none has a label."""
    images = EvaluationImages(open_source(args.images), size_px=size_px, interpolation=store.spec.plan.interpolation)
    if images.num_labelled == 0:
        raise ConfigError("images that a student is judged on have labels", actual="none has", where=args.images)
    return step_loader(images, range(len(images)), num_workers=num_workers, pin_memory=pin_memory)


def _card(
    job: TrainingJob, stores: Sequence[LabelStore], student: nn.Module, last: Mapping[str, Any]
) -> dict[str, Any]:
    fields, store = dataclasses.asdict(job), stores[0]
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
        **({"ensemble": ensemble_of(job, stores)} if len(stores) > 1 else {}),
        "metrics": dict(last),
        "versions": {"kddata": __version__, "torch": torch.__version__},
    }
    return json.loads(json.dumps(card))  # as it will be read back: lists for tuples
