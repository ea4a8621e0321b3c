"""Loss differences against the baseline, with intervals and a word each: a forest plot."""

from __future__ import annotations

import math

from samara.report import humanize
from samara.report.charts import interval_mark, ruler
from samara.report.inputs import Arm, Comparison, Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import color, interval_text, named
from samara.report.scales import Axis, axis_around, tick_places
from samara.report.section import Section, missing


def difference(inputs: Inputs) -> Section | None:
    """Is an arm better than the baseline? Each row says what the held-out documents say."""
    if len(inputs.arms) < 2:
        return None
    title = "Better or worse?"
    evaluation = inputs.evaluation
    if evaluation is None:
        body = missing(inputs.evaluation_note)
        return Section(id="difference", title=title, aside=together(), body=body)
    rows = [(arm, arm.comparison) for arm in inputs.arms if arm.comparison is not None]
    confidence = humanize.percent(evaluation.confidence)
    aside = together(
        paragraph(
            f"Loss minus the baseline's on the same {humanize.whole(evaluation.num_documents)} "
            f"{evaluation.split} documents ({humanize.count(evaluation.num_tokens)} tokens), with "
            f"{confidence} intervals from resampling the documents in pairs."
        ),
        paragraph(
            "An interval that crosses zero is ",
            element("b", "unresolved"),
            ": these documents cannot tell the two apart. The intervals cover the choice of "
            "documents, not the luck of a seed: each arm was trained once.",
        ),
    )
    body = (
        _forest(rows, inputs.arms[0])
        if rows
        else missing(f"The evaluation compares no arm with {inputs.arms[0].name}.")
    )
    return Section(id="difference", title=title, aside=aside, body=body)


def _forest(rows: list[tuple[Arm, Comparison]], baseline: Arm) -> Html:
    ends = [
        value
        for _, comparison in rows
        for value in (
            comparison.loss_difference.low,
            comparison.loss_difference.value,
            comparison.loss_difference.high,
        )
        if value is not None
    ]
    axis = axis_around([0.0, *ends], padding=0.12)
    places = max(2, tick_places(axis.ticks(6)))
    body = [_row(arm, comparison, axis) for arm, comparison in rows]
    scale = element(
        "tr",
        element("td", None, class_="who"),
        element(
            "td",
            ruler(axis, lambda tick: humanize.fixed(tick, places, sign=True), about=6),
            _directions(baseline),
            class_="dots",
        ),
        element("td", None),
    )
    return element("table", element("tbody", *body, scale), class_="forest")


def _row(arm: Arm, comparison: Comparison, axis: Axis) -> Html:
    found = comparison.loss_difference
    perplexity = humanize.change(math.exp(found.value))
    return element(
        "tr",
        element("th", named(arm), scope="row", class_="who"),
        element(
            "td",
            interval_mark(found.low, found.value, found.high, axis, color=color(arm)),
            class_="dots",
        ),
        element(
            "td",
            element("b", comparison.verdict, class_=f"verdict {comparison.verdict}"),
            element("span", f" {humanize.fixed(found.value, sign=True)} ", class_="value"),
            element("small", interval_text(found, 3, sign=True) or "no interval: one document"),
            element("small", f"perplexity {perplexity}"),
            class_="said",
        ),
    )


def _directions(baseline: Arm) -> Html:
    return element(
        "div",
        element("span", "← better than ", baseline.name),
        element("span", "worse →"),
        class_="directions",
    )
