"""Replay: the stored views of a step, cut again from their images, as a batch. The torch DataLoader lives here.

Pixels are uint8 and exactly what `views.render` gives; normalisation happens in training, on the device. The dataset
is a map from step numbers to batches, so that the DataLoader's workers share steps and any step can come first.

Trade-off: every view is decoded on its own, unless `views_per_visit` says otherwise: m views of an image are then cut
from one decode, and those that come in later steps wait as pixels, 4 m (1/2 - 1 / (m + 1)) steps of them in the mean.
What a batch shares (file order, label columns) is done once a batch.

Shapes: B rows of this rank's share of a step, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from kddata import order
from kddata.corruption import ClassImbalance, LabelNoise
from kddata.cutting import cut
from kddata.errors import StoreMismatchError
from kddata.images import CachedSource, ImageCache, ImageSource, decode
from kddata.labels import SoftLabels
from kddata.reader import Reader, Rows, open_images, order_of
from kddata.store import Choice, LabelRows, LabelStore, Subset, choose
from kddata.views import Interpolation, View, ViewPlan, render


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

    def split(self, count: int) -> list[Batch]:
        """So many parts of even size, to one row, in order; fewer where there are fewer rows. See `cat`."""
        ranges = [order.rank_range(0, len(self), i, count) for i in range(min(count, len(self)))]
        return [self] if len(ranges) == 1 else [self._rows(slice(*bounds)) for bounds in ranges]

    def _rows(self, rows: slice) -> Batch:
        found: dict[str, Any] = {}
        for name, value in ((x.name, getattr(self, x.name)) for x in fields(self)):
            if isinstance(value, SoftLabels):
                found[name] = value.rows(rows)
            elif isinstance(value, (Tensor, list)):
                found[name] = value[rows]
            elif isinstance(value, dict):
                found[name] = {key: x[rows] for key, x in value.items()}
            elif isinstance(value, tuple):
                found[name] = tuple(labels.rows(rows) for labels in value)
        return replace(self, **found)

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """All rows of the parts of one rank's share."""
        joined: dict[str, Any] = {}
        for name in (x.name for x in fields(Batch)):
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], Tensor):
                joined[name] = torch.cat(values)
            elif isinstance(values[0], SoftLabels):
                joined[name] = SoftLabels.cat(values)
            elif isinstance(values[0], list):
                joined[name] = [x for value in values for x in value]
            elif isinstance(values[0], dict):
                joined[name] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
            elif isinstance(values[0], tuple):
                joined[name] = tuple(SoftLabels.cat(list(labels)) for labels in zip(*values, strict=True))
            else:
                joined[name] = values[0]
        return Batch(**joined)

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


