"""Ops: changes of a rendered view's colours and shape, drawn once, stored with the view, and replayed exactly.

An op is a versioned name and its magnitudes, such as ("brightness/1", (1.25,)). All arithmetic on pixels is on
integers, so that equal arguments give equal bits on every machine; magnitudes are multiples of 2^-16, so that they lose
nothing as text or float32, and most are drawn in steps of 1/256, which a store packs well. Places are fractions of the
view, so that views of every size share an op. A change of what a name computes is a new version beside the old one.
Trade-off: shapes are sampled to the nearest pixel, which is exact and quick, and not smooth.

Shapes: S side of a view in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Op = tuple[str, tuple[float, ...]]
Random = Callable[[], float]
"""Numbers in [0, 1), one a call."""

STEPS = 1 << 16
_HALF = STEPS // 2
_DRAWN = 256  # steps of a place, a share or a strength that is drawn
_FILL = 128  # grey, where there is no pixel
_MOST = 16.0  # size of a magnitude; products stay within 32 bits
_JITTER, _HUE_TURNS = 0.4, 0.1
_NUM_RANDOM, _STRENGTH = 2, 9 / 30
_ERASED, _ERASED_ASPECT = (0.02, 1 / 3), (0.3, 3.3)


def apply(pixels_u8_3SS: Tensor, ops: tuple[Op, ...]) -> Tensor:
    """The view after these ops, one after the other: uint8 [3, S, S]. Pure. Raises ValueError for an unknown op."""
    for name, magnitudes in ops:
        check(name, magnitudes)
        pixels_u8_3SS = _OPS[name].change(pixels_u8_3SS, *magnitudes)
    return pixels_u8_3SS


def check(name: str, magnitudes: tuple[float, ...]) -> None:
    """Raises ValueError unless this library has the op, with so many magnitudes of the kind that it takes."""
    if name not in _OPS:
        raise ValueError(f"ops of a view are among {', '.join(_OPS)}; got {name!r}")
    count = _OPS[name].num_magnitudes
    if len(magnitudes) != count or not all(abs(x) <= _MOST and is_magnitude(x) for x in magnitudes):
        raise ValueError(
            f"{name} has {count} magnitudes, multiples of 2^-16 of at most {_MOST:g}; got {list(magnitudes)}"
        )


def num_magnitudes(name: str) -> int:
    """How many magnitudes an op has."""
    return _OPS[name].num_magnitudes


def round_magnitude(x: float, steps: int = STEPS) -> float:
    """The nearest multiple of 1 / steps."""
    return round(x * steps) / steps


def is_magnitude(x: float) -> bool:
    """Whether a finite number is a multiple of 2^-16."""
    return (x * STEPS).is_integer()


def draw_share(random: Random) -> float:
    """A multiple of 1/256 from 0 to 1."""
    return round_magnitude(random(), _DRAWN)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def draw_color(random: Random) -> tuple[Op, ...]:
    """Colour jitter: brightness, contrast, saturation by 0.6 to 1.4, hue by up to a tenth of a turn, in any order."""
    ops = [_op(f"{name}/1", 1 + _JITTER * _signed(random)) for name in ("brightness", "contrast", "saturation")]
    ops.append(_hue(_HUE_TURNS * _signed(random)))
    drawn: list[Op] = []
    while ops:
        drawn.append(ops.pop(int(random() * len(ops))))
    return tuple(drawn)


def draw_randaugment(random: Random) -> tuple[Op, ...]:
    """RandAugment with 2 of 14 ops, at magnitude 9 of 30, of a random sign where it has one.

    Source: Cubuk et al., "RandAugment" (arXiv 1909.13719), with the ranges of torchvision; an identity leaves no op.
    """
    drawn = []
    for _ in range(_NUM_RANDOM):
        kind, sign = int(random() * 14), 1 if random() < 0.5 else -1
        factor, shear, shift = 1 + sign * 0.9 * _STRENGTH, sign * 0.3 * _STRENGTH, sign * 150 / 331 * _STRENGTH
        turn = math.radians(sign * 30 * _STRENGTH)
        choices: list[Op | None] = [
            None,
            _op("autocontrast/1"),
            _op("equalize/1"),
            _op("posterize/1", 8 - round(4 * _STRENGTH)),
            _op("solarize/1", 1 - _STRENGTH),
            *(_op(f"{name}/1", factor) for name in ("brightness", "contrast", "saturation", "sharpness")),
            _op("affine/1", 1, shear, 0, 0, 1, 0),
            _op("affine/1", 1, 0, 0, shear, 1, 0),
            _op("affine/1", 1, 0, shift, 0, 1, 0),
            _op("affine/1", 1, 0, 0, 0, 1, shift),
            _op("affine/1", math.cos(turn), math.sin(turn), 0, -math.sin(turn), math.cos(turn), 0),
        ]
        drawn.append(choices[kind])
    return tuple(op for op in drawn if op is not None)


def draw_erase(random: Random) -> Op:
    """A grey rectangle over 2 to 33 % of the view (Zhong et al., "Random erasing", arXiv 1708.04896, filled evenly)."""
    area = _ERASED[0] + (_ERASED[1] - _ERASED[0]) * random()
    low, high = (math.log(x) for x in _ERASED_ASPECT)
    aspect = math.exp(low + (high - low) * random())
    return _op("erase/1", *draw_box(math.sqrt(area * aspect), math.sqrt(area / aspect), random))


def draw_box(height: float, width: float, random: Random) -> tuple[float, float, float, float]:
    """(top, left, height, width) of a rectangle placed evenly inside the view, as fractions of it."""
    height, width = (round_magnitude(min(1.0, x), _DRAWN) for x in (height, width))
    top, left = (round_magnitude(random() * (1 - x), _DRAWN) for x in (height, width))
    return top, left, height, width


def _op(name: str, *magnitudes: float) -> Op:
    return name, tuple(round_magnitude(x) for x in magnitudes)


def _signed(random: Random) -> float:
    return 2 * draw_share(random) - 1


def _hue(turns: float) -> Op:
    """A turn of colours about the grey axis, as the shares of a channel and of the next one in its new value."""
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns) / math.sqrt(3)
    return _op("hue/1", (1 + 2 * cos) / 3, (1 - cos) / 3 - sin)


# -- what pixels become -----------------------------------------------------------------------------------------------


def mixup(pixels_u8_3SS: Tensor, partner_u8_3SS: Tensor, lam: float) -> Tensor:
    """lam x pixels + (1 - lam) x partner, rounded: uint8 [3, S, S]."""
    return _blend(pixels_u8_3SS.int(), partner_u8_3SS.int(), lam)


def paste(pixels_u8_3SS: Tensor, partner_u8_3SS: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """The view with the partner's pixels inside the box (top, left, height, width, fractions of the view)."""
    place, mixed = _place(box, pixels_u8_3SS.shape[-1]), pixels_u8_3SS.clone()
    mixed[place] = partner_u8_3SS[place]
    return mixed


