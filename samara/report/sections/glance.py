"""The arms at a glance: cost and quality as shares of the baseline's, one row of dots a measure."""

from __future__ import annotations

from collections.abc import Mapping

from samara.report import humanize
from samara.report.charts import dot_row, ruler
from samara.report.inputs import Arm, Inputs
from samara.report.markup import Html, element, together
from samara.report.measures import (
    FLOPS_PER_TOKEN,
    LAYER_PARAMETERS,
    PARAMETERS,
    PEAK_MEMORY,
    PERPLEXITY,
    SECONDS,
    Measure,
    color,
    named,
)
from samara.report.scales import Axis, axis_around

ROWS = {
    "Parameters": PARAMETERS,
    "\u2026 in the layers": LAYER_PARAMETERS,
    "FLOPs per token": FLOPS_PER_TOKEN,
    "Training time": SECONDS,
    "Peak memory": PEAK_MEMORY,
    "Perplexity": PERPLEXITY,
}
MOST_COLUMNS = 3  # of numbers beside the dots; more arms than that are named above them


def glance(inputs: Inputs) -> Html | None:
    """The figure; nothing where there is no baseline, or nothing beside it."""
    baseline = inputs.baseline
    others = [arm for arm in inputs.finished if arm is not baseline]
    if baseline is None or baseline.summary is None or not others:
        return None
    rows = {title: _ratios(measure, others, baseline) for title, measure in ROWS.items()}
    axis = axis_around([1.0, *(ratio for found in rows.values() for ratio in found.values())])
    columns = others if len(others) <= MOST_COLUMNS else []
    body = [_row(title, found, others, columns, axis) for title, found in rows.items() if found]
    scale = element(
        "tr",
        element("td", None),
        element("td", ruler(axis, lambda v: f"{100 * v:.0f} %", about=4), class_="dots"),
    )
    return element(
        "figure",
        element(
            "table",
            element("thead", _head(baseline, others, columns)),
            element("tbody", *body, scale),
            class_="glance" if columns else "glance wide",
        ),
        element("figcaption", "Left of the line is less: it costs less, or predicts better."),
    )


def _ratios(measure: Measure, arms: list[Arm], baseline: Arm) -> dict[str, float]:
    ratios = {arm.name: measure.ratio(arm, baseline) for arm in arms}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _head(baseline: Arm, others: list[Arm], columns: list[Arm]) -> Html:
    unnamed = others if not columns else []
    return element(
        "tr",
        element("td", None),
        element(
            "th",
            named(baseline),
            " = 100 %",
            *(together(" \u00b7 ", named(arm)) for arm in unnamed),
            scope="col",
            class_="dots",
        ),
        *(element("th", named(arm), scope="col", class_="number") for arm in columns),
    )


def _row(
    title: str, found: Mapping[str, float], others: list[Arm], columns: list[Arm], axis: Axis
) -> Html:
    dots = [(color(arm), found[arm.name]) for arm in others if arm.name in found]
    numbers = [
        element(
            "td",
            humanize.change(found[arm.name]) if arm.name in found else humanize.MISSING,
            class_=f"number s{color(arm)}",
        )
        for arm in columns
    ]
    return element(
        "tr",
        element("th", title, scope="row"),
        element("td", dot_row(dots, axis, at=1.0), class_="dots"),
        *numbers,
    )
