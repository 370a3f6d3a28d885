"""The page: a `Report` as one HTML text that needs no other file, no network and no script.

Trade-off: charts are drawn for the kinds of values that a distillation experiment has, not for any.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from kddata.report import plots
from kddata.report.plots import Mark, Series
from kddata.report.values import COLUMNS, LABELS_OF, Arm, Cost, Kind, Report, Sample, StepAgreement

COLOR_OF: dict[Kind, str] = {"hard": "#8a94a6", "cached": "#2563eb", "loop": "#d97706"}
_SMOOTH_STEPS = 15

STYLE = """
:root { --ink: #1d2433; --quiet: #667085; --rule: #e4e7ec; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 34px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -.02em; }
h2 { font-size: 21px; margin: 0 0 4px; letter-spacing: -.01em; }
p { margin: 6px 0 12px; max-width: 76ch; }
.lead { font-size: 18px; color: #475467; }
section { background: #fff; border: 1px solid var(--rule); border-radius: 14px; padding: 24px 26px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 14px; margin-top: 24px; }
.card { background: #fff; border: 1px solid var(--rule); border-radius: 14px; padding: 16px 18px; }
.card b { display: block; font-size: 27px; line-height: 1.2; letter-spacing: -.02em; }
.card span { color: var(--quiet); font-size: 14px; line-height: 1.35; display: block; margin-top: 4px; }
.good b { color: #15803d; } .bad b { color: #b42318; }
.verdict { border-left: 4px solid var(--accent); padding-left: 14px; font-weight: 600; }
.note { color: var(--quiet); font-size: 14px; }
svg { display: block; width: 100%; height: auto; margin: 8px 0; font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; color: #475467; margin: 8px 0 0; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 7px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--quiet); font-size: 13px; }
td, th { padding: 8px 10px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; }
tr:last-child td { border-bottom: 0; }
.facts td { text-align: left; white-space: normal; vertical-align: top; }
.facts td:first-child { color: var(--quiet); width: 210px; }
.sample { display: flex; gap: 14px; align-items: flex-start; padding: 12px 0; border-top: 1px solid var(--rule); }
.sample > div:first-child { flex: 0 0 112px; font-weight: 600; font-size: 14px; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; flex: 1; }
.view { display: flex; gap: 10px; }
.view img { width: 64px; height: 64px; border-radius: 8px; image-rendering: pixelated; border: 1px solid var(--rule); }
.says { flex: 1; font-size: 12px; line-height: 1.3; }
.says div { position: relative; padding: 1px 5px; margin-bottom: 2px; white-space: nowrap; }
.says div i { position: absolute; inset: 0 auto 0 0; background: #dbe7fe; border-radius: 3px; }
.says div span { position: relative; }
li { margin: 4px 0; max-width: 76ch; }
"""


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<header><h1>{escape(report.title)}</h1><p class='lead'>{escape(report.lead)}</p></header>",
        _cards(report),
        _effect(report),
        _section("Every arm", _table(report)),
        _cost(report.cost, report.arms),
        _steps(report.steps),
    ]
    if report.samples:
        about = (
            "A few images of the store, from those that the teacher doubted most to surer ones: their views, cut again "
            "from the stored recipes, and the most probable classes that were stored for each. Students see these very "
            "pixels."
        )
        parts.append(_section("What the cache holds", f"<p>{about}</p>", *map(_sample, report.samples)))
    if report.caveats:
        items = "".join(f"<li>{escape(text)}</li>" for text in report.caveats)
        parts.append(_section("What this does not show", f"<ul>{items}</ul>"))
    if report.settings:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in report.settings)
        parts.append(_section("How it was made", f"<table class='facts'>{rows}</table>"))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _cards(report: Report) -> str:
    cards = []
    for one in report.comparisons:
        gain = one.interval.difference * 100
        tone = "good" if one.interval.low > 0 else "bad" if one.interval.high < 0 else ""
        text = f"points of accuracy for {one.student}, cached labels over hard ones"
        cards.append((f"{gain:+.1f}", text + ("" if one.interval.excludes_zero else " (may be chance)"), tone))
    even = report.cost.break_even
    cards += [
        (f"{report.cost.bytes_per_view:.0f} B", "on disk for each stored view", ""),
        (f"{even:.1f}" if even < 1000 else "never", "students, and the cache has paid for itself", ""),
        (
            f"{report.steps.largest:.4%}",
            f"largest change of a step's loss by the cache's rounding ({report.steps.tolerance:.2%} allowed)",
            "good" if report.steps.held else "bad",
        ),
    ]
    boxes = (f"<div class='card {tone}'><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s, tone in cards)
    return f"<div class='cards'>{''.join(boxes)}</div>"


def _effect(report: Report) -> str:
    students = list(dict.fromkeys(arm.student for arm in report.arms))
    dots = [(s, [_accuracy(arm) for arm in report.arms if arm.student == s]) for s in students]
    intervals = [
        (
            one.student,
            [Mark(name="cached - hard", color=COLOR_OF["cached"], value=i.difference, low=i.low, high=i.high)],
        )
        for one in report.comparisons
        for i in [one.interval]
    ]
    verdicts = "".join(f"<p class='verdict'>{escape(one.verdict)}</p>" for one in report.comparisons)
    level = report.comparisons[0].interval.level if report.comparisons else 0.95
    return _section(
        "Does distillation from the cache beat hard labels?",
        verdicts,
        _legend(list(dict.fromkeys(arm.kind for arm in report.arms))),
        plots.rows(
            dots,
            x_label="accuracy on the test images",
            text_of=lambda x: f"{x:.1%}",
            reference=(report.teacher["top1"], f"teacher {report.teacher['top1']:.1%}"),
        ),
        "<p>The same test images judge both arms, so the difference is taken image by image. Its "
        f"{level:.0%} bootstrap interval:</p>",
        plots.rows(
            intervals,
            x_label="accuracy with cached labels minus accuracy with hard labels, in points",
            text_of=lambda x: f"{x * 100:+.1f}" if round(x, 9) else "0",
            reference=(0.0, "no difference"),
        ),
    )


def _accuracy(arm: Arm) -> Mark:
    return Mark(name=LABELS_OF[arm.kind], color=COLOR_OF[arm.kind], value=arm.scores["top1"])


def _table(report: Report) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in report.table())
    note = (
        "Agreement: how often the student's first choice is the teacher's. NLL and ECE (15 bins): lower is better. "
        "Wall time is the whole run, processes started and all. Training is its steps alone, images/s "
        "the views seen in a second of them, over all workers."
    )
    return f"<div class='scroll'><table><tr>{head}</tr>{rows}</table></div><p class='note'>{note}</p>"


def _cost(cost: Cost, arms: Sequence[Arm]) -> str:
    speeds = [
        Mark(name=f"{arm.student}, {LABELS_OF[arm.kind]}", color=COLOR_OF[arm.kind], value=arm.images_per_s)
        for arm in arms
    ]
    last = min(max(6, round(cost.break_even * 2)), 40) if cost.break_even < 1000 else 6
    series = [
        Series(
            name="teacher in the loop",
            color=COLOR_OF["loop"],
            points=[(0, 0), (last, last * cost.loop_s / 60)],
            width_px=3,
        ),
        Series(
            name="cached labels",
            color=COLOR_OF["cached"],
            points=[(0, cost.label_s / 60), (last, (cost.label_s + last * cost.cached_s) / 60)],
            width_px=3,
        ),
    ]
    even = None
    if cost.break_even <= last:
        even = (cost.break_even, cost.break_even * cost.loop_s / 60, f"paid for after {cost.break_even:.1f} students")
    views = cost.num_images * cost.views_per_image
    about = (
        f"The store holds {cost.views_per_image} views of {cost.num_images:,} images: {views:,} views in "
        f"{cost.store_bytes / 1e6:.1f} MB, {cost.bytes_per_view:.1f} bytes each with recipe, labels, image index and "
        "manifest."
    )
    return _section(
        "What the cache costs, and what it saves",
        f"<p class='verdict'>{escape(cost.verdict)}</p><p>{about}</p>",
        _legend(["cached", "loop"]),
        plots.lines(
            series,
            x_label="students trained",
            y_label="minutes",
            y_range=(0, last * cost.loop_s / 60 * 1.05),
            note=even,
        ),
        plots.bars(speeds, x_label="images/s in training", text_of=lambda x: f"{x:,.0f}"),
    )


def _steps(steps: StepAgreement) -> str:
    both: list[tuple[Kind, Sequence[float]]] = [("loop", steps.loop_S), ("cached", steps.cached_S)]
    curves = [
        Series(
            name=LABELS_OF[kind],
            color=COLOR_OF[kind],
            points=list(enumerate(_smooth(values))),
            width_px=6 if kind == "loop" else 2,
        )
        for kind, values in both
    ]
    limit = 100 * steps.tolerance
    return _section(
        "Is it the same as having the teacher in the loop?",
        f"<p class='verdict'>{escape(steps.verdict)}</p><p>{escape(steps.reason)}</p>",
        _percent("cached labels minus fresh ones", steps.difference_S, band=(-limit, limit)),
        f"<p>{escape(steps.drift)}</p>",
        _legend(["loop", "cached"]),
        plots.lines(curves, x_label="step", y_label=f"loss (mean of {_SMOOTH_STEPS} steps)"),
        _percent("cached run minus loop run", steps.drift_S),
    )


def _percent(name: str, share_S: Sequence[float], *, band: tuple[float, float] | None = None) -> str:
    """A chart of a share of the first loss at each step."""
    line = Series(name=name, color=plots.INK, points=[(s, 100 * d) for s, d in enumerate(share_S)], width_px=1)
    return plots.lines([line], x_label=f"step: {name}", y_label="% of the first loss", height_px=210, band=band)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and those just before it."""
    windows = (values[max(0, i + 1 - _SMOOTH_STEPS) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _sample(sample: Sample) -> str:
    views = []
    for png, says in sample.views:
        lines = "".join(
            f"<div><i style='width:{p:.1%}'></i><span>{escape(name)} {p:.0%}</span></div>" for name, p in says
        )
        data = base64.b64encode(png).decode()
        views.append(
            f"<div class='view'><img alt='' src='data:image/png;base64,{data}'><div class='says'>{lines}</div></div>"
        )
    name = f"<div>{escape(sample.truth)}<br><span class='note'>{escape(sample.image_id)}</span></div>"
    return f"<div class='sample'>{name}<div class='views'>{''.join(views)}</div></div>"


def _legend(kinds: list[Kind]) -> str:
    items = "".join(f"<span><i style='background:{COLOR_OF[kind]}'></i>{LABELS_OF[kind]}</span>" for kind in kinds)
    return f"<div class='legend'>{items}</div>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"