def _brightness(pixels: Tensor, factor: float) -> Tensor:
    return _blend(pixels.int(), torch.zeros((), dtype=torch.int32), factor)


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    grey = _grey(pixels)
    count = grey.numel()
    return _blend(pixels.int(), (2 * grey.sum() + count).div(2 * count, rounding_mode="floor").int(), factor)


def _saturation(pixels: Tensor, factor: float) -> Tensor:
    return _blend(pixels.int(), _grey(pixels)[None], factor)


def _sharpness(pixels: Tensor, factor: float) -> Tensor:
    """Away from a smoothed view: the mean of 3 x 3 pixels, the middle one counted five times; borders stay."""
    x = pixels.int()
    if min(x.shape[1:]) < 3:
        return pixels
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    smooth = x.clone()
    smooth[:, 1:-1, 1:-1] = (around + 6) * 5042 >> 16  # a division by 13, exact for what nine pixels can sum to
    return _blend(x, smooth, factor)


def _hue_turned(pixels: Tensor, own: float, following: float) -> Tensor:
    x, shares = pixels.int(), [round(own * STEPS), round(following * STEPS)]
    shares.append(STEPS - sum(shares))
    mixed = sum(share * x.roll(-channel, 0) for channel, share in enumerate(shares))
    assert isinstance(mixed, Tensor)
    return (mixed + _HALF >> 16).clamp(0, 255).byte()


def _autocontrast(pixels: Tensor) -> Tensor:
    """Each channel stretched to 0..255."""
    flat = pixels.flatten(1)
    low, high = flat.amin(1, keepdim=True).int(), flat.amax(1, keepdim=True).int()
    spread, values = (high - low).clamp_min(1), torch.arange(256)
    stretched = (510 * (values - low) + spread).div(2 * spread, rounding_mode="floor").clamp(0, 255)
    return _look_up(pixels, torch.where(high > low, stretched, values))


