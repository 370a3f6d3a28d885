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
from kddata.images import ImageRef, ImageSource, image_hash, in_order, open_source
from kddata.labels import SoftLabels
from kddata.order import Order, Window, window_rows_for
from kddata.store import Choice, LabelRows, LabelStore, require_members, require_same_rows

_REMOTE_AHEAD = 31  # image shards of a batch that are read from at once: most hold few of its images
_ROW_BYTES = 200  # of a label row in memory, apart from its soft label


def order_of(
    store: LabelStore,
    seed: int,
    choice: Choice | None = None,
    *,
    views_per_visit: int = 1,
    views_together: int = 1,
    batch_size: int = 1,
) -> Order:
    """The order of a store's rows, or of the chosen ones, for a seed. Its windows never depend on the machine."""
    label_bytes = 8 * store.spec.k + 4 * len(store.spec.temperatures)  # int32 ids, float32 log-probabilities
    label_bytes += 2 * sum(output.size for output in store.spec.outputs)
    rows = window_rows_for(_ROW_BYTES + label_bytes)
    return Order(
        rows_per_unit=store.rows_per_unit if choice is None else choice.rows_per_unit(store.units()),
        seed=seed,
        window_rows=rows,
        views_per_unit=store.views_per_unit,
        visit_views=views_per_visit,
        together=views_together,
        batch_size=batch_size,
    )


def open_images(store: LabelStore, images: str | Sequence[str] | None = None) -> ImageSource:
    """The images of a store, where they were when they were labelled, or where `images` says that they lie now.

    Raises SourceError naming the image shards of the store that are not there.
    """
    source = open_source(store.location if images is None else images)
    missing = sorted(set(store.shard_names) - set(source.shard_names()))
    if missing:
        raise SourceError(
            f"images hold all {len(store.images)} image shards of the store",
            actual=f"{len(missing)} missing: {', '.join(missing[:5])}",
            where=source.location,
            fix="point `images` at the place where they lie now, under the names that they had",
        )
    return source


class Rows(NamedTuple):
    """Rows without their images.

    `partner_rows` are the rows that the mixed ones among `rows` are mixed with, in the order of these: None where the
    store's plan does not mix. `others` are the labels of the same rows in other stores.
    """

    rows: LabelRows
    partner_rows: LabelRows | None
    others: list[SoftLabels]

    def take(self, index: np.ndarray) -> Rows:
        """Some of the rows, by number."""
        others = [labels.rows(torch.from_numpy(index)) for labels in self.others]
        if self.partner_rows is None:
            return Rows(self.rows.take(index), None, others)
        assert self.rows.mix is not None
        mixed = np.array([mix is not None for mix in self.rows.mix], dtype=bool)
        place = np.cumsum(mixed) - 1
        return Rows(self.rows.take(index), self.partner_rows.take(place[index][mixed[index]]), others)

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """All rows of at least one part, one part after the other."""
        partners = [part.partner_rows for part in parts if part.partner_rows is not None]
        others = [SoftLabels.cat(list(labels)) for labels in zip(*(part.others for part in parts), strict=True)]
        rows = LabelRows.concat([part.rows for part in parts])
        return Rows(rows, LabelRows.concat(partners) if partners else None, others)


class Read(NamedTuple):
    """`Rows` with the encoded image of each, and of each partner. One image is one object, in however many rows."""

    rows: LabelRows
    images: list[bytes]
    partner_rows: LabelRows | None
    partner_images: list[bytes]
    others: list[SoftLabels]


