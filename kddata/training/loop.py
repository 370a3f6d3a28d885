"""The training loop: a student from the labels of a store, from the last checkpoint to the result. No Ray here.

A run is a pure function of its job and its store: rows come in the store's order, the learning rate and the random
numbers of a step are functions of its number, so that a run that was stopped goes on as if it had not been.

Trade-off: losses are looked at every few steps, so that the device is not waited for at each one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kddata import losses
from kddata.images import ImageCache
from kddata.losses import Method
from kddata.replay import Replay, replay_loader
from kddata.store import LabelStore
from kddata.training.checks import check_job, identity, require_same_start, weights
from kddata.training.cohort import Cohort, Optimizers
from kddata.training.driving import driving_run, tidy_up
from kddata.training.exam import Exam
from kddata.training.job import TrainingJob
from kddata.training.mutual import mutual_steps
from kddata.training.predict import normaliser
from kddata.training.program import exported
from kddata.training.pupil import Pupil
from kddata.training.results import History, Progress, TrainingResult, card_of, finished
from kddata.training.run import Run
from kddata.training.stages import first_stage_of, reported, second_stage_of
from kddata.training.steps import Meter, Step, mean_losses, require_finite, training_steps
from kddata.training.stopping import best_epoch, copied, is_over, of_rank_0
from kddata.training.teaching import teacher_in_the_loop

_LOOK_STEPS = 16
_log = logging.getLogger(__name__)


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
    driven: bool = False,
) -> TrainingResult:
    """The result of a run: trained from its last checkpoint on, or read back if it had finished.

    Every rank calls this with one job. With world_size > 1 the default process group is up, `wrap` makes a network
    average its gradients over it (DistributedDataParallel), and `job.run` is a folder that all ranks see. `report` is
    called by every rank at the same steps. Sets torch's thread count, and seeds torch's global random numbers.

    A rank alone holds the run's lock (`driving_run`) while it trains, unless `driven` says that its caller does; of
    several ranks, whoever started them is to hold it.

    Raises before the first step: StoreMissingError for a store that is not committed, ConfigError or
    StoreMismatchError for a student, method, teacher or batch size that does not fit it, ConfigError for a run of this
    name with another job, StoreBusyError for one that another process trains, naming that. Later: TeacherError for a
    loss that is not finite, naming the images of its step, which then stand in the run's nonfinite-RANK.json too, with
    their views; StoreBusyError where another process has taken the run over.
    """
    torch.set_num_threads(threads)
    checked = check(job, world_size=world_size)
    result, alone = finished(job), world_size == 1 and not driven
    if result is None:
        with driving_run(job.run) if alone else nullcontext(_undriven) as still_driving:
            result = finished(job)  # by another process, meanwhile
            if result is None:
                result = _train(
                    job,
                    checked,
                    rank=rank,
                    world_size=world_size,
                    device=device,
                    num_workers=num_workers,
                    wrap=wrap,
                    report=report,
                    still_driving=still_driving,
                )
                if alone:
                    checked[2].tidy()
                return result
    if alone:
        tidy_up(job.run)
    _log.info("%s has finished already; nothing is done", job.run)
    return result


def _undriven() -> None:
    """The driver is another process, which looks itself whether it still is."""


def _train(
    job: TrainingJob,
    checked: tuple[LabelStore, Method, Run],
    *,
    rank: int,
    world_size: int,
    device: str,
    num_workers: int,
    wrap: Callable[[nn.Module], nn.Module],
    report: Callable[[Progress], None],
    still_driving: Callable[[], None],
) -> TrainingResult:
    """`train`, of a run that has not finished and that this process or its caller drives."""
    store, method, run = checked
    others = _open_others(job)
    begun = job
    if job.first_stage is not None:
        run.begin(identity(job, store, others))
        first = first_stage_of(job)
        if finished(first) is None:
            _train(
                first,
                check(first, world_size=world_size),
                rank=rank,
                world_size=world_size,
                device=device,
                num_workers=num_workers,
                wrap=wrap,
                report=reported(job, report, first=True),
                still_driving=still_driving,
            )
        if world_size > 1:
            torch.distributed.barrier()  # rank 0 has written what all of them start from
        begun = second_stage_of(job)
        report = reported(job, report, first=False)

    on_gpu = device.startswith("cuda")
    pixels_of = normaliser(store.spec.teacher.mean, store.spec.teacher.std, device)
    teach = None if job.teacher is None else teacher_in_the_loop(job.teacher, store, method, device)
    pupil = (Cohort if job.peers else Pupil)(begun, store, method, pixels_of=pixels_of, device=device)
    optimizer = pupil.optimizer(job.optimizer)
    history = History()
    best: dict[str, Any] | None = None  # the pupil after the best evaluation, where training can end early
    checkpoint = run.checkpoints.load()
    if checkpoint is not None:
        pupil.load_state_dict(checkpoint)
        optimizer.load_state_dict(checkpoint["optimizer"])
        history = History.from_checkpoint(checkpoint)
        best = checkpoint.get("best")
    first_step = len(history.loss_S)
    require_same_start(first_step, world_size, device, where=job.run)

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
        views_together=job.data.views_together,
        cache=None if job.cache is None else ImageCache(job.cache.folder, job.cache.max_bytes),
    )
    exam = None
    if job.evaluate is not None and rank == 0:
        exam = Exam(
            job.evaluate,
            store,
            size_px=job.data.size_px,
            pixels_of=pixels_of,
            num_workers=num_workers,
            pin_memory=on_gpu,
        )
    run.begin(identity(job, store, others))

    per_epoch = replay.steps_per_epoch
    num_steps = job.optimizer.epochs * per_epoch
    if is_over(history.epochs, job.evaluate):  # it was killed between its last checkpoint and its result
        num_steps = first_step
    batches = replay_loader(replay, range(first_step, num_steps), num_workers=num_workers, pin_memory=on_gpu)
    alike: dict[str, Any] = {
        "first_step": first_step,
        "learning_rate": lambda step: job.optimizer.learning_rate(step, per_epoch),
        "pixels_of": pixels_of,
        "clip_norm": job.optimizer.clip_norm,
        "bfloat16": job.student.precision == "bfloat16",
        "seed": job.data.seed,
        "rank": rank,
        "world_size": world_size,
    }
    if isinstance(pupil, Cohort) and isinstance(optimizer, Optimizers):
        networks = [wrap(one.network) for one in pupil.pupils]
        steps = mutual_steps(networks, batches, optimizer.each, method, **alike)
    else:
        assert isinstance(optimizer, Optimizer)
        steps = training_steps(
            wrap(pupil.network),
            batches,
            optimizer,
            method,
            weights=weights(job),
            mixture=job.combine == "mixture",
            teach=teach,
            parts=pupil.parts,
            capture=pupil.capture,
            accumulate=job.optimizer.accumulate,
            **alike,
        )

    def note(step: Step, what: str) -> str:
        return run.note_not_finite(rank, step, what)

    unseen: list[Step] = []  # since the last look at the losses
    of_look, of_epoch = Meter(), Meter()
    for step in steps:
        pupil.after_step()
        unseen.append(step)
        of_look.add(step)
        of_epoch.add(step)
        taken = step.number + 1
        epoch_ends = taken % per_epoch == 0
        save = epoch_ends or (job.checkpoint_steps is not None and taken % job.checkpoint_steps == 0)
        if not (save or len(unseen) == _LOOK_STEPS):
            continue
        history.loss_S += mean_losses(unseen, world_size, note)
        cached = [dataclasses.replace(step, loss=step.cached_loss) for step in unseen if step.cached_loss is not None]
        if cached:
            history.cached_loss_S += mean_losses(cached, world_size, note)
        record: dict[str, Any] | None = None
        if epoch_ends:
            epoch = len(history.epochs)
            record = {
                "epoch": epoch,
                "loss": sum(history.loss_S[-per_epoch:]) / per_epoch,
                "lr": step.lr,
                "images_per_s": of_epoch.images_per_s,
                "data_wait": of_epoch.data_wait,
                "seconds": of_epoch.seconds,
            }
            if exam is not None and exam.is_due(epoch, job.optimizer.epochs):
                record |= pupil.examined(exam)
            if job.evaluate is not None and job.evaluate.patience is not None:
                if job.evaluate.is_due(epoch, job.optimizer.epochs):
                    record[job.evaluate.metric] = of_rank_0(record.get(job.evaluate.metric), world_size, device)
                if best_epoch([*history.epochs, record], job.evaluate.metric) == epoch:
                    best = copied(pupil.state_dict())
            history.epochs.append(record)
            of_epoch = Meter()
        still_driving()
        if save:
            require_finite(pupil.network, step, note)
        if save and rank == 0:
            state = {**pupil.state_dict(), "optimizer": optimizer.state_dict(), **history.to_checkpoint()}
            run.checkpoints.save(taken, state if best is None else {**state, "best": best})
        report(
            Progress(
                step=taken,
                num_steps=num_steps,
                epoch=step.number // per_epoch,
                loss=history.loss_S[-1],
                lr=step.lr,
                images_per_s=of_look.images_per_s,
                data_wait=of_look.data_wait,
                epoch_record=record,
            )
        )
        unseen, of_look = [], Meter()
        if record is not None and is_over(history.epochs, job.evaluate):
            break

    pupil.close()
    kept = len(history.epochs) - 1
    if best is not None and job.evaluate is not None:
        pupil.load_state_dict(best)
        kept = best_epoch(history.epochs, job.evaluate.metric) or 0
    student = pupil.result()
    card = card_of(job, [store, *others], student, history.epochs, kept)
    if rank == 0:
        program = None
        if job.export:
            program, card["program"] = exported(student, size_px=job.data.size_px)
        peers = [peer.state_dict() for peer in pupil.peers()]
        run.finish(student.state_dict(), card=card, metrics=history.metrics(), program=program, peers=peers)
    return TrainingResult(card=card, **history.metrics())


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
    if job.first_stage is not None:
        check(first_stage_of(job), world_size=world_size)
    return store, method, run


def _open_others(job: TrainingJob) -> list[LabelStore]:
    return [LabelStore.open(member.url) for member in job.others]
