"""Ensembles: several stores over the same views of the same images, each with what another teacher said.

Which stores are joined, and with what weights, is chosen when a student is trained; no label is touched. Views depend
on the plan alone, so teachers may differ in everything, input size included. Trade-off: members are labelled in the
same units, so that a row has one place in all of them; each unit is compared as it is read all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from kddata.cards import canonical_json, differences
from kddata.errors import StoreMismatchError
from kddata.store.rows import LabelRows
from kddata.store.store import LabelStore


def require_members(lead: LabelStore, others: Sequence[LabelStore]) -> None:
    """Raises StoreMismatchError, naming the field, unless all stores hold the same views of the same images."""
    for other in others:
        found = differences(_layout(lead), _layout(other))
        if found:
            raise StoreMismatchError(
                "the stores of an ensemble share plan, images, views and units, and the number of classes",
                actual="; ".join(f"{key}: {mine!r} and {theirs!r}" for key, mine, theirs in found[:5]),
                where=f"{lead.url} and {other.url}",
                fix="label with the other teacher on the same plan, images and units; a store that was extended joins "
                "those that were extended alike",
            )


def require_same_rows(rows: LabelRows, others: LabelRows, *, where: str) -> None:
    """Raises StoreMismatchError unless two units hold the same views, cut alike from equal images, in one order."""
    columns = ("view", "box", "flip", "image_hash")
    same = rows.image_id == others.image_id and all(
        np.array_equal(getattr(rows, name), getattr(others, name)) for name in columns
    )
    if not same:
        raise StoreMismatchError(
            "the stores of an ensemble hold the same views of the same images",
            actual=f"{len(rows)} and {len(others)} rows, of other images or views",
            where=where,
            fix="label both from the same images, with the same limits",
        )


def _layout(store: LabelStore) -> dict[str, object]:
    plan = store.spec.to_json()["plan"]
    units = [dataclasses.astuple(unit) for unit in store.units()]
    digest = hashlib.sha256(canonical_json(units).encode()).hexdigest()
    return {
        "plan": plan,
        "num_classes": store.spec.teacher.num_classes,
        "views_per_image": store.views_per_image,
        "first_view": store.first_view,
        "unit_images": store.spec.unit_images,
        "unit_views": store.spec.unit_views,
        "image shards": [[shard.name, shard.num_images] for shard in store.images],
        "units": f"{len(units)} with SHA-256 {digest[:12]}...",
    }
