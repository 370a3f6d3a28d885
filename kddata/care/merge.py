"""Merge: finished stores of one spec, labelled apart, become one: over disjoint image shards, or disjoint views.

The rows are written again, unit by unit, as the units of the store that would have come of labelling all at once; so
the label files and indexes are those of that store, byte for byte. Trade-off: rows are decoded and encoded again, which
changes nothing in them, and one unit is held in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kddata.cards import differences
from kddata.care.pixels import cut_again
from kddata.errors import ConfigError, KddataError, StoreMismatchError
from kddata.images import ImageSource, image_again, open_source
from kddata.labelling import hashed_by_draw, missing_units, require_distinct
from kddata.store import LabelRows, LabelStore, Unit, driving
from kddata.views import pixel_hash


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A store, the number in the merged one of its first image shard, and why images of it are bad.

    `units` are those of each piece of images, by (its image shard in the merged store, first image).
    """

    store: LabelStore
    first_shard: int
    bad: dict[str, str]
    units: dict[tuple[int, int], list[Unit]]


def merge(out: str, stores: Sequence[str], *, images: str | Sequence[str] | None = None) -> LabelStore:
    """One finished store with the rows of all, which stay as they are. Stopped, the same call goes on.

    Args:
        out: URL of the new store.
        stores: URLs of finished stores: of the same image shards and views that follow each other without a gap, or of
            the same views and other image shards each, in the order that these get.
        images: where all images lie together, if they moved since they were labelled.

    Raises StoreMismatchError naming the field in which specs differ, or what overlaps; SourceError for images that are
    not there or ids that occur twice; StoreBusyError where another driver is at work on the new store.
    """
    if len(stores) < 2:
        raise ConfigError("a merge is of two stores or more", actual=len(stores))
    opened = [LabelStore.open(url) for url in stores]
    for store in opened[1:]:
        _require_same_spec(opened[0], store)
    indexes = [[(shard.name, shard.sha256) for shard in store.images] for store in opened]
    if all(index == indexes[0] for index in indexes):
        opened.sort(key=lambda store: store.first_view)
        location = images or opened[0].location
        views_per_image = _join_views(opened)
        parts = [_part(store, 0) for store in opened]
    else:
        location = images or tuple(one for store in opened for one in _as_tuple(store.location))
        views_per_image = _same_views(opened)
        starts = np.cumsum([0, *(len(store.images) for store in opened)]).tolist()
        parts = [_part(store, first) for store, first in zip(opened, starts, strict=False)]
    source = open_source(location)
    names = source.shard_names()
    _require_names(parts, names)
    merged = LabelStore.begin(
        out,
        spec=opened[0].spec,
        location=source.location,
        kind=source.kind,
        views_per_image=views_per_image,
        first_view=opened[0].first_view,
    )
    if merged.manifest is None or merged.leftovers():  # left by a merge that died while it tidied up
        with driving(out) as driver:
            if merged.manifest is None:
                _index(merged, parts, names)
                for unit in missing_units(merged):
                    rows, bad = _rows(merged, unit, parts, source)
                    again = image_again(source, merged.images[unit.shard].name)
                    merged.write_unit(unit, [rows], bad=bad, image_bytes=again)
                    driver.check()
            merged.commit()
    return merged


def _part(store: LabelStore, first_shard: int) -> _Part:
    units: dict[tuple[int, int], list[Unit]] = {}
    for unit in store.units():
        units.setdefault((unit.shard + first_shard, unit.start), []).append(unit)
    return _Part(store=store, first_shard=first_shard, bad=dict(store.info()["bad"]), units=units)


def _as_tuple(location: str | tuple[str, ...]) -> tuple[str, ...]:
    return (location,) if isinstance(location, str) else location


def _require_same_spec(first: LabelStore, other: LabelStore) -> None:
    mine, theirs = ({**store.spec.to_json(), "images.kind": store.kind} for store in (first, other))
    found = differences(mine, theirs)
    if found:
        raise StoreMismatchError(
            "stores that are merged have one spec",
            actual="; ".join(f"{key}: {a!r} and {b!r}" for key, a, b in found),
            where=f"{first.url} and {other.url}",
        )


def _views(store: LabelStore) -> str:
    return f"{store.first_view} to {store.first_view + store.views_per_image - 1}"


def _join_views(stores: Sequence[LabelStore]) -> int:
    """V of stores whose views follow each other."""
    for store, after in pairwise(stores):
        if store.first_view + store.views_per_image != after.first_view:
            raise StoreMismatchError(
                "stores of the same images that are merged have views that follow each other (views.first, "
                "views.per_image)",
                actual=f"views {_views(store)} and {_views(after)}",
                where=f"{store.url} and {after.url}",
            )
    return sum(store.views_per_image for store in stores)


