"""Replay: the stored views of a step, cut again from their images, as a batch. The torch DataLoader lives here.

Pixels are uint8 and exactly what `views.render` gives; normalisation happens in training, on the device. The dataset
is a map from step numbers to batches, so that the DataLoader's workers share steps and any step can come first.

Trade-off: every view is decoded on its own. What a batch shares (file order, label columns) is done once a batch.

Shapes: B rows of this rank's share of a step, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kddata import order
from kddata.corruption import ClassImbalance, LabelNoise
from kddata.errors import StoreMismatchError
from kddata.images import ImageSource, decode
from kddata.labels import SoftLabels
from kddata.reader import Reader, open_images, order_of
from kddata.store import Choice, LabelRows, LabelStore, Subset, choose
from kddata.views import Interpolation, View, ViewPlan, render

_NO_LIMIT = 1 << 62  # pixels: stored rows come from images that kept the limit when they were labelled


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a step.

    Attributes:
        pixels_u8_B3SS: the rendered views.
        labels: what the teacher said about each.
        targets_B: ground truth, int64, -1 for none.
        targets2_B, lam_B: of a store whose views are mixed, the ground truth of each one's partner, and the view's own
            share, float32; an unmixed view has itself as partner, and share 1. Else None.
        image_ids, view_indices: which view of which image each row is.
        step_rows: rows of the step over all ranks; a mean over ranks weighs this share by B / step_rows * world size.
        teacher_pixels_u8: the same views at a second size, for a teacher in the loop, or None.
        outputs: stored tensors of the teacher that were asked for, by name, float16 [B, ...].
        others: of an ensemble, what the other stores' teachers said, in the order of the stores.
    """

    pixels_u8_B3SS: Tensor
    labels: SoftLabels
    targets_B: Tensor
    image_ids: list[str]
    view_indices: list[int]
    step_rows: int
    teacher_pixels_u8: Tensor | None = None
    targets2_B: Tensor | None = None
    lam_B: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    others: tuple[SoftLabels, ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for DataLoader(pin_memory=True)."""
        values = {x.name: getattr(self, x.name) for x in fields(self)}
        pinned = {key: x.pin_memory() for key, x in values.items() if isinstance(x, (Tensor, SoftLabels))}
        outputs = {name: x.pin_memory() for name, x in self.outputs.items()}
        others = tuple(labels.pin_memory() for labels in self.others)
        return replace(self, outputs=outputs, others=others, **pinned)  # type: ignore[arg-type]


def choice_of(store: LabelStore, subset: Subset | None, imbalance: ClassImbalance | None) -> Choice | None:
    """The images of a subset with the classes of an imbalance; None for all. Raises like `store.choose`."""
    if subset is None and imbalance is None:
        return None
    num_classes = store.spec.teacher.num_classes
    keep = None if imbalance is None else lambda ids, labels: imbalance.keep_N(ids, labels, num_classes)
    return choose(store, subset, keep)


class _Form(TypedDict):
    size_px: int
    interpolation: Interpolation


class Replay(Dataset[Batch]):
    """Batches by step number, counted from the first step of epoch 0: step s lies in epoch s // steps_per_epoch."""

    def __init__(
        self,
        store: LabelStore,
        *,
        batch_size: int,
        size_px: int,
        seed: int,
        images: str | Sequence[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        teacher_px: int | None = None,
        outputs: Sequence[str] = (),
        others: Sequence[LabelStore] = (),
        subset: Subset | None = None,
        noise: LabelNoise | None = None,
        imbalance: ClassImbalance | None = None,
    ) -> None:
        store.spec.require_outputs(outputs, where=store.url)
        choice = choice_of(store, subset, imbalance)
        rows = order_of(store, seed, choice)
        self._reader = Reader(store, open_images(store, images), rows, outputs=outputs, others=others, choice=choice)
        self._num_rows, self._batch_size = rows.num_rows, batch_size
        self._rank, self._world_size = rank, world_size
        self._sizes_px = [size_px] if teacher_px is None else [size_px, teacher_px]
        self._interpolation: Interpolation = store.spec.plan.interpolation
        self._num_classes, self._noise = store.spec.teacher.num_classes, noise
        self.steps_per_epoch = order.num_steps(rows.num_rows, batch_size)

    def __getitem__(self, step: int) -> Batch:
        epoch, step = divmod(step, self.steps_per_epoch)
        start, stop = order.step_range(step, self._num_rows, self._batch_size)
        read = self._reader.read(epoch, *order.rank_range(start, stop, self._rank, self._world_size))
        rows, lent = read.rows, read.partner_rows
        self._check_classes(rows)
        if lent is not None:
            self._check_classes(lent)
        pixels = [torch.empty(len(rows), 3, size_px, size_px, dtype=torch.uint8) for size_px in self._sizes_px]
        targets, num_lent = torch.from_numpy(self._labels(rows)), 0
        lent_labels = [] if lent is None else self._labels(lent).tolist()
        targets2, lam_B = targets.clone(), torch.ones(len(rows))
        for i, data in enumerate(read.images):
            image, view, partner = decode(data, max_pixels=_NO_LIMIT), rows.view_at(i), None
            if view.mix is not None:
                assert lent is not None
                partner = decode(read.partner_images[num_lent], max_pixels=_NO_LIMIT), lent.view_at(num_lent).unmixed
                targets2[i], lam_B[i] = lent_labels[num_lent], view.mix.lam
                num_lent += 1
            for rendered, size_px in zip(pixels, self._sizes_px, strict=True):
                form: _Form = {"size_px": size_px, "interpolation": self._interpolation}
                rendered[i] = render(image, view, **form, partner=None if partner is None else render(*partner, **form))
        return Batch(
            pixels_u8_B3SS=pixels[0],
            labels=rows.labels,
            targets_B=targets,
            targets2_B=None if lent is None else targets2,
            lam_B=None if lent is None else lam_B,
            image_ids=rows.image_id,
            view_indices=rows.view.tolist(),
            step_rows=stop - start,
            teacher_pixels_u8=pixels[1] if len(pixels) > 1 else None,
            outputs={name: torch.from_numpy(value) for name, value in rows.outputs.items()},
            others=tuple(read.others),
        )

    def _labels(self, rows: LabelRows) -> np.ndarray:
        """Ground truth, made noisy where that was asked for."""
        if self._noise is None:
            return rows.label
        return self._noise.labels(rows.image_id, rows.label, self._num_classes)

    def _check_classes(self, rows: LabelRows) -> None:
        if len(rows) and int(rows.label.max()) >= self._num_classes:
            worst = int(rows.label.argmax())
            raise StoreMismatchError(
                f"ground-truth classes are below the teacher's {self._num_classes}",
                actual=f"class {rows.label[worst]} of image {rows.image_id[worst]!r}",
                fix="label again from a source whose classes are the teacher's",
            )


def loader(
    store: LabelStore,
    *,
    batch_size: int,
    size_px: int,
    seed: int = 0,
    epoch: int = 0,
    epochs: int = 1,
    start_step: int = 0,
    images: str | Sequence[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    teacher_px: int | None = None,
    outputs: Sequence[str] = (),
    others: Sequence[LabelStore] = (),
    subset: Subset | None = None,
    noise: LabelNoise | None = None,
    imbalance: ClassImbalance | None = None,
) -> DataLoader[Batch]:
    """A DataLoader over the batches of `epochs` epochs from `epoch` on, of which the first `start_step` are left out.

    Every view of the store comes once an epoch over all ranks, in an order that is a pure function of the store, the
    seed and the epoch. `batch_size` counts rows over all ranks.

    Args:
        images: where the images lie now, if they moved since they were labelled.
        num_workers: processes that read and render ahead, each with one torch thread; 0 for the calling one.
        teacher_px: also render each view at this size.
        outputs: names of stored outputs that batches are to hold.
        others: stores over the same views, whose labels come as `Batch.others`.
        subset: which images come; see `store.choose`.
        noise: makes the ground truth noisy; imbalance: makes classes of the subset rare. See `kddata.corruption`.

    Raises StoreMismatchError for others that hold other views or images, ConfigError for outputs that are not there.
    """
    replay = Replay(
        store,
        batch_size=batch_size,
        size_px=size_px,
        seed=seed,
        images=images,
        rank=rank,
        world_size=world_size,
        teacher_px=teacher_px,
        outputs=outputs,
        others=others,
        subset=subset,
        noise=noise,
        imbalance=imbalance,
    )
    first = epoch * replay.steps_per_epoch
    steps = range(first + start_step, first + epochs * replay.steps_per_epoch)
    return step_loader(replay, steps, num_workers=num_workers, pin_memory=pin_memory)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images for evaluation.

    Attributes:
        pixels_u8_B3SS: one evaluation view of each.
        targets_B: ground truth, int64, -1 for none.
        image_ids: which they are.
    """

    pixels_u8_B3SS: Tensor
    targets_B: Tensor
    image_ids: list[str]

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory, for DataLoader(pin_memory=True)."""
        return replace(self, pixels_u8_B3SS=self.pixels_u8_B3SS.pin_memory(), targets_B=self.targets_B.pin_memory())


def evaluation_view(height_px: int, width_px: int, size_px: int) -> View:
    """The view that an image is judged by: policy center at the student's size.

    An image that is no larger than that is not enlarged first: its middle square is taken whole (28 px images and a
    28 px student: the image as it is).
    """
    side = min(height_px, width_px)
    if side <= size_px:
        return View(box=((height_px - side) // 2, (width_px - side) // 2, side, side))
    return ViewPlan(policy="center", center_px=size_px).draw("", 0, height_px, width_px)


class EvaluationImages(Dataset[ImageBatch]):
    """Batches of a source's images, in the order of the source.

    Attributes:
        num_labelled: how many images have ground truth.

    Raises BadImageError for an image that cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size_px: int,
        interpolation: Interpolation = "bilinear",
        batch_size: int = 256,
        max_pixels: int = 100_000_000,
    ) -> None:
        self._source, self._size_px, self._interpolation = source, size_px, interpolation
        self._max_pixels = max_pixels
        self._batches, self.num_labelled = [], 0
        for name in source.shard_names():
            _, refs = source.scan(name)
            self.num_labelled += sum(ref.label is not None for ref in refs)
            self._batches += [(name, refs[i : i + batch_size]) for i in range(0, len(refs), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> ImageBatch:
        name, refs = self._batches[index]
        pixels = torch.empty(len(refs), 3, self._size_px, self._size_px, dtype=torch.uint8)
        for i, (_, data) in enumerate(self._source.stream(name, refs)):
            image = decode(data, max_pixels=self._max_pixels)
            view = evaluation_view(image.shape[1], image.shape[2], self._size_px)
            pixels[i] = render(image, view, size_px=self._size_px, interpolation=self._interpolation)
        targets = torch.tensor([-1 if ref.label is None else ref.label for ref in refs])
        return ImageBatch(pixels_u8_B3SS=pixels, targets_B=targets, image_ids=[ref.image_id for ref in refs])


def evaluation_loader(
    source: ImageSource,
    *,
    size_px: int,
    interpolation: Interpolation = "bilinear",
    batch_size: int = 256,
    max_pixels: int = 100_000_000,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[ImageBatch]:
    """A DataLoader over `EvaluationImages` in order."""
    images = EvaluationImages(
        source, batch_size=batch_size, size_px=size_px, interpolation=interpolation, max_pixels=max_pixels
    )
    return step_loader(images, range(len(images)), num_workers=num_workers, pin_memory=pin_memory)


def step_loader(dataset: Dataset, steps: range, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader of ready batches: item s of the dataset for each s of `steps`, in that order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
