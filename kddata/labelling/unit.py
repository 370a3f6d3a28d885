"""One unit: its images are read, decoded, cut into views, answered and written as one label shard.

Trade-off: a unit streams through one thread that decodes and cuts and one that asks the teacher; more speed comes from
more processes.

Shapes: B rows of a batch, C classes, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kddata import boundary, rng
from kddata.cards import Output, StoreSpec
from kddata.errors import BadImageError, StoreMismatchError, TeacherError
from kddata.images import ImageRef, ImageSource, decode, image_again, image_hash
from kddata.labelling.attacks import boundary_outputs
from kddata.labelling.mixing import Partners
from kddata.store import LabelRows, LabelStore, Receipt, Unit
from kddata.store.rows import objects
from kddata.teacher import Answers
from kddata.views import View, ViewPlan, pixel_hash, render

_HASHED_SHARE = 1 / 64
_NAMED = 5
_T = TypeVar("_T")


def label_unit(
    store: LabelStore,
    unit: Unit,
    source: ImageSource,
    teacher: Answers,
    *,
    max_pixels: int = 100_000_000,
    restore: bool = False,
) -> Receipt:
    """Labels one unit and publishes its shard; memory is bounded by two batches and one image, whatever the unit.

    Each image is read and decoded once for all views of the unit. Where views are mixed, it is read again as a partner,
    and up to 256 MiB of decoded images are kept; see `mixing`. One that cannot be used is left out and listed in the
    receipt with the reason.

    Args:
        restore: write the shard of a committed store again, if that gives the bytes that it had.

    Raises TeacherError for answers of another width or that are not finite, naming images; SourceError for images that
    are no longer what was indexed; StoreMismatchError for another teacher than the store's. Nothing is published then.
    """
    if teacher.card != store.spec.teacher:
        raise StoreMismatchError(
            "a store is labelled by the one teacher of its spec",
            actual=f"{teacher.card.arch}, weights {teacher.card.weights_sha256[:12]}",
            where=store.url,
            fix="name another store, or the teacher it was begun with",
        )
    bad: list[tuple[str, str]] = []
    views = _cut(store, unit, source, max_pixels=max_pixels, bad=bad)
    batches = _one_ahead(_batched(views, store.spec.batch_size))
    write = store.restore_unit if restore else store.write_unit
    rows = (_answer(store.spec, unit, batch, teacher) for batch in batches)
    return write(unit, rows, bad=bad, image_bytes=image_again(source, store.images[unit.shard].name))


class _Cut(NamedTuple):
    """One view, cut: all of its row but the teacher's answer, and its pixels, uint8 [3, S, S]."""

    ref: ImageRef
    view_index: int
    view: View
    image_hash: int
    pixel_hash: int | None
    pixels: Tensor


def _cut(
    store: LabelStore, unit: Unit, source: ImageSource, *, max_pixels: int, bad: list[tuple[str, str]]
) -> Iterator[_Cut]:
    """The views of a unit, image after image; images that cannot be used are added to `bad`."""
    spec, first = store.spec, True
    refs = [
        ImageRef(image_id=image_id, label=label, offset=offset, length=length)
        for image_id, label, offset, length in zip(*store.read_index(unit), strict=True)
    ]
    shard_name, size_px = store.images[unit.shard].name, spec.teacher.size_px
    partners = Partners(spec, source, shard_name, refs, max_pixels=max_pixels)
    for ref, data in source.stream(shard_name, refs):
        try:
            image = decode(data, max_pixels=max_pixels)
            views = _draw(spec.plan, unit, ref.image_id, image, max_pixels)
        except BadImageError as error:
            bad.append((ref.image_id, str(error)))
            continue
        digest = image_hash(data)
        for view_index, view in views:
            mix, partner = partners.of(ref.image_id, view_index)
            view = replace(view, mix=mix)
            pixels = render(image, view, size_px=size_px, interpolation=spec.plan.interpolation, partner=partner)
            hashed = first or hashed_by_draw(ref.image_id, view_index)
            first = False
            yield _Cut(ref, view_index, view, digest, pixel_hash(pixels) if hashed else None, pixels)


def hashed_by_draw(image_id: str, view_index: int) -> bool:
    """Whether the pixels of a view are hashed by the draw; those of the first row of a unit are in any case."""
    return rng.unit_interval(0, "pixel hash", image_id, view_index) < _HASHED_SHARE


