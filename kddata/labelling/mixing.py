"""Mixing: the pixels of the views that a unit's views are mixed with.

A partner is a view of another image of the unit, rendered unmixed. Where that image cannot be used, the view stays
unmixed: a rule that depends on the partner's bytes alone, never on what else was read.

Trade-off: partners are drawn at random from the unit, so an image is decoded again for each view that it is lent to,
unless it is among the 256 MiB of decoded images that were used last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from kddata.cards import StoreSpec
from kddata.errors import BadImageError
from kddata.images import ImageRef, ImageSource, decode
from kddata.views import Mix, render

_KEPT_BYTES = 1 << 28


class Partners:
    """The partners of one unit's views. Owns the decoded images that were used last."""

    def __init__(
        self, spec: StoreSpec, source: ImageSource, shard_name: str, refs: Sequence[ImageRef], *, max_pixels: int
    ) -> None:
        self._spec, self._source, self._shard_name, self._max_pixels = spec, source, shard_name, max_pixels
        self._refs = {ref.image_id: ref for ref in refs}
        self._ids = [ref.image_id for ref in refs]
        self._kept: OrderedDict[str, Tensor | None] = OrderedDict()
        self._kept_bytes = 0

    def of(self, image_id: str, view_index: int) -> tuple[Mix | None, Tensor | None]:
        """(mix, partner's pixels, uint8 [3, S, S]) of a view; (None, None) where it stays unmixed."""
        plan = self._spec.plan
        mix = plan.draw_mix(self._ids, image_id, view_index)
        image = None if mix is None else self._image(mix.partner)
        if mix is None or image is None:
            return None, None
        view = plan.draw(mix.partner, mix.partner_view, image.shape[1], image.shape[2])
        return mix, render(image, view, size_px=self._spec.teacher.size_px, interpolation=plan.interpolation)

    def _image(self, image_id: str) -> Tensor | None:
        """The image, decoded, or None for one that cannot be used. Raises SourceError where its bytes are gone."""
        if image_id in self._kept:
            self._kept.move_to_end(image_id)
            return self._kept[image_id]
        ((_, data),) = self._source.stream(self._shard_name, [self._refs[image_id]])
        try:
            image: Tensor | None = decode(data, max_pixels=self._max_pixels)
        except BadImageError:  # it is counted and listed when its own turn comes
            image = None
        self._kept[image_id] = image
        self._kept_bytes += 0 if image is None else image.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= 0 if dropped is None else dropped.nbytes
        return image
