"""Small charts as inline SVG text: lines, dots, intervals and bars. Values in, one `<svg>` out; no library, no script.

They know nothing of distillation. Trade-off: four fixed forms instead of a plotting library, for a page that weighs
little, stays sharp at any size, and shows exact values under the mouse (`<title>`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

INK, QUIET, GRID = "#1d2433", "#667085", "#e4e7ec"
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 14, 44  # margins of a line chart, px
_ROW_PX, _LABEL_PX = 46, 168


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: points (x, y) in order."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    width_px: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value in a row of a chart; with low and high it is drawn with its interval."""

    name: str
    color: str
    value: float
    low: float | None = None
    high: float | None = None


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    width_px: int = 880,
    height_px: int = 300,
    y_range: tuple[float, float] | None = None,
    band: tuple[float, float] | None = None,
    note: tuple[float, float, str] | None = None,
) -> str:
    """A line chart, with a shaded band of y values and a marked point (x, y, text) where they are given."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points] + list(band or ())
    low, high = y_range or _padded(min(ys), max(ys))
    x_of = _scale(min(xs), max(xs), _LEFT, width_px - _RIGHT)
    y_of = _scale(low, high, height_px - _BOTTOM, _TOP)
    parts = []
    if band is not None:
        top, bottom = y_of(min(band[1], high)), y_of(max(band[0], low))
        parts.append(_rect(_LEFT, top, width_px - _RIGHT - _LEFT, bottom - top, "#e7f6ec"))
    for tick in ticks(low, high):
        parts.append(_line(_LEFT, y_of(tick), width_px - _RIGHT, y_of(tick), GRID))
        parts.append(_text(_LEFT - 8, y_of(tick) + 4, _number(tick), anchor="end"))
    for tick in ticks(min(xs), max(xs)):
        parts.append(_text(x_of(tick), height_px - _BOTTOM + 18, _number(tick), anchor="middle"))
    for one in series:
        path = " ".join(f"{x_of(x):.1f},{y_of(min(max(y, low), high)):.1f}" for x, y in one.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{one.color}" stroke-width="{one.width_px}" '
            f'stroke-linejoin="round"><title>{escape(one.name)}</title></polyline>'
        )
    if note is not None:
        x, y, text = note
        side = "end" if x_of(x) > width_px * 0.6 else "start"
        parts.append(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="5" fill="#fff" stroke="{INK}" stroke-width="2"/>'
        )
        parts.append(
            _text(x_of(x) + (-12 if side == "end" else 12), y_of(y) + 24, text, anchor=side, color=INK, bold=True)
        )
    parts.append(_text((_LEFT + width_px - _RIGHT) / 2, height_px - 6, x_label, anchor="middle"))
    parts.append(
        f'<text x="14" y="{(height_px - _BOTTOM) / 2:.0f}" transform="rotate(-90 14 {(height_px - _BOTTOM) / 2:.0f})" '
        f'text-anchor="middle" fill="{QUIET}">{escape(y_label)}</text>'
    )
    return _svg(parts, width_px, height_px, f"{y_label} by {x_label}: {', '.join(one.name for one in series)}")


def rows(
    marks: Sequence[tuple[str, Sequence[Mark]]],
    *,
    x_label: str,
    text_of: Callable[[float], str],
    reference: tuple[float, str] | None = None,
    width_px: int = 880,
    label_px: float = _LABEL_PX,
) -> str:
    """Named rows of marks on one axis, each with its value in words, and a dashed reference value."""
    values = [x for _, row in marks for mark in row for x in (mark.value, mark.low, mark.high) if x is not None]
    low, high = _padded(*_extent(values + ([reference[0]] if reference else [])), share=0.12)
    height_px = _TOP + 14 + _ROW_PX * len(marks) + _BOTTOM
    x_of = _scale(low, high, label_px, width_px - 40)
    bottom = height_px - _BOTTOM
    parts = []
    for tick in ticks(low, high):
        parts.append(_line(x_of(tick), _TOP + 8, x_of(tick), bottom, GRID))
        parts.append(_text(x_of(tick), bottom + 18, text_of(tick), anchor="middle"))
    if reference is not None:
        x = x_of(reference[0])
        parts.append(_line(x, _TOP + 8, x, bottom, INK, dash="5 4"))
        parts.append(
            _text(
                x - 6 if x > width_px / 2 else x + 6,
                _TOP + 4,
                reference[1],
                anchor="end" if x > width_px / 2 else "start",
                color=INK,
            )
        )
    for i, (name, row) in enumerate(marks):
        y = _TOP + 14 + _ROW_PX * (i + 0.5)
        parts.append(_text(label_px - 16, y + 4, name, anchor="end", color=INK, bold=True))
        for j, mark in enumerate(row):
            # Values that lie close to each other would cover one another's words: they take turns above and below.
            parts.append(_mark(mark, x_of, y, text_of, above=j % 2 == 0))
    parts.append(_text((label_px + width_px - 40) / 2, height_px - 6, x_label, anchor="middle"))
    return _svg(parts, width_px, height_px, x_label)


def bars(marks: Sequence[Mark], *, x_label: str, text_of: Callable[[float], str], width_px: int = 880) -> str:
    """Horizontal bars from 0, each with its value in words."""
    x_of = _scale(0, max(mark.value for mark in marks) * 1.16, 300, width_px - 20)
    parts = []
    for i, mark in enumerate(marks):
        y = 6 + 34 * i
        parts.append(_text(288, y + 16, mark.name, anchor="end", color=INK))
        parts.append(_rect(300, y, max(x_of(mark.value) - 300, 1), 22, mark.color, radius=4))
        parts.append(_text(x_of(mark.value) + 8, y + 16, text_of(mark.value), color=INK, bold=True))
    height_px = 34 * len(marks) + 30
    parts.append(_text((300 + width_px) / 2, height_px - 4, x_label, anchor="middle"))
    return _svg(parts, width_px, height_px, x_label)


def ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) between low and high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _mark(mark: Mark, x_of: Callable[[float], float], y: float, text_of: Callable[[float], str], *, above: bool) -> str:
    x, parts = x_of(mark.value), []
    if mark.low is not None and mark.high is not None:
        left, right = x_of(mark.low), x_of(mark.high)
        parts.append(
            f'<line x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}" stroke="{mark.color}" stroke-width="3"/>'
        )
        parts += [_line(end, y - 6, end, y + 6, mark.color, width=3) for end in (left, right)]
    title = escape(f"{mark.name}: {text_of(mark.value)}")
    parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="7" fill="{mark.color}"><title>{title}</title></circle>')
    parts.append(
        _text(x, y - 13 if above else y + 22, text_of(mark.value), anchor="middle", color=mark.color, bold=True)
    )
    return "".join(parts)


def _extent(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _padded(low: float, high: float, *, share: float = 0.05) -> tuple[float, float]:
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def _scale(low: float, high: float, start_px: float, stop_px: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start_px + (value - low) / span * (stop_px - start_px)


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}"


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, width: float = 1, dash: str = "none") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dash}"/>'
    )


def _rect(x: float, y: float, width: float, height: float, color: str, *, radius: float = 0) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" fill="{color}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = QUIET, bold: bool = False) -> str:
    style = f'text-anchor="{anchor}" fill="{color}" font-weight="{600 if bold else 400}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _svg(parts: Sequence[str], width_px: float, height_px: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width_px:g} {height_px:g}" role="img" aria-label="{escape(label)}" '
        f'font-size="13">{"".join(parts)}</svg>'
    )
