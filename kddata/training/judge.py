"""Judge: how good a trained student is on labelled images, and how faithful to the teacher of a store.

Fidelity is asked of the store's own views, where it is stored what the teacher said; so for fidelity on test images,
label these into a store of their own. Trade-off: a store that kept k classes of C knows the teacher no better, so KL is
that of the kept classes and one of all others, which is at most the full KL and equal to it where k = C.

Source of the measures: Stanton et al., "Does Knowledge Distillation Really Work?", arXiv 2106.05945, section 3.

Shapes: B views, C classes, K kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kddata.errors import ConfigError, StoreMismatchError
from kddata.images import open_source
from kddata.losses import kd_loss
from kddata.replay import evaluation_loader, loader
from kddata.store import LabelStore
from kddata.teacher import weights_sha256
from kddata.training.predict import predict
from kddata.training.trained import TrainedStudent


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How like its teacher a student is, on some views of a store.

    Attributes:
        views: how many, drawn from the store by the order of seed 0.
        agreement: share of views with the same most probable class.
        kl: mean of KL(teacher || student) at temperature 1, nats; of the coarse distributions where k < num_classes.
            None for a store of sampled labels, whose draws are not the teacher's probabilities.
        k, num_classes: what the store keeps.
    """

    views: int
    agreement: float
    kl: float | None
    k: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What came out.

    Attributes:
        student, arch, weights_sha256: who was judged.
        images, labelled: how many were looked at, and how many of them have ground truth.
        scores: means over the labelled images: top1, top5, nll (the loss, in nats), brier, confidence, and ece (15
            bins); empty where no images were named. See `evaluation.Scores`.
        fidelity: where a store was named.
    """

    student: str
    arch: str
    weights_sha256: str
    images: int
    labelled: int
    scores: dict[str, float]
    fidelity: Fidelity | None


def judge(
    student: TrainedStudent,
    *,
    images: str | Sequence[str] | None = None,
    store: str | None = None,
    store_images: str | Sequence[str] | None = None,
    views: int | None = 10_000,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Judgement:
    """The scores of a student on labelled images, its fidelity on the views of a store, or both.

    Args:
        images: as `open_source` takes them; one evaluation view of each.
        store_images: where the store's images lie now, if they moved.
        views: at most so many of the store's; None for all.

    Raises ConfigError where neither images nor a store are named, and where no image has ground truth;
    StoreMismatchError for a store of other classes.
    """
    if images is None and store is None:
        raise ConfigError("a student is judged on labelled images, by a store, or both", actual="neither")
    num_images, labelled, scores = 0, 0, dict[str, float]()
    if images is not None:
        batches = evaluation_loader(
            open_source(images if isinstance(images, str) else tuple(images)),
            size_px=student.size_px,
            interpolation=student.interpolation,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        found = predict(student.network, batches, student.pixels_of)
        known = found.targets_N >= 0
        num_images, labelled = len(found.image_ids), int(known.sum())
        if not labelled:
            raise ConfigError(
                "images that a student is judged on have labels",
                actual="none has",
                where=images,
                fix="put them into a folder for each class, or tars with .cls files; `kddata predict` needs no labels",
            )
        known_alone = dataclasses.replace(found, logits_NC=found.logits_NC[known], targets_N=found.targets_N[known])
        scores = known_alone.score().summary()
    return Judgement(
        student=student.where,
        arch=student.arch,
        weights_sha256=weights_sha256(student.network),
        images=num_images,
        labelled=labelled,
        scores=scores,
        fidelity=None if store is None else fidelity(student, store, store_images, views, batch_size, num_workers),
    )


@torch.inference_mode()
def fidelity(
    student: TrainedStudent,
    store: str,
    images: str | Sequence[str] | None = None,
    views: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Fidelity:
    """How like its teacher a student is on the views of a store; see `judge`."""
    opened = LabelStore.open(store)
    spec = opened.spec
    if spec.teacher.num_classes != student.num_classes:
        raise StoreMismatchError(
            f"a student is compared with a teacher of its {student.num_classes} classes",
            actual=f"{spec.teacher.num_classes} classes",
            where=opened.url,
        )
    batches = loader(opened, batch_size=batch_size, size_px=student.size_px, images=images, num_workers=num_workers)
    student.network.eval()
    kl_sum, agreed, seen = 0.0, 0, 0
    for batch in batches:
        rows = slice(None if views is None else views - seen)
        logits_BC = student.network(student.pixels_of(batch.pixels_u8_B3SS[rows])).double()
        labels = batch.labels.rows(rows).to(logits_BC.device)
        agreed += int((logits_BC.argmax(1) == labels.ids_BK[:, 0].long()).sum())
        if spec.keep != "sampled":
            kl_sum += float(kd_loss(logits_BC, labels, temperature=1.0, reduction="sum"))
        seen += len(labels)
        if seen == views:
            break
    return Fidelity(
        views=seen,
        agreement=agreed / seen,
        kl=None if spec.keep == "sampled" else kl_sum / seen,
        k=spec.k,
        num_classes=student.num_classes,
    )
