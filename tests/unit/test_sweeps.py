"""Sweeps: every combination once, by a name that stays; faults found before any trial; one table and plot."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from kddata import commands
from kddata.config import SweepFile, load, sweep_trials, train_job
from kddata.errors import ConfigError
from kddata.report import TrialResult, ranked, reason, sweep_csv, sweep_page, table_rows

JOB: dict[str, Any] = {
    "store": [{"url": "a", "weight": 0.5}, {"url": "b", "weight": 0.5}],
    "student": {"arch": "torchvision:resnet18", "num_classes": 10},
    "method": {"name": "kd", "temperature": 4},
    "data": {"batch_size": 8, "size_px": 32},
    "optimizer": {"lr": 0.1, "epochs": 2},
}
KD, HARD = {"name": "kd", "temperature": 2}, {"name": "hard"}


@pytest.fixture
def sweep(tmp_path: Path):
    def read(grid: Any, *overrides: str, job: Any = JOB) -> SweepFile:
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({"job": job, "grid": grid, "run": {"name": "s", "storage": "/runs"}}, sort_keys=False)
        )
        return load(SweepFile, path, overrides)

    return read


def test_every_combination_comes_once_with_the_last_key_the_quickest(sweep):
    trials = sweep_trials(sweep({"method": [KD, HARD], "data.seed": [0, 1], "store.1.weight": [0.25]}))
    assert [(trial.file.method, trial.file.data.seed) for trial in trials] == [(KD, 0), (KD, 1), (HARD, 0), (HARD, 1)]
    for trial in trials:
        job = train_job(trial.file)
        assert job.run == f"/runs/s/{trial.name}"
        assert (job.weight, job.others[0].weight) == (0.5, 0.25)


def test_names_say_what_varies_and_stay_when_the_grid_grows(sweep):
    few = sweep_trials(sweep({"student.arch": ["torchvision:resnet18", "torchvision:resnet34"], "method": [KD, HARD]}))
    assert [trial.name.rpartition("_")[0] for trial in few] == [
        "resnet18_kd-2",
        "resnet18_hard",
        "resnet34_kd-2",
        "resnet34_hard",
    ]
    archs = [f"torchvision:resnet{depth}" for depth in (50, 34, 18)]
    more = sweep_trials(sweep({"student.arch": archs, "method": [HARD, KD]}))
    assert {trial.name for trial in few} < {trial.name for trial in more}
    assert len({trial.name for trial in more}) == 6


def test_overrides_change_the_grid_and_nested_keys_are_dotted_ones(sweep):
    file = sweep({"data.seed": [0, 1], "optimizer": {"lr": [0.1, 0.2]}}, "grid.data.seed=[7]")
    assert [dict(trial.values) for trial in sweep_trials(file)] == [
        {"data.seed": 7, "optimizer.lr": 0.1},
        {"data.seed": 7, "optimizer.lr": 0.2},
    ]


def test_the_job_may_be_a_file_of_its_own(sweep, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**JOB, "run": {"name": "alone", "checkpoint_steps": 7}}))
    (trial,) = sweep_trials(sweep({"data.seed": [3]}, job=str(path)))
    assert trial.file.run.checkpoint_steps == 7
    assert train_job(trial.file).run == f"/runs/s/{trial.name}"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, r"a sweep has a grid; got none"),
        ({"data.seed": 3}, r"has a list of values; got 3 \(in grid.data.seed\)"),
        ({"data.seed": []}, r"has a list of values; got \[\]"),
        ({"data.seed": [1, 1]}, r"the trials of a sweep differ; got twice {'data.seed': 1}"),
        ({"data.sead": [1]}, r"data.sead: no such key; the nearest is data.seed"),
        ({"optimizer.lr": [0.1, -1]}, r"with {'optimizer.lr': -1}"),
        ({"store.5.weight": [1]}, r"a key of the grid is one of the train job's; got store.5.weight"),
        ({"student.arch.name": [1]}, r"a key of the grid is one of the train job's; got student.arch.name"),
        (
            {"cluster.workers": [2]},
            r"trains in one worker; got cluster.workers 2 .*or cluster.workers: \[1\] in the grid",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_refused(sweep, grid, message):
    with pytest.raises(ConfigError, match=message):
        sweep_trials(sweep(grid))


def test_a_job_that_is_not_there_is_named(sweep):
    with pytest.raises(ConfigError, match=r"can be read; got .*nowhere.yaml"):
        sweep_trials(sweep({"data.seed": [1]}, job="nowhere.yaml"))


def test_a_trial_whose_job_cannot_be_is_named_before_ray_is_asked(sweep, tmp_path):
    file = sweep({"method": [KD, {"name": "kd", "temprature": 2}]})
    wrong = sweep_trials(file)[1].name
    with pytest.raises(ConfigError, match=rf"\(in trial {re.escape(wrong)}\)"):
        commands.sweep(str(tmp_path / "sweep.yaml"))


RESULTS = [
    TrialResult(name="a0", values={"method": HARD, "data.seed": 0, "optimizer.lr": 1}, metrics={"top1": 0.5, "nll": 2}),
    TrialResult(name="b0", values={"method": KD, "data.seed": 0, "optimizer.lr": 1}, metrics={"top1": 0.7, "nll": 3}),
    TrialResult(name="b1", values={"method": KD, "data.seed": 1, "optimizer.lr": 1}, metrics={"top1": 0.6, "nll": 1}),
    TrialResult(
        name="a1",
        values={"method": HARD, "data.seed": 1, "optimizer.lr": 1},
        error="Traceback (most recent call last):\n  x\nRuntimeError: <no memory>",
    ),
]


def test_the_best_comes_first_and_the_failed_last():
    assert [trial.name for trial in ranked(RESULTS, "top1")] == ["b0", "b1", "a0", "a1"]
    assert [trial.name for trial in ranked(RESULTS, "nll")] == ["b1", "a0", "b0", "a1"]


@pytest.mark.parametrize(("metric", "best"), [("top5", 2), ("brier", 0), ("ece", 0), ("loss", 0)])
def test_of_a_loss_less_is_better(metric, best):
    trials = [TrialResult(name=str(value), values={}, metrics={metric: value}) for value in (1, 0, 2)]
    assert ranked(trials, metric)[0].name == str(best)


def test_the_table_holds_what_varies_and_which_trial_failed():
    heads, rows = table_rows(RESULTS, "top1")
    assert heads == ["method", "data.seed", "top1", "nll", "trial"]
    assert rows[1] == ["kd temperature=2", "0", "0.7", "3", "b0"]
    assert rows[3] == ["hard", "1", "failed", "", "a1"]
    assert table_rows(RESULTS, "nll")[0] == ["method", "data.seed", "nll", "top1", "trial"]


def test_a_reason_is_one_line():
    assert reason(RESULTS[3].error) == "RuntimeError: <no memory>"
    assert reason("the loss is finite; got nan.") == "the loss is finite; got nan."
    assert len(reason("x" * 1000)) == 160


def test_the_csv_holds_all_values_and_errors():
    lines = list(csv.DictReader(io.StringIO(sweep_csv(RESULTS))))
    assert lines[1]["method"] == '{"name": "kd", "temperature": 2}'
    assert (lines[1]["optimizer.lr"], lines[1]["top1"], lines[1]["error"]) == ("1", "0.7", "")
    assert lines[3]["error"] == RESULTS[3].error


def test_the_page_plots_the_mean_over_seeds_with_its_range():
    page = sweep_page("first <sweep>", RESULTS, "top1")
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    titles = [element.text for element in svg.iter("title")]
    assert titles == ["kd temperature=2: 0.65", "hard: 0.5"]
    assert "first &lt;sweep&gt;" in page
    assert "4 students, of which 1 failed" in page
    assert "RuntimeError: &lt;no memory&gt;" in page
    assert "No trial has this metric" in sweep_page("none", RESULTS[3:], "top1")