class _Held(NamedTuple):
    """A window: row i of its pieces laid end to end is `rows[place_W[i]]`; `partner` numbers rows too, -1 for none.

    `places_of_visit`: places in the window, visit by visit, and where in them each visit begins.
    """

    epoch: int
    window: Window
    rows: LabelRows
    place_W: np.ndarray
    partner: np.ndarray | None
    others: list[SoftLabels]
    places_of_visit: tuple[np.ndarray, np.ndarray] | None


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
        places = (source.location,) if isinstance(source.location, str) else source.location
        self._ahead = _REMOTE_AHEAD if any("://" in place for place in places) else 0
        self._held: _Held | None = None

    def read(self, epoch: int, start: int, stop: int) -> Read:
        """The rows at positions start to stop of an epoch, with the encoded image of each, and of each one's partner.

        Raises StoreDamagedError naming a label file, or SourceError naming an image, whose bytes have changed.
        """
        return self.with_images(self.rows(epoch, np.arange(start, stop)))

    def rows(self, epoch: int, positions: np.ndarray) -> Rows:
        """The rows at rising positions of an epoch, at least one. Raises StoreDamagedError naming a label file."""
        parts, done = [], 0
        while done < len(positions):
            held = self._window(epoch, int(positions[done]))
            end = int(np.searchsorted(positions, held.window.stop))
            index = held.place_W[held.window.permutation_W[positions[done:end] - held.window.start]]
            others, lent = [labels.rows(torch.from_numpy(index)) for labels in held.others], None
            if held.partner is not None:
                partner = held.partner[index]
                lent = held.rows.take(partner[partner >= 0])
            parts.append(Rows(held.rows.take(index), lent, others))
            done = end
        return Rows.concat(parts)

    def with_images(self, rows: Rows) -> Read:
        """These rows with their images. Raises SourceError naming an image whose bytes have changed."""
        if rows.partner_rows is None:
            return Read(rows.rows, self._images(rows.rows), None, [], rows.others)
        images = self._images(LabelRows.concat([rows.rows, rows.partner_rows]))
        size = len(rows.rows)
        return Read(rows.rows, images[:size], rows.partner_rows, images[size:], rows.others)

    def later_views(self, epoch: int, positions: np.ndarray, *, after: int) -> np.ndarray:
        """Rising positions of the rows after one of them that share a visit with any of these, which are not after it.

        A visit lies in one window. Empty where each row is a visit.
        """
        held = self._window(epoch, after)
        window, visits = held.window, held.places_of_visit
        inside = positions[positions >= window.start]
        if window.visit_W is None or visits is None or not len(inside):
            return np.empty(0, dtype=np.int64)
        places, begin = visits
        here = np.unique(window.visit_W[inside - window.start]).tolist()
        later = window.start + np.concatenate([places[begin[v] : begin[v + 1]] for v in here])
        return np.sort(later[later > after])

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
            None if window.visit_W is None else _places(window.visit_W),
        )
        return self._held

    @staticmethod
    def _read_other(other: LabelStore, unit: int, rows: LabelRows) -> SoftLabels:
        found = other.read(unit, outputs=())
        require_same_rows(rows, found, where=f"unit {unit} of {other.url}")
        return found.labels

    def _images(self, rows: LabelRows) -> list[bytes]:
        """The image of each row, each image read once, by shard and place; remote shards are read abreast."""
        found: list[bytes] = [b""] * len(rows)
        groups: list[tuple[str, list[ImageRef], dict[str, list[int]]]] = []
        by_place = np.lexsort((rows.offset, rows.source))
        borders = np.flatnonzero(np.diff(rows.source[by_place])) + 1
        for group in np.split(by_place, borders):
            if not len(group):
                continue
            name = self._store.images[int(rows.source[group[0]])].name
            users: dict[str, list[int]] = {}
            for i in group.tolist():
                users.setdefault(rows.image_id[i], []).append(i)
            refs = [
                ImageRef(image_id=image_id, label=None, offset=int(rows.offset[i]), length=int(rows.length[i]))
                for image_id, (i, *_) in users.items()
            ]
            groups.append((name, refs, users))
        read = in_order(lambda group: list(self._source.stream(group[0], group[1])), groups, ahead=self._ahead)
        for (name, _, users), images in zip(groups, read, strict=True):
            for ref, data in images:
                wanted = users[ref.image_id]
                if (rows.image_hash[wanted] != np.uint64(image_hash(data))).any():
                    raise SourceError(
                        "an image is the one that was labelled",
                        actual=f"other bytes under {ref.image_id!r}",
                        where=name,
                        fix="point `images` at the images that were labelled, or label these into a new store",
                    )
                for i in wanted:
                    found[i] = data
        return found


def _places(visit_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.argsort(visit_W, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(visit_W))])
