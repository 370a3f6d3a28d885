"""Order: which rows of a store, in which order, for (seed, epoch), and how steps and ranks share them. Pure functions.

Units are shuffled and laid end to end; that sequence is cut into even windows; rows are shuffled fully inside each
window. So any position is found without walking to it, one window of label rows is all that a reader holds, and
neither the order nor the steps depend on how many workers take part. Nothing here reads a store.

With `visit_views` m > 1, up to m views of an image, a visit, stand where one decode can serve them: in one column (a
position in its step, so that one rank, and one of its workers, has them all), in m of 4 m steps in a row, at random.
Visits are shuffled as fully inside a window as rows are. At the end of a window, in less than m steps, a visit takes
neighbouring columns, and some of its views share a step.

With `together` m > 1 it is the other way round: m views of an image stand side by side in one step, for losses that
compare them, and such groups are shuffled as rows are otherwise.

Trade-off: a window is not a full permutation. Two rows of one unit are at most a window apart (the unit may straddle
two), and rows that were stored far apart share a window by chance alone. The whole epoch in one window is a full one:
two neighbours in a unit come W / 3 rows apart in the mean, as in any permutation. Two views of one visit that follow
each other come (4 m + 1) / (m + 1) steps apart in the mean, and 4 m - 1 at most where all visits have m views, which is
what bounds the views that are cut and wait: 4 m (1/2 - 1 / (m + 1)) steps of them in the mean.

Letters: U units, W rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kddata import rng
from kddata.errors import ConfigError

WINDOW_ROWS = 1 << 18
_WINDOW_BYTES = 1 << 28
_RUN_VISITS = 4  # visits that share a column for a run of steps
_LAST_STEP_ROWS = 16  # eight ranks still have the two rows each that BatchNorm needs


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some rows that are shuffled together.

    Attributes:
        start: position in the epoch of its first row.
        pieces: (unit, first row, last row + 1) of what it is made of; laid end to end they are its W rows.
        permutation_W: row i of the window is row `permutation_W[i]` of the pieces.
        visit_W: number of the visit that row i of the window belongs to; None where each row is a visit.
    """

    start: int
    pieces: tuple[tuple[int, int, int], ...]
    permutation_W: np.ndarray
    visit_W: np.ndarray | None = None

    @property
    def stop(self) -> int:
        """Position in the epoch after its last row."""
        return self.start + len(self.permutation_W)


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """The order of all epochs over a store.

    Attributes:
        rows_per_unit: how many rows each unit holds, int64 [U]; some may hold none.
        seed: other seeds, and other epochs of one seed, have unrelated orders.
        window_rows: at most so many rows are shuffled together.
        views_per_unit: views of each image of a unit, int64 [U]; its rows are image after image. None: 1 each.
        visit_views: at most so many views of an image share a visit.
        batch_size: rows of a step, which matters where visit_views (visits keep to a column) or together is above 1.
        together: so many views of an image share a step, side by side.
    """

    rows_per_unit: np.ndarray
    seed: int
    window_rows: int = WINDOW_ROWS
    views_per_unit: np.ndarray | None = None
    visit_views: int = 1
    batch_size: int = 1
    together: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows_per_unit", np.asarray(self.rows_per_unit, dtype=np.int64))
        if self.rows_per_unit.ndim != 1 or (self.rows_per_unit < 0).any() or self.num_rows == 0:
            raise ConfigError("an order is over at least one row", actual=f"{self.rows_per_unit.tolist()[:8]} a unit")
        if self.window_rows < 1:
            raise ConfigError("window_rows is at least 1", actual=self.window_rows)
        if self.visit_views < 1:
            raise ConfigError("data.views_per_visit is at least 1", actual=self.visit_views)
        _check_batch_size(self.batch_size)
        self._check_together()

    def _check_together(self) -> None:
        if self.together < 1 or (self.together > 1 and self.visit_views > 1):
            raise ConfigError(
                "data.views_together is at least 1, and 1 where data.views_per_visit is above 1",
                actual=f"{self.together} and {self.visit_views}",
            )
        views = np.ones(1, dtype=np.int64) if self.views_per_unit is None else self.views_per_unit
        for name, values in (("the views of an image in a unit", views), ("data.batch_size", [self.batch_size])):
            if any(value % self.together for value in np.unique(values).tolist()):
                raise ConfigError(
                    f"data.views_together divides {name}",
                    actual=f"{self.together} and {sorted(set(map(int, values)))}",
                    fix="use another number, or label with views.per_image, and units.views, that it divides",
                )

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.rows_per_unit.sum())

    @property
    def num_windows(self) -> int:
        """Windows of an epoch; they differ in length by one row, or group of rows, at most."""
        return -(-self.num_rows // self.window_rows)

    def window_at(self, epoch: int, position: int) -> Window:
        """The window that holds a position of an epoch. Cost: O(U log U + W), wherever it lies."""
        if not 0 <= position < self.num_rows:
            raise ValueError(f"position {position} is outside an epoch of {self.num_rows} rows")
        m = self.together
        groups = self.num_rows // m
        index = ((position // m + 1) * self.num_windows - 1) // groups
        start, stop = (groups * i // self.num_windows * m for i in (index, index + 1))
        assert start <= position < stop
        units = _permutation(len(self.rows_per_unit), self.seed, "units", epoch)
        ends = np.cumsum(self.rows_per_unit[units])
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        pieces = []
        for place in range(int(first), int(last) + 1):
            unit, end = int(units[place]), int(ends[place])
            begin = end - int(self.rows_per_unit[unit])
            if begin < end:
                pieces.append((unit, max(start, begin) - begin, min(stop, end) - begin))
        if self.visit_views == 1:
            group_G = _permutation((stop - start) // m, self.seed, "rows", epoch, index)
            permutation_W = (m * group_G[:, None] + np.arange(m)).reshape(-1)
            return Window(start=start, pieces=tuple(pieces), permutation_W=permutation_W)
        row_visit_W = self._visits(pieces)
        random = rng.stream(self.seed, "order", "visits", epoch, index).random
        places_W, rows_W = _shuffled_visits(row_visit_W, self.batch_size, random)
        permutation_W = np.empty(stop - start, dtype=np.int64)
        permutation_W[places_W] = rows_W
        return Window(
            start=start, pieces=tuple(pieces), permutation_W=permutation_W, visit_W=row_visit_W[permutation_W]
        )

    def _visits(self, pieces: list[tuple[int, int, int]]) -> np.ndarray:
        """int64 [W]: the visit of each row of the pieces, rising from 0. The views of an image are split evenly."""
        found, count = [], 0
        for unit, first, last in pieces:
            views = 1 if self.views_per_unit is None else int(self.views_per_unit[unit])
            parts, row = -(-views // self.visit_views), np.arange(first, last)
            visit = row // views * parts + row % views * parts // views
            found.append(count + np.cumsum(np.diff(visit, prepend=visit[0]) > 0))
            count = int(found[-1][-1]) + 1
        return np.concatenate(found)

    def rows(self, epoch: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [N, 2]: (unit, row in it) at positions start to stop of an epoch. The clear form of what readers do."""
        stop, parts = self.num_rows if stop is None else stop, []
        while start < stop:
            window = self.window_at(epoch, start)
            laid = np.concatenate([[(unit, row) for row in range(a, b)] for unit, a, b in window.pieces])
            end = min(stop, window.stop)
            parts.append(laid[window.permutation_W][start - window.start : end - window.start])
            start = end
        return np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.int64)


def window_rows_for(row_bytes: int) -> int:
    """How many rows of this size are shuffled together: 2^18, less where they would fill more than 256 MiB."""
    return max(1, min(WINDOW_ROWS, _WINDOW_BYTES // row_bytes))


def num_steps(num_rows: int, batch_size: int) -> int:
    """Steps of an epoch. `batch_size` counts the rows of a step over all ranks.

    A remainder under max(16, batch_size / 8) rows is too small for BatchNorm on several ranks and joins the step
    before it. An epoch shorter than one batch is one step.
    """
    _check_batch_size(batch_size)
    whole, remainder = divmod(num_rows, batch_size)
    return max(1, whole + (remainder >= max(_LAST_STEP_ROWS, batch_size // 8)))


def step_range(step: int, num_rows: int, batch_size: int) -> tuple[int, int]:
    """(start, stop) positions in the epoch of one step's rows."""
    steps = num_steps(num_rows, batch_size)
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside an epoch of {steps} steps")
    return step * batch_size, num_rows if step == steps - 1 else (step + 1) * batch_size


def rank_range(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, stop) of one rank's share of a step: contiguous, and even to one row."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    rows = stop - start
    return start + rows * rank // world_size, start + rows * (rank + 1) // world_size


def _permutation(n: int, seed: int, *key: int | str) -> np.ndarray:
    """int64 [n]. By sorting random numbers, since numpy may change how `permutation` consumes its stream."""
    return np.argsort(rng.stream(seed, "order", *key).random(n), kind="stable")


def _shuffled_visits(
    visit_W: np.ndarray, batch_size: int, random: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, ...]:
    """(places_W, rows_W): row rows_W[i] of the pieces stands at place places_W[i] of the window.

    Columns are cut into runs of 4 visits' rows; the runs of neighbouring columns start at different steps, so that
    every step begins as many visits as any other. Visits in random order fill the runs in random order.
    """
    num_rows, sizes = len(visit_W), np.bincount(visit_W)
    size = int(np.bincount(sizes).argmax())  # most visits have it; the others fill what these leave
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.lexsort((random(len(sizes)), sizes != size))] = np.arange(len(sizes))
    rows_W = np.lexsort((random(num_rows), rank[visit_W]))

    place_W = np.arange(num_rows)
    step_W, column_W = place_W // batch_size, place_W % batch_size
    steps_W = (num_rows - 1 - column_W) // batch_size + 1  # of the place's column
    in_run_W = step_W < steps_W // size * size
    run_W = (step_W + size * (column_W % _RUN_VISITS)) // (_RUN_VISITS * size) * batch_size + column_W
    in_runs, rest = place_W[in_run_W], place_W[~in_run_W]
    turn_of_run = random(int(run_W.max()) + 1)
    in_runs = in_runs[np.lexsort((random(len(in_runs)), turn_of_run[run_W[in_runs]]))]
    rest = rest[np.argsort(column_W[rest], kind="stable")]
    return np.concatenate([in_runs, rest]), rows_W


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError("data.batch_size is at least 1", actual=batch_size)
