"""Audit: the teacher is asked again about a sample of stored views, and a store's numbers are judged.

What a file's hash cannot tell: whether these labels are what this teacher says of these images. Deliberately not here:
the bytes of files, which `store.verify_store` checks. Trade-off: a sample of views, out of at most 32 units, so that
the price does not grow with the store.

Letters: B sampled views, C classes, K kept classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kddata import boundary, rng
from kddata.cards import differences
from kddata.care.pixels import cut_again
from kddata.errors import ConfigError, KddataError, StoreMismatchError
from kddata.labels import SoftLabels, top_k_ids
from kddata.reader import open_images
from kddata.store import LabelRows, LabelStore
from kddata.teacher import Teacher

MIN_TOP1 = 0.99
MAX_KL = 0.01
MAX_OUTPUT_ERROR = 0.01
VIEW_ERROR_FACTOR = 10  # one view may be off by so many times the most mean error: above rounding, below another image
_MOST_UNITS = 32
_LEAST_LABELLED = 50  # sampled views with ground truth, to say that other statistics would be right more often
_LEAST_GAIN = 0.05
_STATISTICS = {
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean and std 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "mean 0 and std 1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found; the store passes where `faults` is empty.

    Attributes:
        views: how many stored views the teacher was asked about again; 0 without a teacher.
        top1_match: share of them whose most probable class is the stored one; of sampled labels, the share of their
            draws that are drawn again from the new answers, by the same random numbers.
        mean_kl, max_kl: KL(stored || asked again) in nats at temperature 1, over the stored classes and all others as
            one more; mean and largest over the views. None for sampled labels, which do not tell it.
        output_errors: of each stored output that was made again, the mean over views of |stored - again| / |again|, by
            Euclidean norms; float16 makes up to 0.0005 of it. Boundary samples are not made again.
        max_output_errors: the largest of a view instead of the mean; a mean hides one wrong row among many.
        sampled: whether the labels are draws. What is said of all stored views is then an estimate from these draws.
        teacher_accuracy: share of all stored views with ground truth that the teacher is right about; None without. Of
            sampled labels, its most drawn class counts.
        mean_entropy_nats, mean_tail_mass: over all stored views, at temperature 1; of sampled labels, of the draws,
            whose entropy is less than the teacher's.
        images_per_class: (least, median, most) images of a class, over the classes with ground truth; None without.
        classes_without_images: how many of the teacher's classes are no image's ground truth; None without any.
        bad_images, num_images: images that could not be used, of all.
        faults: what is past its threshold, or not as it should be.
    """

    views: int
    top1_match: float | None
    mean_kl: float | None
    max_kl: float | None
    output_errors: dict[str, float]
    max_output_errors: dict[str, float]
    sampled: bool
    teacher_accuracy: float | None
    mean_entropy_nats: float
    mean_tail_mass: float
    images_per_class: tuple[int, float, int] | None
    classes_without_images: int | None
    bad_images: int
    num_images: int
    faults: tuple[str, ...]


