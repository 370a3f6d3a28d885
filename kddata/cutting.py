"""Cutting: the pixels of label rows, from the encoded images that they were read with.

Each image of a call is decoded once, for however many of its views are among the rows. Trade-off: one call holds one
decoded image at a time, and a partner of a mixed view beside it.

Shapes: N rows, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kddata.images import decode
from kddata.reader import Read
from kddata.views import Interpolation, View, render

_NO_LIMIT = 1 << 62  # pixels: stored rows come from images that kept the limit when they were labelled


def cut(read: Read, sizes_px: Sequence[int], interpolation: Interpolation) -> list[Tensor]:
    """The rendered views of all rows, uint8 [N, 3, S, S], for each size S. Equal to `views.render` of each one."""
    pixels = [torch.empty(len(read.rows), 3, size_px, size_px, dtype=torch.uint8) for size_px in sizes_px]
    rows_of: dict[int, list[int]] = {}  # by image: one image is one object
    for i, data in enumerate(read.images):
        rows_of.setdefault(id(data), []).append(i)
    mixed = [] if read.rows.mix is None else [i for i, mix in enumerate(read.rows.mix) if mix is not None]
    place_of = {row: place for place, row in enumerate(mixed)}
    views = [read.rows.view_at(row) for row in range(len(read.rows))]
    for rows in rows_of.values():
        image = decode(read.images[rows[0]], max_pixels=_NO_LIMIT, rows=_bottom([views[row] for row in rows]))
        for row in rows:
            partner = _partner(read, place_of[row]) if row in place_of else None
            for rendered, size_px in zip(pixels, sizes_px, strict=True):
                lent = None if partner is None else render(*partner, size_px=size_px, interpolation=interpolation)
                rendered[row] = render(image, views[row], size_px=size_px, interpolation=interpolation, partner=lent)
    return pixels


def _bottom(views: Sequence[View]) -> int | None:
    """How many rows of their image these views are cut from; None for all, where one takes the whole image first."""
    if any(view.resize is not None for view in views):
        return None
    return max(view.box[0] + view.box[2] for view in views)


def _partner(read: Read, place: int) -> tuple[Tensor, View]:
    assert read.partner_rows is not None
    view = read.partner_rows.view_at(place).unmixed
    return decode(read.partner_images[place], max_pixels=_NO_LIMIT, rows=_bottom([view])), view
