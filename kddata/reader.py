"""Reader: the label rows of a store, in an order, joined with the bytes of their images by recorded place.

It is random access by position in an epoch and has no state worth saving: a checkpoint holds the position alone, and
means the same row for any number of workers. One window of label rows is held (of mixed views, with the rest of the
units that it cuts, since a partner may lie there), and the images of one call. Every label file is checked against its
SHA-256 when its window is loaded, and every image against the hash of the bytes that were labelled, before either is
used.

Trade-off: hashing each image at each visit costs about 1 us per KiB, so that no changed image meets a wrong label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kddata.errors import SourceError
from kddata.images import ImageRef, ImageSource, image_hash, open_source
from kddata.labels import SoftLabels
from kddata.order import Order, Window, window_rows_for
from kddata.store import Choice, LabelRows, LabelStore, require_members, require_same_rows

_ROW_BYTES = 200  # of a label row in memory, apart from its soft label


def order_of(store: LabelStore, seed: int, choice: Choice | None = None) -> Order:
    """The order of a store's rows, or of the chosen ones, for a seed. Its windows never depend on the machine."""
    label_bytes = 8 * store.spec.k + 4 * len(store.spec.temperatures)  # int32 ids, float32 log-probabilities
    label_bytes += 2 * sum(output.size for output in store.spec.outputs)
    rows = window_rows_for(_ROW_BYTES + label_bytes)
    return Order(
        rows_per_unit=store.rows_per_unit if choice is None else choice.rows_per_unit(store.units()),
        seed=seed,
        window_rows=rows,
    )


def open_images(store: LabelStore, images: str | Sequence[str] | None = None) -> ImageSource:
    """The images of a store, where they were when they were labelled, or where `images` says that they lie now.

    Raises SourceError naming the image shards of the store that are not there.
    """
    source = open_source(store.location if images is None else images)
    missing = sorted({shard.name for shard in store.images} - set(source.shard_names()))
    if missing:
        raise SourceError(
            f"images hold all {len(store.images)} image shards of the store",
            actual=f"{len(missing)} missing: {', '.join(missing[:5])}",
            where=source.location,
            fix="point `images` at the place where they lie now, under the names that they had",
        )
    return source


class Read(NamedTuple):
    """Rows with their images.

    `partner_rows` are the rows that the mixed ones among `rows` are mixed with, in the order of these: None where the
    store's plan does not mix. Images are encoded, one a row. `others` are the labels of the same rows in other stores.
    """

    rows: LabelRows
    images: list[bytes]
    partner_rows: LabelRows | None
    partner_images: list[bytes]
    others: list[SoftLabels]


class _Held(NamedTuple):
    """A window: row i of its pieces laid end to end is `rows[place_W[i]]`; `partner` numbers rows too, -1 for none."""

    epoch: int
    window: Window
    rows: LabelRows
    place_W: np.ndarray
    partner: np.ndarray | None
    others: list[SoftLabels]


class Reader:
    """Label rows and image bytes at positions of an epoch. Owns the window that was read last."""

    def __init__(
        self,
        store: LabelStore,
        source: ImageSource,
        order: Order,
        *,
        outputs: Sequence[str] = (),
        others: Sequence[LabelStore] = (),
        choice: Choice | None = None,
    ) -> None:
        require_members(store, others)
        self._store, self._source, self._order, self._outputs = store, source, order, tuple(outputs)
        self._others, self._choice = list(others), choice
        self._held: _Held | None = None

    def read(self, epoch: int, start: int, stop: int) -> Read:
        """The rows at positions start to stop of an epoch, with the encoded image of each, and of each one's partner.

        Raises StoreDamagedError naming a label file, or SourceError naming an image, whose bytes have changed.
        """
        parts, partners = [], []
        others: list[list[SoftLabels]] = [[] for _ in self._others]
        while start < stop:
            held = self._window(epoch, start)
            end = min(stop, held.window.stop)
            index = held.place_W[held.window.permutation_W[start - held.window.start : end - held.window.start]]
            parts.append(held.rows.take(index))
            for labels, found in zip(others, held.others, strict=True):
                labels.append(found.rows(torch.from_numpy(index)))
            if held.partner is not None:
                partner = held.partner[index]
                partners.append(held.rows.take(partner[partner >= 0]))
            start = end
        rows, joined = LabelRows.concat(parts), [SoftLabels.cat(labels) for labels in others]
        if not partners:
            return Read(rows, self._images(rows), None, [], joined)
        lent = LabelRows.concat(partners)
        images = self._images(LabelRows.concat([rows, lent]))
        return Read(rows, images[: len(rows)], lent, images[len(rows) :], joined)

    def _window(self, epoch: int, position: int) -> _Held:
        held = self._held
        if held is not None and held.epoch == epoch and held.window.start <= position < held.window.stop:
            return held
        self._held = held = None  # never two windows in memory
        window, mixed = self._order.window_at(epoch, position), self._store.spec.plan.has_mix
        kept, places, partners, size = [], [], [], 0
        others: list[list[SoftLabels]] = [[] for _ in self._others]
        for unit, first, last in window.pieces:
            rows = self._store.read(unit, outputs=self._outputs)
            theirs = [self._read_other(other, unit, rows) for other in self._others]
            chosen = np.arange(len(rows)) if self._choice is None else self._choice.rows(self._store.units()[unit])
            chosen = chosen[first:last]
            if mixed:
                partner = rows.partners()
                partners.append(np.where(partner < 0, -1, partner + size))
                places.append(size + chosen)
            else:
                rows, theirs = rows.take(chosen), [x.rows(torch.from_numpy(chosen)) for x in theirs]
                places.append(np.arange(size, size + len(rows)))
            kept.append(rows)
            for labels, found in zip(others, theirs, strict=True):
                labels.append(found)
            size += len(rows)
        self._held = _Held(
            epoch,
            window,
            LabelRows.concat(kept),
            np.concatenate(places),
            np.concatenate(partners) if mixed else None,
            [SoftLabels.cat(labels) for labels in others],
        )
        return self._held

    @staticmethod
    def _read_other(other: LabelStore, unit: int, rows: LabelRows) -> SoftLabels:
        found = other.read(unit, outputs=())
        require_same_rows(rows, found, where=f"unit {unit} of {other.url}")
        return found.labels

    def _images(self, rows: LabelRows) -> list[bytes]:
        """The image of each row, read shard by shard in the order of the bytes."""
        found: list[bytes] = [b""] * len(rows)
        by_place = np.lexsort((rows.offset, rows.source))
        borders = np.flatnonzero(np.diff(rows.source[by_place])) + 1
        for group in np.split(by_place, borders):
            name = self._store.images[int(rows.source[group[0]])].name
            refs = [
                ImageRef(image_id=rows.image_id[i], label=None, offset=int(rows.offset[i]), length=int(rows.length[i]))
                for i in group.tolist()
            ]
            for i, (ref, data) in zip(group.tolist(), self._source.stream(name, refs), strict=True):
                if image_hash(data) != int(rows.image_hash[i]):
                    raise SourceError(
                        "an image is the one that was labelled",
                        actual=f"other bytes under {ref.image_id!r}",
                        where=name,
                        fix="point `images` at the images that were labelled, or label these into a new store",
                    )
                found[i] = data
        return found
