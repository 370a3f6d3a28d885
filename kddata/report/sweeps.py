"""The result of a sweep: one table, as values, text and CSV, and one plot, in a page that needs no other file.

Trials that differ in data.seed alone are one row of the plot: their mean, and the range from the least to the most.
Trade-off: the range is drawn and not a confidence interval, since two or three seeds give none worth the name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from kddata.evaluation import METRICS
from kddata.report import plots
from kddata.report.page import STYLE
from kddata.report.plots import Mark

_SEED = "data.seed"
_SCORES = ("top1", "top5", "nll", "ece", "loss")
_REASON_CHARS = 160
_BLUE = "#2563eb"
_LABEL_PX = 330


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial: its value of each key of the grid, what its card says of its last epoch, or why there is none."""

    name: str
    values: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


def ranked(trials: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """The best first, then those without this metric, then the failed ones.

    What `evaluation.METRICS` does not know is a loss: less is better.
    """
    sign = -METRICS.get(metric, -1)

    def place(trial: TrialResult) -> tuple[bool, bool, float]:
        missing = metric not in trial.metrics
        return trial.error is not None, missing, 0.0 if missing else sign * trial.metrics[metric]

    return sorted(trials, key=place)


def columns(trials: Sequence[TrialResult]) -> tuple[list[str], list[str]]:
    """(keys of the grid that vary, metrics of any trial)."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    varied = [key for key in keys if len({json.dumps(trial.values[key], default=str) for trial in trials}) > 1]
    return varied, list(dict.fromkeys(name for trial in trials for name in trial.metrics))


def sweep_csv(trials: Sequence[TrialResult]) -> str:
    """One line a trial, in the order given; values that are no plain ones as JSON."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    metrics = columns(trials)[1]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", *keys, *metrics, "error"])
    for trial in trials:
        values = [trial.values[key] for key in keys]
        plain = [json.dumps(x) if isinstance(x, dict | list) else x for x in values]
        writer.writerow([trial.name, *plain, *(trial.metrics.get(name, "") for name in metrics), trial.error or ""])
    return file.getvalue()


def table_rows(trials: Sequence[TrialResult], metric: str) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) for a person, in the order given: what varies, the ranking metric and other scores, the
    hash that its name ends in.
    """
    keys, found = columns(trials)
    metrics = [metric, *(name for name in _SCORES if name in found and name != metric)]
    rows = []
    for trial in trials:
        numbers = [f"{trial.metrics[name]:.4g}" if name in trial.metrics else "" for name in metrics]
        if trial.error is not None:
            numbers[0] = "failed"
        rows.append([*(short(trial.values[key]) for key in keys), *numbers, trial.name.rpartition("_")[2]])
    return [*keys, *metrics, "trial"], rows


def reason(error: str) -> str:
    """The line of an error that says what happened, cut where it is long: its first, or the last of a traceback."""
    lines = error.strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line if len(line) <= _REASON_CHARS else line[: _REASON_CHARS - 1] + "…"


def short(value: Any) -> str:
    """A value of the grid in few characters: a method is its name and arguments, a path its last part."""
    if isinstance(value, dict):
        rest = [f"{key}={short(x)}" for key, x in value.items() if key != "name"]
        return " ".join([str(value.get("name", "")), *rest]).strip()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(short, value)) + "]"
    return value.rstrip("/").rpartition("/")[2].rpartition(":")[2] if isinstance(value, str) else str(value)


def sweep_page(title: str, trials: Sequence[TrialResult], metric: str) -> str:
    """The page: the plot of one metric, then the table."""
    best_first = ranked(trials, metric)
    heads, rows = table_rows(best_first, metric)
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    failed = [trial for trial in best_first if trial.error is not None]
    lead = f"{len(trials)} students, of which {len(failed)} failed" if failed else f"{len(trials)} students"
    parts = [
        f"<header><h1>{escape(title)}</h1><p class='lead'>{lead}; ranked by {escape(metric)}.</p></header>",
        _section(metric, _plot(best_first, metric)),
        _section("Every trial", f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"),
    ]
    if failed:
        errors = "".join(
            f"<li><b>{escape(trial.name)}</b>: {escape(reason(trial.error or ''))}</li>" for trial in failed
        )
        parts.append(_section("Failed", f"<ul>{errors}</ul>"))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _plot(trials: Sequence[TrialResult], metric: str) -> str:
    keys = [key for key in columns(trials)[0] if key != _SEED]
    groups: dict[str, list[float]] = {}
    for trial in trials:
        if metric in trial.metrics:
            label = " · ".join(short(trial.values[key]) for key in keys) or "all"
            groups.setdefault(label, []).append(trial.metrics[metric])
    if not groups:
        return "<p>No trial has this metric.</p>"
    marks = []
    for label, found in groups.items():
        low, high = (min(found), max(found)) if len(found) > 1 else (None, None)
        text = label if len(label) <= 46 else label[:45] + "…"
        marks.append((text, [Mark(name=label, color=_BLUE, value=sum(found) / len(found), low=low, high=high)]))
    note = "<p class='note'>Mean over seeds, with the range from the least to the most.</p>"
    drawn = plots.rows(marks, x_label=metric, text_of=lambda x: f"{x:.4g}", label_px=_LABEL_PX)
    return drawn + (note if any(len(found) > 1 for found in groups.values()) else "")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"