def audit(
    store: LabelStore,
    teacher: Teacher | None = None,
    *,
    views: int = 256,
    seed: int = 0,
    images: str | Sequence[str] | None = None,
    min_top1: float = MIN_TOP1,
    max_kl: float = MAX_KL,
    max_output_error: float = MAX_OUTPUT_ERROR,
    min_accuracy: float = 0.0,
    max_bad: float = 1.0,
) -> Audit:
    """What is true of a store's labels, and what is wrong with them.

    Args:
        teacher: who is asked again; without one, only the store's own numbers are judged. Every field of its card that
            is not the store's is a fault.
        views: how many views are sampled, at most; `seed` says which.
        images: where the images lie now, if they moved.
        min_top1, max_kl, max_output_error: thresholds for `top1_match`, `mean_kl` and each of `output_errors`; each
            of `max_output_errors` is at most VIEW_ERROR_FACTOR times max_output_error. Draws of an audit on another
            kind of machine, or in bfloat16, may differ in a few more: lower min_top1 then.
        min_accuracy, max_bad: thresholds for `teacher_accuracy` and the share of bad images.

    With ground truth, the sampled views are also answered under other common channel statistics: a teacher that would
    be right clearly more often was fed wrongly normalised pixels, and that is a fault.

    Raises StoreMismatchError for a teacher of other classes or input size than the store's, SourceError for images
    that are not there or have changed, StoreDamagedError for a damaged label file.
    """
    if views < 1:
        raise ConfigError("an audit samples at least one view", actual=views)
    info, num_images = store.info(), sum(shard.num_images for shard in store.images)
    faults: list[str] = []
    errors: dict[str, Tensor] = {}
    top1 = mean_kl = worst = None
    asked = 0
    if teacher is not None:
        found = differences(dataclasses.asdict(store.spec.teacher), dataclasses.asdict(teacher.card))
        if {key for key, _, _ in found} & {"num_classes", "size_px"}:
            raise StoreMismatchError(
                "an audit asks a teacher of the store's classes and input size",
                actual="; ".join(f"teacher.{key}: stored {mine!r}, asked {theirs!r}" for key, mine, theirs in found),
                where=store.url,
            )
        faults += [f"teacher.{key} is {theirs!r}, in the store {mine!r}" for key, mine, theirs in found]
        rows, pixels = _sample(store, views, seed, images)
        asked = len(rows)
        if asked:
            logits_BC, outputs = teacher.answer(pixels)
            errors = _output_errors(rows, outputs)
            for output in store.spec.outputs:
                if output.name not in (*outputs, *boundary.NAMES):
                    faults.append(f"output {output.name} is stored, and the teacher was not asked for it")
            faults += _output_faults(errors, rows, max_output_error)
            if rows.labels.sampled:
                again = store.spec.labels_of(logits_BC, rows.image_id, rows.view.tolist())
                top1 = float(drawn_again(rows.labels, again).mean())
                if top1 < min_top1:
                    faults.append(f"{top1:.2%} of the draws of {asked} views are as stored, less than {min_top1:.2%}")
            else:
                match_B, kl_B = compare(rows.labels, logits_BC)
                top1, mean_kl, worst = float(match_B.double().mean()), float(kl_B.mean()), float(kl_B.max())
                if top1 < min_top1:
                    faults.append(f"top-1 of {top1:.2%} of {asked} views is as stored, less than {min_top1:.2%}")
                if not mean_kl <= max_kl:
                    faults.append(f"mean KL is {mean_kl:.4g} nats over {asked} views, more than {max_kl:g}")
            faults += _other_statistics(teacher, rows, pixels, logits_BC)
    accuracy, bad = info["teacher_accuracy"], info["bad_images"]
    if accuracy is not None and accuracy < min_accuracy:
        faults.append(f"the teacher is right about {accuracy:.2%} of the views, less than {min_accuracy:.2%}")
    if bad > max_bad * num_images:
        faults.append(f"{bad} of {num_images} images are bad, more than {max_bad:g} of them")
    per_class = _coverage(store)
    return Audit(
        views=asked,
        top1_match=top1,
        mean_kl=mean_kl,
        max_kl=worst,
        output_errors={name: float(error_B.mean()) for name, error_B in errors.items()},
        max_output_errors={name: float(error_B.max()) for name, error_B in errors.items()},
        sampled=store.spec.keep == "sampled",
        teacher_accuracy=accuracy,
        mean_entropy_nats=info["mean_entropy_nats"],
        mean_tail_mass=info["mean_tail_mass"],
        images_per_class=None if not len(per_class) else _spread(per_class),
        classes_without_images=None if not len(per_class) else int((per_class == 0).sum()),
        bad_images=bad,
        num_images=num_images,
        faults=tuple(faults),
    )


