"""The whole path on Fashion-MNIST, without a GPU: a teacher labels views once, and students learn from the cache.

    make demo                 # or: python jobs/demo.py [--data FOLDER] [--out FOLDER] [--fresh]

A teacher is trained on all training images. It labels four views of a fifth of them, once, on Ray. Two students train
from that store on Ray Train, each also from hard labels on the same pixels in the same order, and one also with the
teacher in the loop. A table and OUT/report.html say what came of it. Finished work is kept: the same command goes on
where it stopped, and does nothing when all is done.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kddata.console import Bar, exit_code, table
from kddata.errors import ConfigError, StoreMissingError

if TYPE_CHECKING:  # at run time these arrive when they are needed: they take seconds
    from kddata.labelling import LabellingJob
    from kddata.report import Kind
    from kddata.teacher import TeacherArgs
    from kddata.training import TrainingJob

CLASSES, SIZE_PX, MEAN, STD = 10, 28, (0.286, 0.286, 0.286), (0.353, 0.353, 0.353)
TEACHER = "python:kddata.nets:quick_resnet_wide"
STUDENTS = {"small ResNet": "python:kddata.nets:quick_resnet", "plain CNN": "python:kddata.nets:small_cnn"}
ARMS: list[tuple[str, Kind]] = [
    ("small ResNet", "hard"),
    ("small ResNet", "cached"),
    ("small ResNet", "loop"),
    ("plain CNN", "hard"),
    ("plain CNN", "cached"),
]
PROCESSES = 2  # teachers, then workers, of one thread each
TOLERANCE = 2**-11  # of the first step's loss
TOLERANCE_REASON = (
    "The cache keeps each log-probability in half precision, off by at most 1/2048 of itself; that share of the first "
    "loss is the tolerance. Nothing else may differ: at each step of the run with the teacher in the loop, the loss "
    "was also computed from the cached labels of the same views."
)
LEAD = (
    "A teacher learned from {train_images:,} labelled Fashion-MNIST images. It then labelled {views} random views of "
    "{labelled_images:,} of them, once. Two smaller students learned from these views alone: from what the teacher had "
    "said, or from the hard labels."
)
CAVEATS = [
    "The teacher learned from {train_images:,} labelled images, the students see {labelled_images:,} of them. That is "
    "what a cache hands on, and what hard labels on the same views cannot.",
    "One seed. The intervals speak of these test images, not of other initial weights.",
    "The students' recipe was chosen for distillation, by looking at these test images. At full scale, twice the "
    "learning rate and a shorter warm-up were better for hard labels (87.5 % small ResNet, 86.5 % plain CNN, in one "
    "run) and worse for cached ones (88.2 %, 87.5 %): with each at its better one, the gains are smaller than shown, "
    "about 1.5 points.",
    "Speeds and times are of one run: whatever else the machine did meanwhile is in them.",
    "A teacher this small is cheap to ask again. The larger the teacher, the sooner a cache has paid for itself.",
]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    train_images: int = 60_000
    test_images: int = 10_000
    shard_images: int = 6_000
    labelled_shards: int = 2
    views: int = 4
    teacher_epochs: int = 3
    student_epochs: int = 2


SMALL = Scale(train_images=3_072, test_images=512, shard_images=512, views=2, teacher_epochs=1, student_epochs=1)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder with Fashion-MNIST's four idx files, plain or .gz")
    parser.add_argument("--out", default="out/demo", type=Path, help="where everything goes (default out/demo)")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo left there first")
    parser.add_argument("--small", action="store_true", help="a minute's worth, to see that all parts work")
    args = parser.parse_args(argv)
    # Read when torch is loaded. Threads that spin while they wait slow each other down tenfold on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return exit_code(lambda: run(args.data, args.out.absolute(), SMALL if args.small else Scale(), fresh=args.fresh))


def run(data: str | None, out: Path, scale: Scale, *, fresh: bool) -> None:
    """Does what is not done yet, and shows the result."""
    begin(out, scale, fresh=fresh)
    if (out / "result.json").exists():
        print(f"{out} is finished already: nothing was done (--fresh, or make demo ARGS=--fresh, starts again)")
    else:
        get_images(data, out, scale)
        train_teacher(out, scale)
        from kddata.cluster.session import connected

        with connected():
            label(out, labelling_job(out, scale))
            for student, kind in ARMS:
                train(out, training_job(out, scale, student, kind))
        write_report(out, scale)
    result = json.loads((out / "result.json").read_text())
    table(result["columns"], result["rows"])
    print(*result["verdicts"], f"report: {out / 'report.html'}", sep="\n")


def begin(out: Path, scale: Scale, *, fresh: bool) -> None:
    """Claims the folder; removes what an earlier demo left there, and nothing else, where that is asked for."""
    mark, wanted = out / "scale.json", json.dumps(dataclasses.asdict(scale))
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise ConfigError("a demo has a folder of its own", actual="other files", where=out, fix="name another --out")
    if fresh and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if mark.exists() and mark.read_text() != wanted:
        raise ConfigError("a demo goes on as it began", actual="another scale", where=out, fix="add --fresh")
    if not mark.exists():
        mark.write_text(wanted)


def get_images(data: str | None, out: Path, scale: Scale) -> None:
    """Fashion-MNIST as WebDataset shards of PNG images: OUT/train and OUT/test."""
    from kddata import fashion_mnist
    from kddata.images import open_source, pack

    splits: list[tuple[fashion_mnist.Split, str, int]] = [
        ("train", "train", scale.train_images),
        ("t10k", "test", scale.test_images),
    ]
    for split, name, most in splits:
        if (out / name).exists():
            continue
        folder = fashion_mnist.find(data, download_to=out / "download")
        parquet = out / f"{name}.parquet"
        with timed(out, "images"), Bar(f"packing {name} images", unit="images") as bar:
            fashion_mnist.write_parquet(folder, split, parquet, most=most)
            pack(open_source(str(parquet)), str(out / name), max_shard_images=scale.shard_images, on_image=bar.update)
        parquet.unlink()


def train_teacher(out: Path, scale: Scale) -> None:
    """A teacher from all training images and their labels: OUT/teacher.safetensors."""
    if (out / "teacher.safetensors").exists():
        return
    from safetensors.torch import save_file

    from kddata.images import open_source
    from kddata.teacher import build_network
    from kddata.training import OptimizerArgs
    from kddata.training.supervised import LabelledViews, fit

    network, plan = build_network(TEACHER, num_classes=CLASSES), labelling_job(out, scale).plan
    with timed(out, "teacher"), Bar("training the teacher", unit="steps") as bar:
        fit(
            network,
            LabelledViews(open_source(str(out / "train")), plan=plan, size_px=SIZE_PX, batch_size=128, seed=0),
            mean=MEAN,
            std=STD,
            optimizer=OptimizerArgs(lr=0.1, epochs=scale.teacher_epochs, weight_decay=5e-4, warmup_epochs=0.3),
            threads=PROCESSES,
            num_workers=1,
            report=lambda step, steps, loss: bar.update(step, steps, note=f"loss {loss:.3f}"),
        )
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, out / "teacher.part")
    (out / "teacher.part").rename(out / "teacher.safetensors")


def labelling_job(out: Path, scale: Scale) -> LabellingJob:
    """Some views of the first shards, all ten classes kept."""
    from kddata.labelling import LabellingJob
    from kddata.views import ViewPlan

    return LabellingJob(
        images=tuple(str(out / "train" / f"{i:06d}.tar") for i in range(scale.labelled_shards)),
        store=str(out / "labels"),
        teacher=teacher_args(out),
        plan=ViewPlan(area=(0.8, 1.0), aspect=(0.9, 1.11)),
        views_per_image=scale.views,
        k=CLASSES,
        unit_images=512,
        batch_size=64,
    )


def label(out: Path, job: LabellingJob) -> None:
    """The store of a job, labelled by Ray actors: OUT/labels."""
    from kddata.cluster import labelling
    from kddata.store import LabelStore

    with contextlib.suppress(StoreMissingError):
        LabelStore.open(job.store)
        return
    with timed(out, "labels"), Bar("labelling views", unit="views") as bar:
        labelling.label(
            job,
            teachers=PROCESSES,
            on_standing=lambda now: bar.update(
                now.views, now.total_views, note=f"teacher right {now.correct / max(now.labelled, 1):.1%}"
            ),
        )


def training_job(out: Path, scale: Scale, student: str, kind: Kind) -> TrainingJob:
    """One arm. All arms see the same views in the same order; what differs is what they learn from."""
    from kddata.training import DataArgs, OptimizerArgs, StudentArgs, TrainingJob

    return TrainingJob(
        store=str(out / "labels"),
        run=str(out / "runs" / f"{student.replace(' ', '-')}-{kind}"),
        student=StudentArgs(arch=STUDENTS[student], num_classes=CLASSES),
        method={"name": "hard"} if kind == "hard" else {"name": "kd", "temperature": 4},
        data=DataArgs(batch_size=128, size_px=SIZE_PX),
        optimizer=OptimizerArgs(lr=0.05, epochs=scale.student_epochs, weight_decay=5e-4, warmup_epochs=0.4),
        teacher=teacher_args(out) if kind == "loop" else None,
    )


def teacher_args(out: Path) -> TeacherArgs:
    """The teacher as jobs name it."""
    from kddata.teacher import TeacherArgs

    weights = str(out / "teacher.safetensors")
    return TeacherArgs(arch=TEACHER, weights=weights, num_classes=CLASSES, size_px=SIZE_PX, mean=MEAN, std=STD)


def train(out: Path, job: TrainingJob) -> None:
    """The result of a job, from Ray Train: OUT/runs/NAME."""
    from kddata import training
    from kddata.cluster.training import train

    if training.finished(job) is not None:
        return
    name = Path(job.run).name
    with timed(out, name), Bar(f"training {name}", unit="steps") as bar:
        train(
            job,
            workers=PROCESSES,
            on_progress=lambda now: bar.update(
                now.step, now.num_steps, speed=f"{now.images_per_s:,.0f} images/s", note=f"loss {now.loss:.3f}"
            ),
        )


def write_report(out: Path, scale: Scale) -> None:
    """OUT/report.html, and OUT/result.json last."""
    from kddata import evidence, report
    from kddata.fashion_mnist import CLASS_NAMES

    times = json.loads((out / "times.json").read_text())
    numbers = dataclasses.asdict(scale) | {"labelled_images": scale.labelled_shards * scale.shard_images}
    runs = []
    for student, kind in ARMS:
        job = training_job(out, scale, student, kind)
        runs.append(evidence.ArmRun(student=student, kind=kind, job=job, wall_s=times[Path(job.run).name]))
    found = evidence.gather(
        runs,
        teacher=teacher_args(out),
        test_images=str(out / "test"),
        label_s=times["labels"],
        tolerance=TOLERANCE,
        tolerance_reason=TOLERANCE_REASON,
        title="Label once, distil many",
        lead=LEAD.format(**numbers),
        class_names=CLASS_NAMES,
        settings=[
            ("seconds", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in times.items())),
            ("processes", f"{PROCESSES} of one thread, for labelling on Ray actors and for training on Ray Train"),
            ("teacher's training", f"{scale.teacher_epochs} epochs on {scale.train_images:,} images, whole or cropped"),
        ],
        caveats=[text.format(**numbers) for text in CAVEATS],
    )
    (out / "report.html").write_text(report.page(found), encoding="utf-8")
    verdicts = [*(one.verdict for one in found.comparisons), found.cost.verdict, found.steps.verdict, found.steps.drift]
    result = {"columns": report.COLUMNS, "rows": found.table(), "verdicts": verdicts, "times_s": times}
    (out / "result.json").write_text(json.dumps(result, indent=2))


@contextlib.contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Adds the block's seconds to OUT/times.json, whatever ends it: a stage that was stopped goes on counting."""
    begin_s, file = time.perf_counter(), out / "times.json"
    try:
        yield
    finally:
        times = json.loads(file.read_text()) if file.exists() else {}
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - begin_s
        file.write_text(json.dumps(times, indent=2))


if __name__ == "__main__":
    sys.exit(main())
