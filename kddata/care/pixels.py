"""Pixels: stored views, cut again from their images as the teacher saw them, and held against their stored hashes.

Trade-off: each image is fetched and decoded for each view that is asked for; a sample is a few views of many images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
from torch import Tensor

from kddata.errors import KddataError, SourceError
from kddata.images import ImageRef, ImageSource, decode, image_hash
from kddata.reader import open_images
from kddata.store import LabelRows, LabelStore, Problem
from kddata.views import Interpolation, pixel_hash, render

_NO_LIMIT = 1 << 62  # pixels: stored rows come from images that kept the limit when they were labelled


class _Form(TypedDict):
    size_px: int
    interpolation: Interpolation


def check_pixels(
    store: LabelStore, *, images: str | Sequence[str] | None = None, skip: frozenset[str] = frozenset()
) -> list[Problem]:
    """Renders every view that has a pixel hash again; a problem for each label file whose views are others now.

    Args:
        images: where the images lie now, if they moved.
        skip: label files that are known to be damaged.

    Raises SourceError where image shards are missing, StoreDamagedError for a label file that cannot be read.
    """
    source, problems = open_images(store, images), []
    for unit, entry in zip(store.units(), store.manifest["units"] if store.manifest else (), strict=True):
        if entry["file"] in skip:
            continue
        rows = store.read(unit.number)
        hashed, faults = np.flatnonzero(rows.has_pixel_hash), []
        for i, pixels in cut_again(store, source, rows, hashed):
            if isinstance(pixels, KddataError):
                faults.append(f"view {rows.view[i]} of {rows.image_id[i]!r}: {pixels}")
            elif pixel_hash(pixels) != int(rows.pixel_hash[i]):
                faults.append(f"view {rows.view[i]} of {rows.image_id[i]!r} has other pixels")
        if faults:
            reason = f"{len(faults)} of {len(hashed)} hashed views cannot be replayed; {faults[0]}"
            problems.append(Problem(file=entry["file"], reason=reason))
    return problems


def cut_again(
    store: LabelStore, source: ImageSource, rows: LabelRows, index: np.ndarray
) -> Iterator[tuple[int, Tensor | KddataError]]:
    """(row, its pixels uint8 [3, S, S] at the teacher's size) for some rows of a whole unit; or why there are none."""
    form: _Form = {"size_px": store.spec.teacher.size_px, "interpolation": store.spec.plan.interpolation}
    partners = rows.partners() if store.spec.plan.has_mix else np.full(len(rows), -1)
    for i in index.tolist():
        try:
            view, partner, lent = rows.view_at(i), None, int(partners[i])
            if lent >= 0:
                partner = render(_image(store, source, rows, lent), rows.view_at(lent).unmixed, **form)
            yield i, render(_image(store, source, rows, i), view, **form, partner=partner)
        except (SourceError, ValueError) as error:  # ValueError: the image has another size than the view was cut from
            yield i, error if isinstance(error, KddataError) else SourceError(str(error))


def _image(store: LabelStore, source: ImageSource, rows: LabelRows, i: int) -> Tensor:
    """The decoded image of a row. Raises SourceError where it is another one now."""
    name = store.images[int(rows.source[i])].name
    ref = ImageRef(image_id=rows.image_id[i], label=None, offset=int(rows.offset[i]), length=int(rows.length[i]))
    data = source.fetch(name, ref)
    if image_hash(data) != int(rows.image_hash[i]):
        raise SourceError(
            "an image is the one that was labelled", actual=f"other bytes under {ref.image_id!r}", where=name
        )
    return decode(data, max_pixels=_NO_LIMIT)
