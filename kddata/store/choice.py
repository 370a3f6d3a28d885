"""Choices: some images of a store, all views of each, for training on a part of it. The store is not touched.

What is chosen depends on image ids and ground truth alone, which stand in the image indexes, so that no label shard is
read for it. Trade-off: two bits of memory an image (as two bytes) in each process that reads.

Letters: N images of an image shard, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kddata import rng
from kddata.errors import ConfigError
from kddata.store.store import LabelStore
from kddata.store.units import Unit

Subset = float | tuple[int, ...] | tuple[str, ...]
_NAMED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Which images are chosen: bool [N] for each image shard, `good` for those that were labelled at all."""

    good: tuple[np.ndarray, ...]
    chosen: tuple[np.ndarray, ...]

    def rows(self, unit: Unit) -> np.ndarray:
        """int64: which rows of a unit are chosen, rising. A unit holds its good images in order, all views of each."""
        piece = slice(unit.start, unit.stop)
        places = np.flatnonzero(self.chosen[unit.shard][piece][self.good[unit.shard][piece]])
        return (places[:, None] * unit.num_views + np.arange(unit.num_views)).reshape(-1)

    def rows_per_unit(self, units: Sequence[Unit]) -> np.ndarray:
        """How many rows of each unit are chosen, int64 [U]."""
        counts = [self.chosen[unit.shard][unit.start : unit.stop].sum() * unit.num_views for unit in units]
        return np.array(counts, dtype=np.int64)


def choose(
    store: LabelStore,
    subset: Subset | None = None,
    keep: Callable[[list[str], np.ndarray], np.ndarray] | None = None,
) -> Choice:
    """The images of a subset, less those that `keep` does not keep.

    Args:
        subset: a share in (0, 1], of images drawn by the hash of their ids, so that 10 % is a part of 30 %; or class
            ids; or image ids; None for all.
        keep: called once with the ids and the ground truth of the chosen images; gives a bool for each.

    Raises ConfigError for a share outside (0, 1], a class or an image that the store does not have, and where nothing
    is chosen.
    """
    share = float(subset) if isinstance(subset, (int, float)) else None
    if share is not None and not 0 < share <= 1:
        raise ConfigError("data.subset is a share in (0, 1], or a list of classes or image ids", actual=subset)
    wanted: set[object] = set(subset) if isinstance(subset, (list, tuple)) else set()
    bad = {image_id for image_id, _ in store.info()["bad"]}
    good, chosen, all_ids, all_labels = [], [], [], []
    found: set[object] = set()
    for shard in range(len(store.images)):
        ids, labels = store.image_ids(shard), store.image_labels(shard)
        usable = np.array([image_id not in bad for image_id in ids], dtype=bool)
        if subset is None:
            hit = np.ones(len(ids), dtype=bool)
        elif share is not None:
            hit = np.array([rng.unit_interval(0, "subset", image_id) < share for image_id in ids], dtype=bool)
        else:
            keys: list[object] = list(ids) if wanted and isinstance(next(iter(wanted)), str) else labels.tolist()
            hit = np.array([key in wanted for key in keys], dtype=bool)
            found.update(key for key in keys if key in wanted)
        good.append(usable)
        chosen.append(hit & usable)
        all_ids += [image_id for image_id, one in zip(ids, chosen[-1], strict=True) if one]
        all_labels.append(labels[chosen[-1]])
    missing = sorted(wanted - found, key=str)
    if missing:
        raise ConfigError(
            "data.subset names classes or images of the store",
            actual=f"{len(missing)} that it has not: {', '.join(map(str, missing[:_NAMED]))}",
            where=store.url,
        )
    if keep is not None and all_ids:
        kept = keep(all_ids, np.concatenate(all_labels))
        start = 0
        for mask in chosen:
            count = int(mask.sum())
            mask[mask] = kept[start : start + count]
            start += count
    if not any(mask.any() for mask in chosen):
        raise ConfigError("data.subset leaves at least one image", actual=subset, where=store.url)
    return Choice(good=tuple(good), chosen=tuple(chosen))
