"""Views: what is cut from an image, drawn once, stored, and replayed exactly.

A `ViewPlan` draws; a `View` is all that is needed to cut the same pixels again; `render` cuts them. A view may be mixed
with one of another image. Nothing here reads files, holds state or knows about batches. Trade-off: pixels are cut on
the CPU from the decoded uint8 image, so that every reader gets the teacher's pixels bit for bit, on any device.

Shapes: H, W image height and width in pixels, S side of a rendered view in pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kddata import ops, rng
from kddata.errors import ConfigError
from kddata.ops import Op

Interpolation = Literal["bilinear", "bicubic"]
Policy = Literal["none", "center", "color", "randaugment"]
MixKind = Literal["mixup", "cutmix"]
MixPolicy = Literal["none", "mixup", "cutmix"]

PLAN_VERSION = 1
_CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a view is mixed with: a view of another image, as it would be rendered unmixed.

    Attributes:
        kind: mixup (lam x view + (1 - lam) x partner) or cutmix (the partner's pixels inside `box`).
        partner: image id.
        partner_view: view index of the partner.
        lam: the view's own share; of cutmix, of its area.
        box: (top, left, height, width) as fractions of the view, for cutmix alone.
    """

    kind: MixKind
    partner: str
    partner_view: int
    lam: float
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("mixup", "cutmix") or (self.kind == "cutmix") != (self.box is not None):
            raise ValueError(f"a mix is mixup, or cutmix with a box; got {self.kind!r} with box {self.box}")
        if not all(0 <= x <= 1 and ops.is_magnitude(x) for x in (self.lam, *(self.box or ()))):
            raise ValueError(f"lam and box of a mix are multiples of 2^-16 from 0 to 1; got {self.lam} and {self.box}")


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of one image: no seed, no library state, no output size.

    Attributes:
        box: (top, left, height, width) in whole pixels of what it is cut from.
        flip: mirrored left to right after the cut.
        resize: None, or the (height, width) that the whole image is brought to before the cut.
        ops: changes of the rendered pixels, in order; see `kddata.ops`.
        mix: None, or what it is mixed with after that.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    resize: tuple[int, int] | None = None
    ops: tuple[Op, ...] = ()
    mix: Mix | None = None

    @property
    def unmixed(self) -> View:
        """The same view as others are mixed with it."""
        return replace(self, mix=None)


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """How views are drawn. Teachers and students of any input size share a plan, and so share views.

    Policies:
        none: random-resized crop (Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6) and flip.
        center: the evaluation view. The short side is resized to round(center_px * 256 / 224), the middle
            center_px x center_px is cut, never flipped. It has one view an image.
        color: as none, the same boxes and flips, and colours jittered (`ops.draw_color`).
        randaugment: as none, the same boxes and flips, and two ops of RandAugment (`ops.draw_randaugment`).

    Attributes:
        seed: with the image id and the view index, all that a random view depends on.
        area: smallest and largest share of the image's area that a crop covers.
        aspect: smallest and largest width / height of a crop.
        flip_p: probability of a flip.
        interpolation: how pixels are resampled, always antialiased.
        center_px: side of the centre crop, for policy center alone.
        erase_p: probability that a rectangle is erased, after all other ops.
        mix: mixup or cutmix every view with one of another image of its unit, with a share drawn evenly from 0..1.
        version: of the drawing rules; it changes when equal arguments would draw other views.
    """

    seed: int = 0
    policy: Policy = "none"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    interpolation: Interpolation = "bilinear"
    center_px: int | None = None
    erase_p: float = 0.0
    mix: MixPolicy = "none"
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        if self.policy not in ("none", "center", "color", "randaugment"):
            raise ConfigError("views.policy is one of none, center, color, randaugment", actual=repr(self.policy))
        if self.mix not in ("none", "mixup", "cutmix"):
            raise ConfigError("views.mix is one of none, mixup, cutmix", actual=repr(self.mix))
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError("views.interpolation is bilinear or bicubic", actual=repr(self.interpolation))
        if (self.policy == "center") != (self.center_px is not None):
            raise ConfigError("policy center, and no other, has a center_px", actual=f"{self.policy}, {self.center_px}")
        if self.center_px is not None and self.center_px < 1:
            raise ConfigError("center_px is at least 1", actual=self.center_px)
        for name in ("area", "aspect"):  # 1 and 1.0 are one plan, with one fingerprint
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        for name in ("flip_p", "erase_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ConfigError("views.area is (low, high) with 0 < low <= high <= 1", actual=self.area)
        low, high = self.aspect
        if not 0 < low <= high < math.inf:
            raise ConfigError("views.aspect is (low, high) with 0 < low <= high", actual=self.aspect)
        for name in ("flip_p", "erase_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"views.{name} is between 0 and 1", actual=getattr(self, name))
        if self.policy == "center" and (self.erase_p or self.mix != "none"):
            raise ConfigError(
                "the view of policy center is whole and unmixed",
                actual=f"erase_p {self.erase_p:g}, mix {self.mix}",
                fix="leave these out, or use another policy",
            )
        if self.version != PLAN_VERSION:
            raise ConfigError(f"this library draws plans of version {PLAN_VERSION}", actual=self.version)

    @property
    def has_ops(self) -> bool:
        """Whether its views may have ops."""
        return self.policy in ("color", "randaugment") or self.erase_p > 0

    @property
    def has_mix(self) -> bool:
        """Whether its views may be mixed."""
        return self.mix != "none"

    def draw(self, image_id: str, view_index: int, height_px: int, width_px: int) -> View:
        """The view with this index of this image, unmixed. Pure: it depends on the plan and these arguments alone."""
        if view_index < 0 or height_px < 1 or width_px < 1:
            raise ValueError(f"view {view_index} of an image of {height_px} x {width_px} px cannot be drawn")
        if self.policy == "center":
            return self._center(view_index, height_px, width_px)
        random = rng.stream(self.seed, "view", self.version, image_id, view_index).random
        for _ in range(_CROP_ATTEMPTS):
            area_px = height_px * width_px * _between(self.area, random())
            aspect = math.exp(_between((math.log(self.aspect[0]), math.log(self.aspect[1])), random()))
            height, width = round(math.sqrt(area_px / aspect)), round(math.sqrt(area_px * aspect))
            if 0 < height <= height_px and 0 < width <= width_px:
                top, left = int(random() * (height_px - height + 1)), int(random() * (width_px - width + 1))
                break
        else:  # an image too narrow for the plan: its middle, brought inside the aspect limits
            width = max(1, min(width_px, round(height_px * self.aspect[1])))
            height = max(1, min(height_px, round(width_px / self.aspect[0])))
            top, left = (height_px - height) // 2, (width_px - width) // 2
        drawn = self._draw_ops(image_id, view_index) if self.has_ops else ()
        return View(box=(top, left, height, width), flip=random() < self.flip_p, ops=drawn)

    def draw_mix(self, unit_image_ids: Sequence[str], image_id: str, view_index: int) -> Mix | None:
        """What the view with this index is mixed with: the view with the same index of another image of its unit.

        Pure: it depends on the plan and these arguments alone, and not on which images of the unit can be used. Who
        labels leaves a view unmixed whose partner is a bad image.

        Args:
            unit_image_ids: of all images of the unit, in the order of its index; `image_id` is one of them.

        Returns None where the plan does not mix, or the image is alone in its unit.
        """
        if self.mix == "none" or len(unit_image_ids) < 2:
            return None
        random = rng.stream(self.seed, "mix", self.version, image_id, view_index).random
        step = 1 + int(random() * (len(unit_image_ids) - 1))
        partner = unit_image_ids[(unit_image_ids.index(image_id) + step) % len(unit_image_ids)]
        lam, box = ops.draw_share(random), None
        if self.mix == "cutmix":  # Yun et al., arXiv 1905.04899, with the box placed inside
            box = ops.draw_box(math.sqrt(1 - lam), math.sqrt(1 - lam), random)
            lam = 1 - box[2] * box[3]
        return Mix(kind=self.mix, partner=partner, partner_view=view_index, lam=lam, box=box)

    def _draw_ops(self, image_id: str, view_index: int) -> tuple[Op, ...]:
        random = rng.stream(self.seed, "ops", self.version, image_id, view_index).random
        drawn: tuple[Op, ...] = ()
        if self.policy == "color":
            drawn = ops.draw_color(random)
        elif self.policy == "randaugment":
            drawn = ops.draw_randaugment(random)
        return (*drawn, ops.draw_erase(random)) if random() < self.erase_p else drawn

    def _center(self, view_index: int, height_px: int, width_px: int) -> View:
        if view_index != 0:
            raise ConfigError("policy center has one view an image", actual=f"view {view_index}", fix="per_image: 1")
        assert self.center_px is not None
        crop = self.center_px
        short, long = round(crop * 256 / 224), max(height_px, width_px)
        long = int(short * long / min(height_px, width_px))
        height, width = (short, long) if height_px <= width_px else (long, short)
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        return View(box=(top, left, crop, crop), resize=(height, width))


def render(
    image_u8_3HW: Tensor,
    view: View,
    *,
    size_px: int,
    interpolation: Interpolation,
    partner: Tensor | None = None,
) -> Tensor:
    """The pixels of a view, uint8 [3, S, S] with S = size_px. Pure; equal arguments give equal bits.

    Equals: resize the whole image if `view.resize` says so; cut `view.box`; resize to S x S with antialiasing, unless
    it has that size; mirror if `view.flip`; apply `view.ops` in order; mix with the partner if `view.mix` says so.

    Args:
        partner: pixels of the partner's view, uint8 [3, S, S], rendered unmixed. Needed where the view is mixed.

    Raises ValueError for a tensor that is not uint8 [3, H, W], a box that leaves the image, an op that this library
    does not have, or a mixed view without its partner's pixels.
    """
    if image_u8_3HW.dtype != torch.uint8 or image_u8_3HW.ndim != 3 or image_u8_3HW.shape[0] != 3:
        raise ValueError(f"an image is uint8 [3, H, W]; got {image_u8_3HW.dtype} {tuple(image_u8_3HW.shape)}")
    pixels = image_u8_3HW
    if view.resize is not None:
        pixels = _resize(pixels, view.resize, interpolation)
    top, left, height, width = view.box
    if (
        top < 0
        or left < 0
        or height < 1
        or width < 1
        or top + height > pixels.shape[1]
        or left + width > pixels.shape[2]
    ):
        raise ValueError(f"box {view.box} leaves the image of {pixels.shape[1]} x {pixels.shape[2]} px")
    pixels = _resize(pixels[:, top : top + height, left : left + width], (size_px, size_px), interpolation)
    pixels = ops.apply((pixels.flip(-1) if view.flip else pixels).contiguous(), view.ops)
    if view.mix is None:
        return pixels
    if partner is None or partner.dtype != torch.uint8 or partner.shape != pixels.shape:
        found = None if partner is None else (partner.dtype, tuple(partner.shape))
        raise ValueError(f"a mixed view is rendered with its partner's pixels, uint8 [3, S, S]; got {found}")
    if view.mix.box is None:
        return ops.mixup(pixels, partner, view.mix.lam)
    return ops.paste(pixels, partner, view.mix.box)


def pixel_hash(pixels_u8_3SS: Tensor) -> int:
    """A 64-bit BLAKE2b hash of a rendered view: its proof of exact replay."""
    data = pixels_u8_3SS.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if tuple(pixels.shape[1:]) == size:
        return pixels
    # What torchvision's resize comes down to (equal bits) at half its cost for small images, and always on uint8:
    # torchvision goes by way of float, to other pixels, on a CPU without AVX2.
    return functional.interpolate(pixels[None], size=size, mode=interpolation, antialias=True)[0]