class Replay(Dataset[Batch]):
    """Batches by step number, counted from the first step of epoch 0: step s lies in epoch s // steps_per_epoch.

    With `views_per_visit` above 1, the views of a visit that come later are cut with the first of them, and wait: the
    steps are then best asked for in their order. What is asked for decides what comes, not what waits.
    """

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
        views_per_visit: int = 1,
        views_together: int = 1,
        cache: ImageCache | None = None,
    ) -> None:
        store.spec.require_outputs(outputs, where=store.url)
        choice = choice_of(store, subset, imbalance)
        rows = order_of(
            store,
            seed,
            choice,
            views_per_visit=views_per_visit,
            views_together=views_together,
            batch_size=batch_size,
        )
        source = open_images(store, images)
        if cache is not None:
            source = CachedSource(source, cache)
        self._reader = Reader(store, source, rows, outputs=outputs, others=others, choice=choice)
        self._num_rows, self._batch_size = rows.num_rows, batch_size
        self._rank, self._world_size = rank, world_size
        self._sizes_px = (size_px,) if teacher_px is None else (size_px, teacher_px)
        self._interpolation: Interpolation = store.spec.plan.interpolation
        self._num_classes, self._noise = store.spec.teacher.num_classes, noise
        self.steps_per_epoch = order.num_steps(rows.num_rows, batch_size)
        self.views_per_visit = views_per_visit
        self._waiting: dict[tuple[int, int], list[Tensor]] = {}  # by epoch and position, none before the next:
        self._at = (-1, -1)

    @property
    def fewest_rows(self) -> int:
        """Rows of the smallest share of a step."""
        last = order.step_range(self.steps_per_epoch - 1, self._num_rows, self._batch_size)
        return min(self._batch_size, last[1] - last[0]) // self._world_size

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, 0, 1)

    def part(self, step: int, part: int, parts: int) -> Batch:
        """One of several even parts of this rank's share of a step, for as many processes that cut it together."""
        epoch, step = divmod(step, self.steps_per_epoch)
        positions = np.arange(*self._share(step, part, parts))
        here = self._reader.rows(epoch, positions)
        rows, lent = here.rows, here.partner_rows
        self._check_classes(rows)
        if lent is not None:
            self._check_classes(lent)
        if self.views_per_visit == 1:
            pixels = cut(self._reader.with_images(here), self._sizes_px, self._interpolation)
        else:
            pixels = self._cut_ahead(epoch, here, positions, part, parts)
        targets = torch.from_numpy(self._labels(rows))
        targets2, lam_B = targets.clone(), torch.ones(len(rows))
        if lent is not None and rows.mix is not None:
            mixed = [i for i, mix in enumerate(rows.mix) if mix is not None]
            targets2[mixed] = torch.from_numpy(self._labels(lent))
            lam_B[mixed] = torch.tensor([rows.mix[i].lam for i in mixed], dtype=torch.float32)
        start, stop = order.step_range(step, self._num_rows, self._batch_size)
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
            others=tuple(here.others),
        )

    def _share(self, step: int, part: int, parts: int) -> tuple[int, int]:
        share = order.rank_range(
            *order.step_range(step, self._num_rows, self._batch_size), self._rank, self._world_size
        )
        return order.rank_range(*share, part, parts)

    def _cut_ahead(self, epoch: int, here: Rows, positions: np.ndarray, part: int, parts: int) -> list[Tensor]:
        """The pixels of rows at these positions. Those that wait are taken; others are cut, with their later views."""
        first, last = int(positions[0]), int(positions[-1])
        forward, self._at = (epoch, first) > self._at, (epoch, first)
        self._waiting = {key: x for key, x in self._waiting.items() if forward and key >= self._at}
        lacking = np.flatnonzero([(epoch, at) not in self._waiting for at in positions.tolist()])
        if len(lacking):
            new, wanted = positions[lacking], [here.take(lacking)]
            later = self._mine(self._reader.later_views(epoch, new, after=last), part, parts)
            if len(later):
                wanted.append(self._reader.rows(epoch, later))
            pixels = cut(self._reader.with_images(Rows.concat(wanted)), self._sizes_px, self._interpolation)
            keys = [(epoch, at) for at in (*new.tolist(), *later.tolist())]
            self._waiting |= {key: [x[i].clone() for x in pixels] for i, key in enumerate(keys)}
        taken = [self._waiting.pop((epoch, at)) for at in positions.tolist()]
        return [torch.stack(views) for views in zip(*taken, strict=True)]

    def _mine(self, positions: np.ndarray, part: int, parts: int) -> np.ndarray:
        """Those of the positions that this part of this rank's share of their steps holds."""
        steps = np.minimum(positions // self._batch_size, self.steps_per_epoch - 1).tolist()
        shares = {step: self._share(step, part, parts) for step in set(steps)}
        mine = [shares[step][0] <= at < shares[step][1] for step, at in zip(steps, positions.tolist(), strict=True)]
        return positions[np.array(mine, dtype=bool)]

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
    views_per_visit: int = 1,
    views_together: int = 1,
    cache: ImageCache | None = None,
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
        views_per_visit: at most so many views of an image are cut from one decode; they come in different steps, save
            at the end of a window. See `kddata.order`. 1 is as thorough a shuffle as there is, and the slowest.
        views_together: so many views of an image stand side by side in a step.
        cache: of encoded images, where theirs is far away.

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
        views_per_visit=views_per_visit,
        views_together=views_together,
        cache=cache,
    )
    first = epoch * replay.steps_per_epoch
    steps = range(first + start_step, first + epochs * replay.steps_per_epoch)
    return replay_loader(replay, steps, num_workers=num_workers, pin_memory=pin_memory)


def replay_loader(replay: Replay, steps: range, *, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """A DataLoader over these steps of a replay, in their order.

    Where an image is decoded once for several steps, its worker has it in all of them: every worker cuts a part of each
    step. Else every worker cuts whole steps.
    """
    workers = min(num_workers, replay.fewest_rows)
    if replay.views_per_visit == 1 or workers == 0:
        return step_loader(replay, steps, num_workers=num_workers, pin_memory=pin_memory)
    return _JoiningLoader(_Parts(replay, steps), len(steps), num_workers=workers, pin_memory=pin_memory)


class _Parts(IterableDataset[Batch]):
    """This worker's part of each step."""

    def __init__(self, replay: Replay, steps: range) -> None:
        self._replay, self._steps = replay, steps

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        return (self._replay.part(step, worker.id, worker.num_workers) for step in self._steps)


class _JoiningLoader(DataLoader[Batch]):
    """Steps whose parts come from the workers in turn."""

    def __init__(self, parts: _Parts, num_steps: int, *, num_workers: int, pin_memory: bool) -> None:
        super().__init__(parts, batch_size=None, num_workers=num_workers, worker_init_fn=_one_thread)
        self._num_steps, self._pins = num_steps, pin_memory

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        parts = super().__iter__()
        while group := list(islice(parts, self.num_workers)):
            batch = Batch.cat(group)
            yield batch.pin_memory() if self._pins else batch


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
        highest_label: of these; -1 where there are none.

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
        self._batches, self.num_labelled, self.highest_label = [], 0, -1
        for name in source.shard_names():
            _, refs = source.scan(name)
            labels = [ref.label for ref in refs if ref.label is not None]
            self.num_labelled += len(labels)
            self.highest_label = max(self.highest_label, max(labels, default=-1))
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