def _same_views(stores: Sequence[LabelStore]) -> int:
    """V of stores of other images each."""
    first = stores[0]
    for store in stores:
        if _views(store) != _views(first):
            raise StoreMismatchError(
                "stores of different images that are merged have the same views (views.first, views.per_image)",
                actual=f"views {_views(first)} and {_views(store)}",
                where=f"{first.url} and {store.url}",
            )
        if store.kind == "folder":
            raise StoreMismatchError(
                "images that are merged lie in tar or Parquet shards: one source is one folder",
                where=store.url,
                fix="`kddata pack` turns folders into tars",
            )
    return first.views_per_image


def _require_names(parts: Sequence[_Part], names: list[str]) -> None:
    """Raises StoreMismatchError unless the source has the shards of the parts, perhaps below longer paths."""
    stored = {part.first_shard + i: shard.name for part in parts for i, shard in enumerate(part.store.images)}
    wrong = [i for i, name in stored.items() if i >= len(names) or not f"/{names[i]}".endswith(f"/{name}")]
    if wrong or len(names) != len(stored):
        i = min(wrong, default=len(stored))
        raise StoreMismatchError(
            "the images of a merged store are the image shards of its parts, in order",
            actual=f"{len(names)} shards for {len(stored)}; number {i} is {names[i] if i < len(names) else 'none'!r} "
            f"for {stored.get(i, 'none')!r}",
            fix="say where they lie together",
        )


def _index(merged: LabelStore, parts: Sequence[_Part], names: list[str]) -> None:
    indexed = merged.indexed_shards()
    for part in parts:
        for number, shard in enumerate(part.store.images, start=part.first_shard):
            if number in indexed:
                continue
            own = number - part.first_shard
            whole = Unit(number=0, shard=own, piece=0, start=0, stop=shard.num_images, view_start=0, view_stop=0)
            ids, labels, offsets, lengths = part.store.read_index(whole)
            merged.write_index(
                number,
                name=names[number],
                size_bytes=shard.size_bytes,
                ids=ids,
                labels=labels,
                offsets=offsets,
                lengths=lengths,
            )
            indexed.add(number)
    merged.finish_index(names)
    require_distinct(merged)


def _rows(
    merged: LabelStore, unit: Unit, parts: Sequence[_Part], source: ImageSource
) -> tuple[LabelRows, list[tuple[str, str]]]:
    """The rows of a unit and its bad images, out of all units of the parts that have some of them."""
    ids = merged.read_index(unit)[0]
    found: list[LabelRows] = []
    reasons: dict[str, str] = {}
    for part in parts:
        for theirs in part.units.get((unit.shard, unit.start), ()):
            if theirs.view_start < unit.view_stop and unit.view_start < theirs.view_stop:
                rows = part.store.read(theirs.number)
                wanted = (rows.view >= unit.view_start) & (rows.view < unit.view_stop)
                found.append(rows.take(np.flatnonzero(wanted)))
                reasons |= part.bad
    rows = LabelRows.concat(found)
    place = {image_id: i for i, image_id in enumerate(ids)}
    rows = rows.take(np.lexsort((rows.view, np.array([place[image_id] for image_id in rows.image_id], np.int64))))
    there = set(rows.image_id)
    rows = dataclasses.replace(rows, source=np.full(len(rows), unit.shard))
    return _hashed(merged, source, rows), [(image_id, reasons[image_id]) for image_id in ids if image_id not in there]


def _hashed(merged: LabelStore, source: ImageSource, rows: LabelRows) -> LabelRows:
    """The rows of a unit with the pixel hashes that labelling gives them: those by the draw, and the first one.

    The first row of a unit may have stood inside one of a part's, without a hash: it is rendered again.
    """
    drawn = [hashed_by_draw(image_id, view) for image_id, view in zip(rows.image_id, rows.view.tolist(), strict=True)]
    keep, pixel_hashes = np.array(drawn, dtype=bool), rows.pixel_hash.copy()
    if len(rows) and not rows.has_pixel_hash[0]:
        ((_, pixels),) = cut_again(merged, source, rows, np.array([0]))
        if isinstance(pixels, KddataError):
            raise pixels
        pixel_hashes[0] = pixel_hash(pixels)
    keep[:1] = True
    return dataclasses.replace(rows, pixel_hash=pixel_hashes, has_pixel_hash=keep)
