"""A picture of one image: where each of its stored views was cut, what the teacher saw, and what it said.

The pixels are replayed from the store's recipes and the image's bytes, as training does it. Trade-off: drawn with
matplotlib, which takes a second to load but lays out text on any machine.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import BinaryIO, TypedDict

import numpy as np
from torch import Tensor

from kddata.errors import ConfigError, SourceError
from kddata.images import ImageRef, decode, image_hash
from kddata.reader import open_images
from kddata.store import LabelRows, LabelStore
from kddata.views import Interpolation, Mix, View, render

_TOP = 3
_TILE_INCHES = 2.6
_LINE_INCHES = 0.2
_LINE_CHARACTERS = 34
_NAME_CHARACTERS = 24


class _Form(TypedDict):
    size_px: int
    interpolation: Interpolation


def stored_views(store: LabelStore, image_id: str, *, most: int) -> LabelRows:
    """The rows of an image, at most so many. Raises ConfigError for one that the store does not hold."""
    parts = []
    for unit in store.find(image_id):
        rows = store.read(unit.number)
        parts.append(rows.take(np.flatnonzero([found == image_id for found in rows.image_id])))
    if not any(map(len, parts)):
        bad = dict(store.info()["bad"]).get(image_id)
        some = ", ".join(map(repr, store.read_index(store.units()[0])[0][:3]))
        raise ConfigError(
            "an image of the store has labels",
            actual=f"{image_id!r}, which could not be used: {bad}" if bad else f"{image_id!r}, which no index names",
            where=store.url,
            fix=f"name another one; ids look like {some}",
        )
    return LabelRows.concat(parts).take(slice(0, most))


def draw_views(
    file: BinaryIO,
    store: LabelStore,
    rows: LabelRows,
    *,
    images: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a PNG of one image's views (rows of `stored_views`) into an open file.

    Args:
        images: where the images lie now, if they moved since they were labelled.
        class_names: to write in place of class numbers.

    Raises SourceError where the image is gone or is another one now.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    image, spec = _image(store, rows, images), store.spec
    columns = math.ceil(math.sqrt(len(rows) + 1))
    lines = -(-(len(rows) + 1) // columns)
    recipes = [_recipe(rows.view_at(i)) for i in range(len(rows))]
    tile_inches = _TILE_INCHES * 1.3 + _LINE_INCHES * max(map(len, recipes))
    figure = Figure(figsize=(columns * _TILE_INCHES, lines * tile_inches), layout="constrained")
    tiles = figure.subplots(lines, columns, squeeze=False).ravel()
    for tile in tiles:
        tile.axis("off")
    _show(tiles[0], image)
    truth = int(rows.label[0])
    tiles[0].set_title(f"{rows.image_id[0]}\n{'no label' if truth < 0 else _name(truth, class_names)}", fontsize=9)
    for i in range(len(rows)):
        view, tile, colour = rows.view_at(i), tiles[i + 1], f"C{i % 10}"
        top, left, height, width = view.box
        down, across = (1.0, 1.0)
        if view.resize is not None:  # the box lies in the resized image
            down, across = image.shape[1] / view.resize[0], image.shape[2] / view.resize[1]
        place = (left * across, top * down), width * across, height * down
        tiles[0].add_patch(Rectangle(*place, fill=False, edgecolor=colour, linewidth=2))
        form: _Form = {"size_px": spec.teacher.size_px, "interpolation": spec.plan.interpolation}
        partner = None if view.mix is None else _partner(store, view.mix, images, form)
        _show(tile, render(image, view, **form, partner=partner))
        tile.add_patch(Rectangle((0, 0), 1, 1, transform=tile.transAxes, fill=False, edgecolor=colour, linewidth=4))
        labels = rows.labels.rows(slice(i, i + 1))
        said = zip(labels.ids_BK[0].tolist(), labels.log_p_BK[0].float().exp().tolist(), strict=True)
        text = [f"{p:6.1%}  {_name(c, class_names)}{' *' * (c == truth)}" for c, p in list(said)[:_TOP] if p]
        title = [f"view {rows.view[i]}{', flipped' * view.flip}", *recipes[i]]
        tile.set_title("\n".join([*title, *text]), fontsize=8, loc="left", family="monospace")
    FigureCanvasAgg(figure).print_png(file)


def _recipe(view: View) -> list[str]:
    """The ops and the mix of a view, in lines that fit over a tile."""
    names = ", ".join(name.partition("/")[0] for name, _ in view.ops)
    lines = textwrap.wrap(names, _LINE_CHARACTERS)
    if view.mix is not None:
        lines += textwrap.wrap(f"{view.mix.kind} {1 - view.mix.lam:.0%} of {view.mix.partner}", _LINE_CHARACTERS)
    return lines


def _partner(store: LabelStore, mix: Mix, images: str | Sequence[str] | None, form: _Form) -> Tensor:
    """The pixels that a view is mixed with."""
    rows = stored_views(store, mix.partner, most=store.views_per_image)
    ((row,),) = np.nonzero(rows.view == mix.partner_view)
    return render(_image(store, rows, images), rows.view_at(int(row)).unmixed, **form)


def _image(store: LabelStore, rows: LabelRows, images: str | Sequence[str] | None) -> Tensor:
    """The image that was labelled, whole."""
    ref = ImageRef(image_id=rows.image_id[0], label=None, offset=int(rows.offset[0]), length=int(rows.length[0]))
    shard = store.images[int(rows.source[0])].name
    data = open_images(store, images).fetch(shard, ref)
    if image_hash(data) != int(rows.image_hash[0]):
        raise SourceError(
            "an image is the one that was labelled", actual=f"other bytes under {ref.image_id!r}", where=shard
        )
    return decode(data, max_pixels=1 << 62)  # it kept the limit when it was labelled


def _show(tile, pixels_u8_3HW: Tensor) -> None:  # type: ignore[no-untyped-def]
    tile.imshow(pixels_u8_3HW.permute(1, 2, 0).numpy(), interpolation="nearest")


def class_name(class_id: int, names: Sequence[str] | None) -> str:
    """How people call a class: its name where there is one, of a line of several columns the last; else its number."""
    return str(class_id) if names is None or class_id >= len(names) else names[class_id].split("\t")[-1]


def _name(class_id: int, names: Sequence[str] | None) -> str:
    return class_name(class_id, names)[:_NAME_CHARACTERS]
