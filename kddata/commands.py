"""The commands of job files: label, teach, train, evaluate, sweep, and plan, which says what the first will cost.

They are what `kddata label` and jobs/label.py, `kddata train` and jobs/train.py, and so on do.

From a job file to a result on stdout, with a bar on stderr. Ray is imported after the job file is known to be right,
since that takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kddata.config import (
    EvaluateFile,
    LabelFile,
    SweepFile,
    TeachFile,
    TrainFile,
    judged_student,
    label_job,
    load,
    sweep_trials,
    teaching_job,
    train_job,
)
from kddata.console import Bar, clock, table
from kddata.errors import TrialsFailedError, within
from kddata.evaluation import ECE_BINS

if TYPE_CHECKING:
    from kddata.labelling import Estimate
    from kddata.training import Judgement


def label(path: str, overrides: Sequence[str] = (), *, extend: bool = False, as_json: bool = False) -> None:
    """Labels what a job file says into a store, and prints what was made. Raises KddataError.

    With `extend`, adds to a finished store what the file has and the store has not.
    """
    file = load(LabelFile, path, overrides)
    job = label_job(file)
    from kddata.cluster import labelling

    with Bar("labelling", unit="views") as bar:
        last: list[labelling.Standing] = []

        def show(now: labelling.Standing) -> None:
            last[:] = [now]
            right = f", teacher right {now.correct / now.labelled:.1%}" if now.labelled else ""
            bar.update(now.views, now.total_views, note=f"{now.bad_images} bad images{right}")

        try:
            done = labelling.label(
                job,
                teachers=file.cluster.teachers,
                gpus_per_teacher=file.cluster.gpus_per_teacher,
                unit_timeout_s=file.cluster.unit_timeout_s,
                extend=extend,
                on_standing=show,
            )
        except BaseException:  # an error, ctrl-C or SIGTERM: it is told what it did not take
            if last:
                bar.note(f"{last[0].views:,} of {last[0].total_views:,} views are finished and kept")
            raise
    info = done.store.info()
    if as_json:
        say(json.dumps({"new_units": done.new_units, **info}))
    elif done.new_units == 0:
        say(f"{info['url']} is finished already; nothing was done")
    else:
        say(f"{info['url']}: {info['rows']:,} views at {info['bytes_per_view']:.1f} B, in {info['units']} units")


def plan(path: str, overrides: Sequence[str] = (), *, passes: int, probe_views: int, as_json: bool = False) -> None:
    """Prints what a label job file would make and cost. Raises KddataError."""
    file = load(LabelFile, path, overrides)
    job = label_job(file)
    import torch

    from kddata import labelling

    on_gpu = file.cluster.gpus_per_teacher > 0 and torch.cuda.is_available()
    job = dataclasses.replace(job, device="cuda" if on_gpu else "cpu")
    found = labelling.estimate(job, teachers=file.cluster.teachers, passes=passes, probe_views=probe_views)
    if as_json:
        say(json.dumps(dataclasses.asdict(found)))
        return
    for name, text in estimate_lines(found, asks_gpu=file.cluster.gpus_per_teacher > 0):
        say(f"{name:<12} {text}")


def estimate_lines(found: Estimate, *, asks_gpu: bool) -> list[tuple[str, str]]:
    """What `kddata plan` prints, as (name, text)."""
    counted = f"; {found.counted_shards} counted, the others taken to be like them"
    where = "a GPU" if found.device == "cuda" else "CPU"
    slow = ", although the job asks for GPUs: theirs will be another" if asks_gpu and found.device != "cuda" else ""
    some = "" if found.students == 1 else "s"
    idle = (
        f"; {found.units} unit{'s' * (found.units != 1)} can keep no more than {found.units} busy: lower units.images"
    )
    return [
        (
            "images",
            f"{found.images:,} in {found.image_shards:,} shards"
            + (counted if found.counted_shards < found.image_shards else ""),
        ),
        ("views", f"{found.views:,}"),
        ("units", f"{found.units:,}, and {found.files:,} files in all"),
        ("size", f"{_bytes(found.bytes)}, at {found.bytes_per_view:.1f} B a view ({found.probed_views} probed)"),
        ("speed", f"{found.views_per_s:,.0f} views/s for one teacher on this machine's {where}{slow}"),
        (
            "time",
            f"{clock(found.hours * 3600)} with {found.teachers} such teacher{'s' * (found.teachers != 1)}"
            + idle * (found.units < found.teachers),
        ),
        (
            "pays",
            f"from {found.students} student{some} on, against the teacher in the loop ({found.passes} "
            f"pass{'es' * (found.passes != 1)} over the views each; its forward pass alone: "
            f"{found.teacher_views_per_s:,.0f} views/s)",
        ),
    ]


def _bytes(count: int) -> str:
    """A number of bytes with three digits and a unit."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def teach(path: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Trains the teacher of a teach job file in this process, and prints how well it learned. Raises KddataError."""
    file = load(TeachFile, path, overrides)
    job = teaching_job(file)
    from kddata.training.run import Run
    from kddata.training.teach import teach

    new = Run(job.run).result() is None
    with Bar(f"teaching {file.run.name}", unit="steps") as bar:
        card = teach(
            job,
            threads=file.threads,
            num_workers=file.loader_processes,
            report=lambda step, num_steps, loss: bar.update(step, num_steps, note=f"loss {loss:.4f}"),
        )
    _say_card(job.run, card, new=new, as_json=as_json)