def _draw(plan: ViewPlan, unit: Unit, image_id: str, image: Tensor, max_pixels: int) -> list[tuple[int, View]]:
    _, height, width = image.shape
    views = [(k, plan.draw(image_id, k, height, width)) for k in range(unit.view_start, unit.view_stop)]
    for _, view in views:  # a thin strip of few pixels becomes a huge one when its short side is resized
        if view.resize is not None and view.resize[0] * view.resize[1] > max_pixels:
            raise BadImageError(
                f"an image resized for its view has at most {max_pixels} pixels (limits.pixels)",
                actual=f"{width} x {height}, resized to {view.resize[1]} x {view.resize[0]}",
            )
    return views


def _answer(spec: StoreSpec, unit: Unit, batch: list[_Cut], teacher: Answers) -> LabelRows:
    """The rows of a batch of views."""
    pixels = torch.stack([cut.pixels for cut in batch])
    outputs: dict[str, Tensor] = {}
    if spec.outputs:
        logits_BC, outputs = teacher.answer(pixels)
    else:
        logits_BC = teacher(pixels)
    wanted = (len(batch), spec.teacher.num_classes)
    if tuple(logits_BC.shape) != wanted:
        raise TeacherError(
            f"a teacher of {wanted[1]} classes answers {wanted[0]} views with logits of shape {wanted}",
            actual=tuple(logits_BC.shape),
            where=spec.teacher.arch,
        )
    finite_B = torch.isfinite(logits_BC.amax(1))  # -inf in some classes is an answer; NaN passes through amax
    if not bool(finite_B.all()):
        named = [
            f"{cut.ref.image_id} (view {cut.view_index})" for cut, ok in zip(batch, finite_B, strict=True) if not ok
        ]
        raise TeacherError(
            "a teacher's logits are finite, or -inf in some classes",
            actual=f"NaN or infinity for {', '.join(named[:_NAMED])}{', ...' if len(named) > _NAMED else ''}",
            where=f"unit {unit.number}, {spec.teacher.arch}",
            fix="check its weights, mean and std",
        )
    image_ids, views = [cut.ref.image_id for cut in batch], [cut.view_index for cut in batch]
    if any(output.name in boundary.NAMES for output in spec.outputs):
        outputs |= boundary_outputs(spec, teacher, pixels, logits_BC, image_ids, views)
    resized = spec.plan.policy == "center"
    return LabelRows(
        image_id=image_ids,
        view=np.array(views),
        label=np.array([-1 if cut.ref.label is None else cut.ref.label for cut in batch]),
        labels=spec.labels_of(logits_BC, image_ids, views),
        box=np.array([cut.view.box for cut in batch]),
        flip=np.array([cut.view.flip for cut in batch]),
        resize=np.array([cut.view.resize for cut in batch]) if resized else None,
        ops=objects([cut.view.ops for cut in batch]) if spec.plan.has_ops else None,
        mix=objects([cut.view.mix for cut in batch]) if spec.plan.has_mix else None,
        source=np.full(len(batch), unit.shard),
        offset=np.array([cut.ref.offset for cut in batch]),
        length=np.array([cut.ref.length for cut in batch]),
        image_hash=np.array([cut.image_hash for cut in batch], dtype=np.uint64),
        pixel_hash=np.array([cut.pixel_hash or 0 for cut in batch], dtype=np.uint64),
        has_pixel_hash=np.array([cut.pixel_hash is not None for cut in batch]),
        outputs={output.name: _half(outputs[output.name], output, batch, spec) for output in spec.outputs},
    )


def _half(value: Tensor, output: Output, batch: list[_Cut], spec: StoreSpec) -> np.ndarray:
    """An output as it is stored. Raises TeacherError for another shape, or for what float16 cannot hold."""
    half = value.half()
    wanted, where = (len(batch), *output.shape), f"output {output.name} of {spec.teacher.arch}"
    if tuple(half.shape) != wanted:
        raise TeacherError(
            "an output has one shape for all views", actual=f"{tuple(half.shape)}, not {wanted}", where=where
        )
    finite_B = torch.isfinite(half.flatten(1)).all(1)
    if not bool(finite_B.all()):
        worst = int((~finite_B).nonzero()[0])
        raise TeacherError(
            "outputs are stored as float16, up to 65504",
            actual=f"{value[worst].abs().max().item():g} for image {batch[worst].ref.image_id}",
            where=where,
            fix="name an output of smaller values, such as attention or another node",
        )
    return half.numpy()


def _batched(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, the next one made in a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item
