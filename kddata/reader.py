"""Reader: the label rows of a store, in an order, joined with the bytes of their images by recorded place.

It is random access by position in an epoch and has no state worth saving: a checkpoint holds the position alone, and
means the same row for any number of workers. One window of label rows is held, and the images of one call. Every
label file is checked against its SHA-256 when its window is loaded, and every image against the hash of the bytes
that were labelled, before either is used.

Trade-off: hashing each image at each visit costs about 1 us per KiB, so that no changed image meets a wrong label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kddata.errors import SourceError
from kddata.images import ImageRef, ImageSource, image_hash, open_source
from kddata.order import Order, Window, window_rows_for
from kddata.store import LabelRows, LabelStore

_ROW_BYTES = 200  # of a label row in memory, apart from its soft label


def order_of(store: LabelStore, seed: int) -> Order:
    """The order of a store's rows for a seed. Its windows depend on the store alone, never on the machine."""
    label_bytes = 8 * store.spec.k + 4 * len(store.spec.temperatures)  # int32 ids, float32 log-probabilities
    rows = window_rows_for(_ROW_BYTES + label_bytes)
    return Order(rows_per_unit=store.rows_per_unit, seed=seed, window_rows=rows)


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


class Reader:
    """Label rows and image bytes at positions of an epoch. Owns the window that was read last."""

    def __init__(self, store: LabelStore, source: ImageSource, order: Order) -> None:
        self._store, self._source, self._order = store, source, order
        self._held: tuple[int, Window, LabelRows] | None = None

    def read(self, epoch: int, start: int, stop: int) -> tuple[LabelRows, list[bytes]]:
        """The rows at positions start to stop of an epoch, and the encoded image of each.

        Raises StoreDamagedError naming a label file, or SourceError naming an image, whose bytes have changed.
        """
        parts = []
        while start < stop:
            window, rows = self._window(epoch, start)
            end = min(stop, window.stop)
            parts.append(rows.take(window.permutation_W[start - window.start : end - window.start]))
            start = end
        rows = parts[0] if len(parts) == 1 else LabelRows.concat(parts)
        return rows, self._images(rows)

    def _window(self, epoch: int, position: int) -> tuple[Window, LabelRows]:
        if self._held is not None:
            held_epoch, window, rows = self._held
            if held_epoch == epoch and window.start <= position < window.stop:
                return window, rows
            self._held = None  # never two windows in memory
        window = self._order.window_at(epoch, position)
        pieces = [self._store.read(unit).take(slice(first, last)) for unit, first, last in window.pieces]
        rows = LabelRows.concat(pieces)
        self._held = (epoch, window, rows)
        return window, rows

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