def train(path: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Trains what a job file says, and prints what came of it. Raises KddataError."""
    file = load(TrainFile, path, overrides)
    job = train_job(file)
    from kddata.cluster import training
    from kddata.training import Progress, finished

    new = finished(job) is None
    with Bar(f"training {file.run.name}", unit="steps") as bar:

        def show(now: Progress) -> None:
            note = f"epoch {now.epoch + 1}, loss {now.loss:.4f}, {now.data_wait:.0%} waiting for data"
            bar.update(now.step, now.num_steps, speed=f"{now.images_per_s:,.0f} images/s", note=note)

        result = training.train(
            job,
            workers=file.cluster.workers,
            gpus_per_worker=file.cluster.gpus_per_worker,
            threads_per_worker=file.cluster.threads_per_worker,
            loader_processes=file.cluster.loader_processes,
            rank_timeout_s=file.cluster.rank_timeout_s,
            max_failures=file.cluster.max_failures,
            trackers=file.trackers,
            on_progress=show,
        )
    _say_card(job.run, result.card, new=new, as_json=as_json)


def evaluate(path: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Judges the student of an evaluate job file, and prints how good and how faithful it is. Raises KddataError."""
    file = load(EvaluateFile, path, overrides)
    import torch

    from kddata.training import judge

    torch.set_num_threads(file.threads)
    found = judge(
        judged_student(file),
        images=file.images,
        store=file.store,
        store_images=file.store_images,
        views=file.views,
        batch_size=file.batch_size,
        num_workers=file.loader_processes,
    )
    if as_json:
        say(json.dumps(dataclasses.asdict(found)))
        return
    for name, text in judgement_lines(found):
        say(f"{name:<12} {text}")


def judgement_lines(found: Judgement) -> list[tuple[str, str]]:
    """What `kddata evaluate` prints, as (name, text)."""
    lines = [("student", f"{found.arch}, of {found.student}"), ("weights", f"sha256 {found.weights_sha256}")]
    scores, fidelity = found.scores, found.fidelity
    if scores:
        lines += [
            ("images", f"{found.images:,}, {found.labelled:,} of them with ground truth"),
            ("top-1", f"{scores['top1']:.2%}"),
            ("top-5", f"{scores['top5']:.2%}"),
            ("loss", f"{scores['nll']:.4f} nats; Brier score {scores['brier']:.4f}"),
            ("calibration", f"error {scores['ece']:.4f} (ECE, {ECE_BINS} bins), confidence {scores['confidence']:.2%}"),
        ]
    if fidelity is not None:
        lines += [("fidelity", f"{fidelity.agreement:.2%} of {fidelity.views:,} views have the teacher's top-1")]
        kept = "all classes" if fidelity.k == fidelity.num_classes else f"{fidelity.k} classes and one of all others"
        kl = "unknown: the store has draws" if fidelity.kl is None else f"{fidelity.kl:.4f} nats at T = 1, over {kept}"
        lines += [("KL", f"{kl} (teacher to student)")]
    return lines


def _say_card(run: str, card: Mapping[str, Any], *, new: bool, as_json: bool) -> None:
    """What a run came to: its card as JSON, or what a person asks of it first, in a line."""
    if as_json:
        say(json.dumps({"run": run, **card}))
        return
    done = "" if new else " is finished already; nothing was done"
    say(f"{run}{done}: {card_line(card['metrics'])}")


def card_line(metrics: Mapping[str, Any]) -> str:
    """What `kddata train` and `kddata teach` print of a card's metrics."""
    forms = {
        "top1": "top-1 {:.2%}",
        "top5": "top-5 {:.2%}",
        "nll": "loss {:.4f} nats",
        "ece": "calibration error {:.4f}",
        "loss": "training loss {:.4f}",
    }
    return ", ".join(form.format(metrics[name]) for name, form in forms.items() if name in metrics)


def sweep(path: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Trains the students of a sweep, and prints one table of them. Raises KddataError.

    results.json, results.csv and plot.html in the sweep's folder hold the same. Raises TrialsFailedError, after that,
    where trials failed.
    """
    file = load(SweepFile, path, overrides)
    trials = sweep_trials(file)
    jobs = []
    for trial in trials:
        with within(f"trial {trial.name}"):
            jobs.append(train_job(trial.file))
    from kddata.cluster import sweep as on_ray
    from kddata.report import TrialResult, ranked, reason, sweep_csv, sweep_page, table_rows
    from kddata.store.storage import open_storage

    with Bar(f"sweep {file.run.name}", unit="epochs") as bar:

        def show(now: on_ray.Standing) -> None:
            failed = f", {now.failed} failed" if now.failed else ""
            bar.update(now.epochs, now.total_epochs, note=f"{now.finished} of {now.trials} students{failed}")

        outcomes = on_ray.sweep(
            [
                on_ray.Trial(
                    name=trial.name,
                    job=job,
                    threads=trial.file.cluster.threads_per_worker,
                    loader_processes=trial.file.cluster.loader_processes,
                    gpus=trial.file.cluster.gpus_per_worker,
                    trackers=trial.file.trackers,
                )
                for trial, job in zip(trials, jobs, strict=True)
            ],
            folder=file.folder,
            at_once=file.cluster.at_once,
            max_failures=file.cluster.max_failures,
            on_standing=show,
        )
    results = []
    for trial, outcome in zip(trials, outcomes, strict=True):
        found = (outcome.card or {}).get("metrics", {})
        metrics = {name: value for name, value in found.items() if isinstance(value, float)}
        results.append(TrialResult(name=trial.name, values=trial.values, metrics=metrics, error=outcome.error))
    metric = file.metric or ("top1" if any("top1" in result.metrics for result in results) else "loss")
    results = ranked(results, metric)
    as_values = {"sweep": file.folder, "metric": metric, "trials": [dataclasses.asdict(result) for result in results]}
    files = open_storage(file.folder)
    for name, text in (
        ("results.json", json.dumps(as_values, indent=2)),
        ("results.csv", sweep_csv(results)),
        ("plot.html", sweep_page(file.run.name, results, metric)),
    ):
        with files.replacing(name) as out:
            out.write(text.encode())
    if as_json:
        say(json.dumps(as_values))
    else:
        table(*table_rows(results, metric))
        for result in results:
            if result.error is not None:
                say(f"failed {result.name}: {reason(result.error)}")
        say(f"{file.folder}: results.json, results.csv, plot.html, and a folder for each student")
    failed = [result.name for result in results if result.error is not None]
    if failed:
        raise TrialsFailedError(
            "every trial of a sweep finishes",
            actual=f"{len(failed)} of {len(results)} failed: {', '.join(failed[:5])}",
            where=f"{file.folder}/results.json, with the errors",
            fix="mend what they say; the same command trains these alone",
        )


def say(text: str) -> None:
    """One line of result on stdout."""
    sys.stdout.write(text + "\n")