def _equalize(pixels: Tensor) -> Tensor:
    """Each channel's histogram made even, as PIL does it."""
    tables = []
    for channel in pixels:
        counts = torch.bincount(channel.flatten(), minlength=256)
        step = int(counts.sum() - counts[counts > 0][-1]) // 255
        even = (step // 2 + counts.cumsum(0) - counts).div(max(1, step), rounding_mode="floor").clamp_max(255)
        tables.append(even if step else torch.arange(256))
    return _look_up(pixels, torch.stack(tables))


def _posterize(pixels: Tensor, bits: float) -> Tensor:
    return pixels & (256 - (1 << 8 - min(8, max(0, int(bits)))))


def _solarize(pixels: Tensor, threshold: float) -> Tensor:
    """What is at least this share of white is turned to its negative."""
    values = torch.arange(256)
    return _look_up(pixels, torch.where(values >= round(threshold * 255), 255 - values, values).expand(3, 256))


def _affine(pixels: Tensor, a: float, b: float, right: float, c: float, d: float, down: float) -> Tensor:
    """Each pixel at (x, y) from the middle comes from (a x + b y + right, c x + d y + down), nearest; grey outside."""
    size = pixels.shape[-1]
    doubled = 2 * torch.arange(size) + 1 - size  # twice the distance from the middle, so that it is whole
    at = [round(x * STEPS) for x in (a, b, right, c, d, down)]
    x = at[0] * doubled[None, :] + at[1] * doubled[:, None] + (2 * at[2] + STEPS) * size >> 17
    y = at[3] * doubled[None, :] + at[4] * doubled[:, None] + (2 * at[5] + STEPS) * size >> 17
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    place = torch.where(inside, y * size + x, size * size)  # the last one is grey
    padded = nn.functional.pad(pixels.flatten(1), (0, 1), value=_FILL)
    return padded.index_select(1, place.flatten()).view_as(pixels)


def _erase(pixels: Tensor, top: float, left: float, height: float, width: float) -> Tensor:
    erased = pixels.clone()
    erased[_place((top, left, height, width), pixels.shape[-1])] = _FILL
    return erased


def _blend(x: Tensor, base: Tensor, factor: float) -> Tensor:
    """base + factor x (x - base), rounded and clamped, uint8."""
    return (base + ((x - base) * round(factor * STEPS) + _HALF >> 16)).clamp(0, 255).byte()


def _look_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Each channel's pixels replaced by what its row of the tables [3, 256] says, uint8."""
    places = pixels.int() + torch.tensor([0, 256, 512], dtype=torch.int32)[:, None, None]
    return tables.byte().flatten().index_select(0, places.flatten()).view_as(pixels)


def _grey(pixels: Tensor) -> Tensor:
    """Luma by ITU-R 601, int32 [S, S]."""
    red, green, blue = pixels.int()
    return 19595 * red + 38470 * green + 7471 * blue + _HALF >> 16


def _place(box: tuple[float, float, float, float], size: int) -> tuple[slice, slice, slice]:
    """Where a box lies in a view of this size: each edge at the nearest border between pixels."""
    top, left, height, width = box
    edges = (math.floor(x * size + 0.5) for x in (top, top + height, left, left + width))
    first_row, last_row, first_column, last_column = (min(size, max(0, edge)) for edge in edges)
    return slice(None), slice(first_row, last_row), slice(first_column, last_column)


class _Entry(NamedTuple):
    change: Callable[..., Tensor]
    num_magnitudes: int


_OPS: dict[str, _Entry] = {
    "brightness/1": _Entry(_brightness, 1),
    "contrast/1": _Entry(_contrast, 1),
    "saturation/1": _Entry(_saturation, 1),
    "sharpness/1": _Entry(_sharpness, 1),
    "hue/1": _Entry(_hue_turned, 2),
    "autocontrast/1": _Entry(_autocontrast, 0),
    "equalize/1": _Entry(_equalize, 0),
    "posterize/1": _Entry(_posterize, 1),
    "solarize/1": _Entry(_solarize, 1),
    "affine/1": _Entry(_affine, 6),
    "erase/1": _Entry(_erase, 4),
}
NAMES = tuple(_OPS)
