"""Evidence: finished runs on one store, judged on the same test images and turned into a `Report`.

Everything is recomputed from what lies in the store and the runs' folders, but for wall times, which no such file
holds. Trade-off: the test images are rendered once and kept in memory for all arms.
"""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from kddata import __version__, training
from kddata.evaluation import paired_bootstrap
from kddata.images import ImageRef, decode, open_source
from kddata.reader import open_images
from kddata.replay import ImageBatch, evaluation_loader
from kddata.report import LABELS_OF, Arm, Comparison, Cost, Kind, Report, Sample, StepAgreement
from kddata.store import LabelStore
from kddata.teacher import TeacherArgs, build_network
from kddata.training import Predictions, TrainingJob
from kddata.views import render

_TOP = 3


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """A finished run as one arm: the student's name, what it learned from, and how long the whole run took."""

    student: str
    kind: Kind
    job: TrainingJob
    wall_s: float


def gather(
    runs: Sequence[ArmRun],
    *,
    teacher: TeacherArgs,
    test_images: str,
    label_s: float,
    tolerance: float,
    tolerance_reason: str,
    title: str,
    lead: str,
    class_names: Sequence[str],
    num_samples: int = 6,
    settings: Sequence[tuple[str, str]] = (),
    caveats: Sequence[str] = (),
) -> Report:
    """The report on finished runs of one store: for each student a hard and a cached run, and one loop run.

    Args:
        teacher: the store's, with its weights.
        test_images: location of labelled images that no arm has seen.
        label_s: wall time of labelling.
        tolerance, tolerance_reason: see `report.StepAgreement`.
        num_samples: images of the store that the page shows.
        settings: (name, value) pairs beside those that are read from store and jobs.
    """
    store = LabelStore.open(runs[0].job.store)
    spec = store.spec
    batches = list(
        evaluation_loader(open_source(test_images), size_px=spec.teacher.size_px, interpolation=spec.plan.interpolation)
    )
    pixels_of = training.normaliser(spec.teacher.mean, spec.teacher.std, "cpu")

    def judge(network: nn.Module, seen: Sequence[ImageBatch] = batches) -> Predictions:
        return training.predict(network.to(memory_format=torch.channels_last), seen, pixels_of)

    said = judge(build_network(teacher.arch, num_classes=teacher.num_classes, weights=teacher.weights))
    arms, right = [], {}
    for run in runs:
        arch, num_classes = run.job.student.arch, run.job.student.num_classes
        scores = judge(build_network(arch, num_classes=num_classes, weights=f"{run.job.run}/model.safetensors")).score(
            said
        )
        arms.append(_arm(run, scores.summary(), num_views=store.num_rows))
        right[run.student, run.kind] = scores.top1
    by_kind = {(arm.student, arm.kind): arm for arm in arms}
    loop = next(arm for arm in arms if arm.kind == "loop")
    cached = by_kind[loop.student, "cached"]
    return Report(
        title=title,
        lead=lead,
        teacher=said.score().summary(),
        arms=arms,
        comparisons=[
            Comparison(student=student, interval=paired_bootstrap(right[student, "cached"], right[student, "hard"]))
            for student in dict.fromkeys(run.student for run in runs)
        ],
        cost=Cost(
            label_s=label_s,
            num_images=store.num_rows // store.views_per_image,
            views_per_image=store.views_per_image,
            store_bytes=sum(store.storage.sizes().values()),
            cached_s=cached.train_s,
            loop_s=loop.train_s,
        ),
        steps=StepAgreement(
            cached_S=cached.loss_S,
            loop_S=loop.loss_S,
            loop_cached_S=loop.cached_loss_S,
            tolerance=tolerance,
            reason=tolerance_reason,
            accuracy=paired_bootstrap(right[loop.student, "cached"], right[loop.student, "loop"]),
        ),
        samples=samples(store, class_names, most=num_samples),
        settings=[*settings, *_settings(store, runs)],
        caveats=caveats,
    )


def samples(store: LabelStore, class_names: Sequence[str], *, most: int) -> list[Sample]:
    """A few images of a store's first unit with all their views in it and what was said of each.

    Those that the teacher was least sure of come first, then ever surer ones.
    """
    rows, source = store.read(0), open_images(store)
    views: dict[str, list[int]] = {}
    for row, image_id in enumerate(rows.image_id):
        views.setdefault(image_id, []).append(row)
    surest_p = rows.labels.log_p_BK[:, 0].exp().numpy()
    by_doubt = sorted(views, key=lambda image_id: (float(surest_p[views[image_id]].mean()), image_id))
    found = []
    for image_id in dict.fromkeys(by_doubt[int(len(by_doubt) * (i / most) ** 3)] for i in range(most)):
        first = views[image_id][0]
        length, offset = int(rows.length[first]), int(rows.offset[first])
        ref = ImageRef(image_id=image_id, label=None, offset=offset, length=length)
        image = decode(source.fetch(store.images[int(rows.source[first])].name, ref), max_pixels=1 << 62)
        shown = []
        for row in views[image_id]:
            spec, labels = store.spec, rows.labels.rows(slice(row, row + 1))
            pixels = render(
                image, rows.view_at(row), size_px=spec.teacher.size_px, interpolation=spec.plan.interpolation
            )
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
            pairs = zip(labels.ids_BK[0].tolist(), labels.log_p_BK[0].exp().tolist(), strict=True)
            shown.append((file.getvalue(), [(class_names[i], p) for i, p in list(pairs)[:_TOP]]))
        truth = int(rows.label[first])
        found.append(Sample(image_id=image_id, truth=class_names[truth] if truth >= 0 else "", views=shown))
    return found


def _settings(store: LabelStore, runs: Sequence[ArmRun]) -> list[tuple[str, str]]:
    """How it was made, for a reader who wants to do it again."""
    spec, job = store.spec, runs[0].job
    plan, learning, data = spec.plan, job.optimizer, job.data
    students = {run.student: run.job.student.arch for run in runs}
    methods = {
        LABELS_OF[run.kind]: ", ".join(f"{key} {value}" for key, value in run.job.method.items()) for run in runs
    }
    recipe = (
        f"{learning.name}, learning rate {learning.lr:g}, {learning.schedule}, {learning.epochs} epochs over all views"
    )
    return [
        ("teacher", spec.teacher.arch),
        *students.items(),
        *methods.items(),
        ("all students", f"{recipe}, batch {data.batch_size}, seed {data.seed}: the same rows in the same order"),
        ("views", f"crops of {plan.area[0]:.0%} to {plan.area[1]:.0%} of the area, flipped with p = {plan.flip_p:g}"),
        ("labels", f"the {spec.k} most probable of {spec.teacher.num_classes} classes, codec {spec.codec}"),
        ("versions", f"kddata {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
    ]


def _arm(run: ArmRun, scores: Mapping[str, float], *, num_views: int) -> Arm:
    result = training.finished(run.job)
    assert result is not None, f"{run.job.run} has not finished"
    train_s = sum(record["seconds"] for record in result.epochs)
    return Arm(
        student=run.student,
        kind=run.kind,
        scores=scores,
        wall_s=run.wall_s,
        train_s=train_s,
        images_per_s=num_views * len(result.epochs) / train_s,
        loss_S=result.loss_S,
        cached_loss_S=result.cached_loss_S,
    )
