"""Tally: checks, while the rows of a unit pass by, that they are the unit's rows, and counts what its receipt says.

What is counted is what is stored, with the codec's rounding, so that a shard that is written again counts the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kddata.errors import StoreError
from kddata.store.rows import LabelRows
from kddata.store.units import Unit


class Tally:
    """What has passed by so far: `rows`, `images`, and the sums that `Receipt` describes."""

    def __init__(self, unit: Unit, *, where: str) -> None:
        self._unit, self._where = unit, where
        self._seen: set[str] = set()
        self._last = ""
        self._passed = self.rows = self.correct = self.labelled = 0
        self.entropy_sum = self.tail_sum = 0.0

    @property
    def images(self) -> int:
        return len(self._seen)

    def watch(self, batches: Iterable[LabelRows]) -> Iterator[LabelRows]:
        """The same batches. Raises StoreError for rows that are not image after image with all views, rising."""
        for rows in batches:
            self._check(rows)
            self._passed += len(rows)
            yield rows

    def close(self, bad: Sequence[tuple[str, str]]) -> None:
        """Raises StoreError unless every image of the unit has passed with all of its views, or is listed as bad."""
        unit = self._unit
        count = unit.stop - unit.start
        left_out = {image_id for image_id, _ in bad}
        if self.images + len(left_out) != count or len(left_out) != len(bad) or self._seen & left_out:
            raise StoreError(
                f"each of a unit's {count} images is labelled or bad, once",
                actual=f"{self.images} labelled, {len(bad)} bad",
                where=self._where,
            )
        if self.rows != self.images * unit.num_views:
            raise StoreError(
                f"each image of a unit has {unit.num_views} rows",
                actual=f"{self.rows} rows of {self.images} images",
                where=self._where,
            )

    def _check(self, rows: LabelRows) -> None:
        unit = self._unit
        position_B = (self._passed + np.arange(len(rows))) % unit.num_views
        if not np.array_equal(rows.view, unit.view_start + position_B) or (rows.source != unit.shard).any():
            raise StoreError(
                f"rows of a unit come image after image, each with views {unit.view_start} to {unit.view_stop - 1}, "
                f"from image shard {unit.shard}",
                actual=f"views {rows.view[:8].tolist()}..., image shards {np.unique(rows.source).tolist()}",
                where=self._where,
            )
        for image_id, position in zip(rows.image_id, position_B.tolist(), strict=True):
            if position == 0 and image_id in self._seen:
                raise StoreError("an image comes once in a unit", actual=repr(image_id), where=self._where)
            if position > 0 and image_id != self._last:
                raise StoreError(
                    "views of one image stand together", actual=f"{self._last!r}, {image_id!r}", where=self._where
                )
            self._seen.add(image_id)
            self._last = image_id

    def count(self, rows: LabelRows) -> None:
        """Adds rows as they will be read."""
        self.rows += len(rows)
        known = rows.label >= 0
        self.labelled += int(known.sum())
        self.correct += int((known & (rows.labels.ids_BK[:, 0].numpy() == rows.label)).sum())
        log_p = rows.labels.log_p_BK.double().numpy()
        tail = rows.labels.log_tail_BT[:, rows.labels.temperatures.index(1.0)].double().numpy()
        self.tail_sum += float(np.exp(tail).sum())
        log_all = np.concatenate([log_p, tail[:, None]], axis=1)
        p_all = np.exp(log_all)
        self.entropy_sum -= float((p_all * np.where(p_all > 0, log_all, 0.0)).sum())
