"""The table of arms: what each is, costs and reaches, beside the baseline."""

from __future__ import annotations

from samara.report import humanize
from samara.report.inputs import Arm, Inputs
from samara.report.markup import Html, element, joined, paragraph, together
from samara.report.measures import TABLE, Measure, best, color, interval_text, named
from samara.report.section import Section, missing


def arms(inputs: Inputs) -> Section | None:
    """One column per arm, one row per figure."""
    if not inputs.arms:
        return None
    aside = together(
        paragraph(
            "Small figures: the change against the first arm, or the interval. ",
            element("span", "Marked", class_="best"),
            ": the best of a row; two are marked where the held-out text cannot tell them apart.",
        ),
        paragraph(
            element("i", "counted"),
            " follows from the shapes; ",
            element("i", "measured"),
            " was observed; ",
            element("i", "estimated"),
            " is measured time multiplied by assumptions about the device.",
        ),
        _on_grown(inputs),
    )
    shown = inputs.finished
    body = _table(shown) if shown else missing("No arm has finished yet.")
    return Section(id="arms", title="The arms", aside=aside, body=body)


def _on_grown(inputs: Inputs) -> Html | None:
    if not any(arm.races for arm in inputs.finished):
        return None
    return paragraph("What a grown arm took is with its source and with every trial of its race.")


def _table(shown: tuple[Arm, ...]) -> Html:
    head = element(
        "tr",
        element("td", None),
        *(element("th", named(arm), scope="col", class_="number") for arm in shown),
    )
    groups = list(dict.fromkeys(measure.group for measure in TABLE))
    bodies = []
    for group in groups:
        rows = [_row(measure, shown) for measure in TABLE if measure.group == group]
        kept = [row for row in rows if row is not None]
        if kept:
            title = element("th", group, scope="rowgroup", colspan=len(shown) + 1)
            bodies.append(element("tbody", element("tr", title, class_="group"), *kept))
    table = element("table", element("thead", head), *bodies, class_="arms")
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="The arms")


def _row(measure: Measure, shown: tuple[Arm, ...]) -> Html | None:
    if all(measure.value(arm) is None for arm in shown):
        return None
    marked = best(measure, shown)
    title = element(
        "th",
        measure.title,
        element("small", f" {measure.kind}", class_="kind"),
        scope="row",
        class_="inner" if measure.title.startswith("in the") else None,
    )
    return element(
        "tr", title, *(_cell(measure, arm, shown[0], arm.name in marked) for arm in shown)
    )


def _cell(measure: Measure, arm: Arm, baseline: Arm, is_best: bool) -> Html:
    value = measure.value(arm)
    if value is None:
        return element("td", humanize.MISSING, class_="number")
    text = element("span", measure.text(value, arm), class_="best" if is_best else None)
    notes = []
    bounds = measure.bounds(arm) if measure.bounds else None
    if bounds is not None:
        notes.append(interval_text(bounds, measure.places))
    elif measure.better is not None and arm is not baseline:
        ratio = measure.ratio(arm, baseline)
        notes.append("" if ratio is None else humanize.change(ratio))
    small = [element("small", note) for note in notes if note]
    return element("td", joined([text, *small], " "), class_=f"number s{color(arm)}")