def _output_errors(rows: LabelRows, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far the stored outputs of each view are from these, float64 [B] by name."""
    found = {}
    for name, again in outputs.items():
        if name in rows.outputs:
            stored, again = (x.double().flatten(1) for x in (torch.from_numpy(rows.outputs[name]), again))
            norm_B = again.norm(dim=1).clamp(min=torch.finfo(torch.float16).tiny)
            found[name] = (stored - again).norm(dim=1) / norm_B
    return found


def _output_faults(errors: Mapping[str, Tensor], rows: LabelRows, most: float) -> list[str]:
    """One fault for each output that differs by more than `most` in the mean, or far more in one view."""
    found = []
    for name, error_B in errors.items():
        mean, worst = float(error_B.mean()), int(error_B.argmax())  # argmax finds NaN first
        if not mean <= most:
            found.append(f"{name} differs by {mean:.2%} of its norm in the mean, more than {most:.2%}")
        elif float(error_B[worst]) > VIEW_ERROR_FACTOR * most:
            where = f"view {int(rows.view[worst])} of {rows.image_id[worst]}"
            more = f"more than {VIEW_ERROR_FACTOR * most:.2%}"
            found.append(f"{name} differs by {float(error_B[worst]):.2%} of its norm in {where}, {more}")
    return found


def compare(labels: SoftLabels, logits_BC: Tensor) -> tuple[Tensor, Tensor]:
    """(whether the most probable class is the stored one, bool [B]; KL(stored || logits) in nats, float64 [B]).

    The KL is at temperature 1, over the K stored classes and all others as one more.
    """
    log_p_BK, log_tail_B = (x.double() for x in labels.at(1.0))
    ids_BK = labels.ids_BK.long()
    log_q_BC = torch.log_softmax(logits_BC.double(), dim=1)
    log_q_BK = log_q_BC.gather(1, ids_BK)
    log_q_tail_B = log_q_BC.scatter(1, ids_BK, -math.inf).logsumexp(1)
    p = torch.cat([log_p_BK, log_tail_B[:, None]], 1)
    q = torch.cat([log_q_BK, log_q_tail_B[:, None]], 1)
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return top_k_ids(logits_BC, 1)[:, 0] == ids_BK[:, 0], terms.sum(1).clamp(min=0)


def drawn_again(labels: SoftLabels, again: SoftLabels) -> Tensor:
    """float64 [B]: which share of their draws two sampled labels have in common, one less their total variation."""
    counts_BC, again_BC = ((x.dense("renorm").double() * x.k).round() for x in (labels, again))
    return torch.minimum(counts_BC, again_BC).sum(1) / labels.k


def _sample(store: LabelStore, views: int, seed: int, images: str | Sequence[str] | None) -> tuple[LabelRows, Tensor]:
    """At most so many rows, drawn evenly out of at most 32 units, and their pixels, uint8 [B, 3, S, S]."""
    per_unit = store.rows_per_unit
    filled = np.flatnonzero(per_unit)
    order = np.argsort(rng.stream(seed, "audit units").random(len(filled)), kind="stable")
    units = np.sort(filled[order[:_MOST_UNITS]])
    size_px = store.spec.teacher.size_px
    kept: list[LabelRows] = []
    pixels: list[Tensor] = []
    source = open_images(store, images)
    total, before = int(per_unit[units].sum()), 0
    for unit in units.tolist():
        # Of the first n rows of all these units, n * views / total are drawn, rounded: so many fall to this one.
        after = before + int(per_unit[unit])
        count = min(views, total) * after // total - min(views, total) * before // total
        before = after
        if not count:
            continue
        rows = store.read(unit)
        index = np.sort(np.argsort(rng.stream(seed, "audit rows", unit).random(len(rows)), kind="stable")[:count])
        for _, cut in cut_again(store, source, rows, index):
            if isinstance(cut, KddataError):
                raise cut
            pixels.append(cut)
        kept.append(rows.take(index))
    if not kept:
        return store.read(0), torch.empty(0, 3, size_px, size_px, dtype=torch.uint8)
    return LabelRows.concat(kept), torch.stack(pixels)


def _other_statistics(teacher: Teacher, rows: LabelRows, pixels: Tensor, logits_BC: Tensor) -> list[str]:
    """A fault where the teacher is right clearly more often under another common pair of mean and std."""
    label_B = torch.from_numpy(rows.label)
    known = label_B >= 0
    count = int(known.sum())
    if count < _LEAST_LABELLED:
        return []

    def right(logits: Tensor) -> float:
        return float((top_k_ids(logits, 1)[:, 0] == label_B[known]).double().mean())

    own, mean, std = right(logits_BC[known]), teacher.card.mean, teacher.card.std
    others = {name: values for name, values in _STATISTICS.items() if values != (mean, std)}
    rates = {name: right(teacher.with_statistics(*values)(pixels[known])) for name, values in others.items()}
    best = max(rates, key=lambda name: rates[name])
    if rates[best] <= own + max(_LEAST_GAIN, 3 * math.sqrt(0.25 / count)):
        return []
    return [
        f"with {best} the teacher is right about {rates[best]:.1%} of {count} views, with its own mean {mean} and std "
        f"{std} about {own:.1%}: these seem wrong"
    ]


def _coverage(store: LabelStore) -> np.ndarray:
    """How many images have each class as ground truth, int64 [C or more]; empty where none has any."""
    counts = np.zeros(0, dtype=np.int64)
    for shard in range(len(store.images)):
        labels = store.image_labels(shard)
        labels = labels[labels >= 0]
        if len(labels):
            found = np.bincount(labels, minlength=store.spec.teacher.num_classes)
            counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
            counts[: len(found)] += found
    return counts


def _spread(per_class: np.ndarray) -> tuple[int, float, int]:
    there = per_class[per_class > 0]
    return int(there.min()), float(np.median(there)), int(there.max())
