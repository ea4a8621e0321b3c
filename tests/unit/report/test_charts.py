"""The parts of a chart that could lie."""

from __future__ import annotations

import html
import json
import re

from samara.report.charts import Chart, Series, interval_mark, line_chart
from samara.report.scales import Axis, Place


def chart(**changes) -> Chart:
    settings = {
        "x": Axis(0, 100),
        "y": Axis(0, 10),
        "x_title": "tokens",
        "y_title": "loss",
        "x_text": str,
        "description": "Loss.",
        "height": 100,
        "names": True,
    }
    return Chart(**{**settings, **changes})


def series(points: list[Place], marks: list[Place] | None = None) -> Series:
    return Series(name="a", color=0, raw=points, line=points, marks=marks or [])


def paths(text: str) -> list[str]:
    return re.findall(r' d="([^"]*)"', text)


def test_a_curve_is_cut_where_it_leaves_the_plot():
    made = line_chart([series([Place(0, 20), Place(50, 0), Place(100, 5)])], chart())
    # Down through the top edge (y = 10) at half the way to x = 50.
    assert paths(made)[0] == "M2500 0L5000 10000L10000 5000"


def test_a_curve_that_leaves_and_comes_back_is_two_pieces():
    points = [Place(0, 5), Place(20, 50), Place(40, 5), Place(60, 5)]
    path = paths(line_chart([series(points)], chart()))[0]
    assert path.startswith("M0 5000L")
    assert path.count("M") == 2


def test_dots_above_the_plot_are_left_out_and_the_last_is_labelled():
    marks = [Place(10, 20), Place(60, 4), Place(100, 2.5)]
    made = line_chart([series([Place(0, 5), Place(100, 3)], marks)], chart())
    assert made.count("<circle") == 2
    assert 'cx="60.00%" cy="60.00%"' in made
    assert ">2.500<" in made


def test_a_curve_that_ends_early_has_a_lead_to_its_label():
    short = line_chart([series([Place(0, 5), Place(50, 3)])], chart())
    full = line_chart([series([Place(0, 5), Place(100, 3)])], chart())
    assert 'class="lead"' in short
    assert 'class="lead"' not in full


def test_hover_values_match_the_curve():
    made = line_chart([series([Place(0, 5), Place(50, 3.25)])], chart())
    raw = re.search(r'data-values="([^"]*)"', made)
    assert raw is not None
    values = json.loads(html.unescape(raw[1]))
    assert values["series"] == [
        {"name": "a", "color": 0, "at": [0.0, 0.5], "x": ["0", "50"], "y": ["5.000", "3.250"]}
    ]


def test_a_single_point_draws_no_line():
    assert paths(line_chart([series([Place(1, 5)])], chart()))[0].startswith("M4")


def test_an_unknown_interval_is_only_a_point():
    axis = Axis(-1, 1)
    assert "interval" in interval_mark(-0.5, 0.0, 0.5, axis, color=1)
    assert "interval" not in interval_mark(None, 0.0, None, axis, color=1)
