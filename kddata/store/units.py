"""Units: what one label shard covers, and the plan of all of them, as arithmetic instead of a list.

Trade-off: a unit is made anew each time that it is asked for, at about 2 us, so that a million of them take no room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What one label shard covers: images `start` to `stop` of an image shard, views `view_start` to `view_stop`.

    `piece` numbers the stretches of images of its image shard.
    """

    number: int
    shard: int
    piece: int
    start: int
    stop: int
    view_start: int
    view_stop: int

    @property
    def num_views(self) -> int:
        return self.view_stop - self.view_start


class PlannedUnits(Sequence[Unit]):
    """All units: for each image shard, for each piece of it, for each view range. Memory: a few numbers a shard.

    Args:
        num_images: of each image shard.
        views: (first, one past the last) view of each image shard.
        unit_images, unit_views: most images and views of a unit; None for all views.
        first_number: of the first unit.
    """

    def __init__(
        self,
        num_images: Sequence[int],
        *,
        views: Sequence[tuple[int, int]],
        unit_images: int,
        unit_views: int | None,
        first_number: int = 0,
    ) -> None:
        self._num_images, self._views, self._unit_images = list(num_images), list(views), unit_images
        self._steps = [unit_views or max(1, stop - first) for first, stop in views]
        self._ranges = [
            -(-max(0, stop - first) // step) for (first, stop), step in zip(views, self._steps, strict=True)
        ]
        counts = [-(-n // unit_images) * ranges for n, ranges in zip(self._num_images, self._ranges, strict=True)]
        self._ends, self._first_number = np.cumsum(counts, dtype=np.int64), first_number

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Unit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...

    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"unit {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return self._unit(place, shard, place - before)

    def __iter__(self) -> Iterator[Unit]:
        place = 0
        for shard, end in enumerate(self._ends.tolist()):
            for within in range(end - place):
                yield self._unit(place + within, shard, within)
            place = end

    def _unit(self, place: int, shard: int, within: int) -> Unit:
        piece, view_range = divmod(within, self._ranges[shard])
        (first, stop), step, start = self._views[shard], self._steps[shard], piece * self._unit_images
        return Unit(
            number=self._first_number + place,
            shard=shard,
            piece=piece,
            start=start,
            stop=min(start + self._unit_images, self._num_images[shard]),
            view_start=first + view_range * step,
            view_stop=min(first + (view_range + 1) * step, stop),
        )
