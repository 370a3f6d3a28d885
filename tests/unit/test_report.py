import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from kddata.evaluation import Interval
from kddata.report import COLUMNS, Arm, Comparison, Cost, Report, Sample, StepAgreement, page
from kddata.report.plots import Mark, Series, bars, lines, rows, ticks


def _png():
    file = io.BytesIO()
    Image.new("L", (28, 28), 200).save(file, format="PNG")
    return file.getvalue()


def _comparison(low, high):
    return Comparison(student="tiny", interval=Interval(difference=(low + high) / 2, low=low, high=high, level=0.95))


def _cost(**changes):
    values = {"label_s": 40, "num_images": 1000, "views_per_image": 4, "store_bytes": 160_000} | changes
    return Cost(**{"cached_s": 20.0, "loop_s": 45.0, **values})


def _steps(loop_cached, loop, tolerance, *, cached=None):
    values = {"cached_S": cached or loop, "loop_S": loop, "loop_cached_S": loop_cached, "tolerance": tolerance}
    accuracy = Interval(difference=-0.002, low=-0.006, high=0.002, level=0.95)
    return StepAgreement(**values, reason="Rounding.", accuracy=accuracy)


def _report(**changes):
    def arm(kind, top1):
        scores = {"top1": top1, "agreement": 0.9, "nll": 0.4, "ece": 0.02}
        return Arm(
            student="tiny <net>", kind=kind, scores=scores, wall_s=30, train_s=20, images_per_s=4321, loss_S=[2.0, 1.0]
        )

    values = {
        "title": "A & B",
        "lead": "What was done.",
        "teacher": {"top1": 0.9138, "nll": 0.23, "ece": 0.01},
        "arms": [arm("hard", 0.85), arm("cached", 0.87), arm("loop", 0.8702)],
        "comparisons": [_comparison(0.01, 0.03)],
        "cost": _cost(),
        "steps": _steps([2.0, 1.001, 0.5], [2.0, 1.0, 0.5], 0.01),
        "samples": [Sample(image_id="a/b", truth="ankle boot", views=[(_png(), [("sandal", 0.75)])])],
        "settings": [("machine", "two cores")],
        "caveats": ["One seed."],
    }
    return Report(**(values | changes))


class _Checker(HTMLParser):
    """Collects tags that are never closed, and every address that the page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_a_page_is_whole_and_needs_nothing_else():
    text = page(_report())
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched
    assert all(address.startswith("data:image/png;base64,") for address in checker.fetched)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_a_page_shows_every_value_and_escapes_names():
    text = page(_report())
    assert "tiny &lt;net&gt;" in text
    assert "<net>" not in text
    for shown in ("A &amp; B", "91.38%", "87.00%", "teacher in the loop", "4,321", "40 B", "ankle boot", "sandal 75%"):
        assert shown in text
    for shown in ("One seed.", "two cores", "What was done.", "Rounding.", "paid for after 1.6 students"):
        assert shown in text


def test_no_chart_draws_outside_itself():
    for svg in re.findall(r"<svg viewBox=\"0 0 (\d+) (\d+)\".*?</svg>", page(_report()), flags=re.S):
        assert all(float(size) > 0 for size in svg)
    for point in re.findall(r'<circle cx="([-\d.]+)"', page(_report())):
        assert 0 <= float(point) <= 880
    assert "nan" not in page(_report(steps=_steps([2.0], [2.0], 0.0)))


def test_the_table_has_a_row_for_the_teacher_and_each_arm():
    table = _report().table()
    assert [len(row) for row in table] == [len(COLUMNS)] * 4
    assert table[0][:3] == ("teacher", "", "91.38%")
    assert table[2] == ("tiny <net>", "cached labels", "87.00%", "90.0%", "0.400", "0.020", "30 s", "20 s", "4,321")


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.01, 0.03, "tiny: distillation from the cache beats hard labels by 2.0 points (95% interval +1.0 to +3.0)."),
        (-0.03, -0.01, "does worse than hard labels by 2.0 points (95% interval -3.0 to -1.0)."),
        (-0.01, 0.03, "does not beat hard labels: the difference of +1.0 points may be chance"),
        (-0.03, 0.01, "does not beat hard labels: the difference of -1.0 points may be chance"),
        (0.0, 0.02, "does not beat hard labels"),
    ],
)
def test_a_verdict_says_plainly_what_the_interval_says(low, high, says):
    assert says in _comparison(low, high).verdict
    assert says in page(_report(comparisons=[_comparison(low, high)]))


def test_the_cache_pays_when_what_students_save_reaches_what_labelling_took():
    cost = _cost(label_s=40, cached_s=20.0, loop_s=45.0)
    assert cost.break_even == pytest.approx(40 / 25)
    assert "paid for itself after 2 students (1.6)" in cost.verdict
    assert "after 1 student (0.4)" in _cost(label_s=10).verdict
    assert cost.bytes_per_view == 40.0


def test_a_cache_that_never_pays_is_called_so():
    cost = _cost(cached_s=20.0, loop_s=20.0)
    assert cost.break_even == math.inf
    assert "has not paid for itself" in cost.verdict
    assert "never" in page(_report(cost=cost))


def test_steps_agree_within_the_tolerance_or_the_page_says_that_they_do_not():
    steps = _steps([2.0, 1.01], [2.0, 1.0], 0.005)
    assert steps.difference_S == pytest.approx([0.0, 0.005])
    assert _steps([2.0, 1.009], [2.0, 1.0], 0.005).held
    apart = _steps([2.0, 0.98], [2.0, 1.0], 0.005)
    assert not apart.held
    assert "NOT every one of 2 steps" in apart.verdict
    assert "largest difference is 1.0000% of the first loss, 0.5000% was allowed" in page(_report(steps=apart))


def test_two_whole_runs_are_reported_with_how_far_they_drifted():
    steps = _steps([2.0, 1.0], [2.0, 1.0], 0.005, cached=[2.0, 1.1])
    assert steps.held  # the tolerance speaks of equal weights alone
    assert steps.drift_S == pytest.approx([0.0, 0.05])
    assert "at most 5.00% of the first loss in a step" in page(_report(steps=steps))
    assert "ends -0.2 points from the other (95% interval -0.6 to +0.2): no difference is shown" in steps.drift


def test_runs_of_different_length_are_not_compared():
    with pytest.raises(ValueError, match="longer"):
        _ = _steps([2.0], [2.0, 1.0], 0.01).difference_S


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.82, 0.92, [0.82, 0.84, 0.86, 0.88, 0.9, 0.92]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_line_chart_maps_values_linearly_and_keeps_within_its_frame():
    svg = lines([Series(name="up", color="#000", points=[(0, 0), (1, 5), (2, 10)])], x_label="x", y_label="y")
    xs, ys = zip(*[map(float, p.split(",")) for p in re.findall(r'points="([^"]*)"', svg)[0].split()], strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]  # larger is higher up
    cut = lines([Series(name="far", color="#000", points=[(0, 0), (1, 99)])], x_label="x", y_label="y", y_range=(0, 1))
    assert min(float(p.split(",")[1]) for p in re.findall(r'points="([^"]*)"', cut)[0].split()) >= 0


def test_rows_and_bars_write_their_values():
    svg = rows([("one", [Mark(name="a", color="#000", value=0.5)])], x_label="x", text_of=lambda x: f"{x:.0%}")
    assert ">50%<" in svg
    assert ">12<" in bars([Mark(name="a", color="#000", value=12)], x_label="x", text_of=lambda x: f"{x:.0f}")
