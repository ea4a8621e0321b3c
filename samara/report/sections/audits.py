"""Audits: what was looked at in each released model, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from samara.report import humanize
from samara.report.adaptation_inputs import AuditRow, AuditScope, AuditSummary
from samara.report.inputs import Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.section import Section, missing

MEANINGS = {
    "bias": "gap between two protected terms, mean",
    "stability": "worst of what follows",
    "stability/consistency": "likeness of answers to two wordings",
    "stability/agreement": "equal answers, whatever the batch",
    "stability/extremes": "extreme inputs without a problem",
    "stability/revert": "the base is back, bit for bit",
    "stability/seeds": "equal answers, whatever the seed",
    "forgetting": "loss on the base's own text",
}
WHOLE = ("stability",)
"""Suites whose number is that of one of their parts."""


def audits(inputs: Inputs) -> Section | None:
    """The audits, one column a model; nothing where the report names none."""
    if not inputs.audited:
        return None
    aside = together(
        paragraph(
            "Sentences are read twice, with either of two terms that should not matter; the gap is "
            "how far the answers are apart. An attribute is judged by itself, by its interval: "
            "inside the limit passes, outside fails, anything between is inconclusive."
        ),
        paragraph(
            "A gap is no proof of harm and none of its absence: the sentences are few, and in one "
            "language."
        ),
    )
    known = [(one.name, one.summary) for one in inputs.audited if one.summary is not None]
    parts: list[Html | None] = [element("div", _table(known), class_="scroll")] if known else []
    parts += [paragraph(f"{name}: {_scope(summary.scope)}") for name, summary in known]
    parts += [
        missing(f"{one.name} is not audited yet ({one.note}).")
        for one in inputs.audited
        if one.summary is None
    ]
    return Section(id="audits", title="Audits", aside=aside, body=together(*parts))


def _table(known: Sequence[tuple[str, AuditSummary]]) -> Html:
    head = element(
        "tr",
        element("td", None),
        *(element("th", name, scope="col", class_="number") for name, _ in known),
    )
    suites = dict.fromkeys(row.suite for _, summary in known for row in summary.audits)
    rows = [
        element(
            "tr",
            element("th", _title(suite), scope="row", class_="inner" if "/" in suite else None),
            *(element("td", _cell(summary, suite), class_="number") for _, summary in known),
        )
        for suite in suites
    ]
    return element("table", element("thead", head), element("tbody", *rows), class_="arms")


def _title(suite: str) -> Html:
    meaning = MEANINGS.get(suite)
    name = suite.partition("/")[2] or suite
    return together(f"{name} ", element("small", meaning) if meaning else None)


def _cell(summary: AuditSummary, suite: str) -> Html:
    row = next((row for row in summary.audits if row.suite == suite), None)
    if row is None:
        return element("span", humanize.MISSING)
    numbers = "" if suite in WHOLE else _numbers(row)
    return together(element("span", row.verdict), " ", element("small", numbers))


def _numbers(row: AuditRow) -> str:
    shown = [humanize.fixed(value) for value in (row.before, row.after) if value is not None]
    change = " \u2192 ".join(shown)
    if row.ci_of_change is None:
        return change
    low, high = (humanize.fixed(end) for end in row.ci_of_change)
    return f"{change}, change [{low}, {high}]"


def _scope(scope: AuditScope) -> str:
    """What was looked at, and what was not."""
    parts = []
    if scope.pairs_of_texts is not None:
        unit = "nats" if scope.unit == "nats" else "probability moved from one label to others"
        parts.append(
            f"{humanize.plural(scope.pairs_of_texts, 'pair')} of texts on "
            f"{humanize.listed(list(scope.attributes))} (set \u201c{scope.templates}\u201d, "
            f"{scope.language}), gaps in {unit}"
        )
    if scope.prompts is not None:
        sizes = humanize.listed([str(size) for size in scope.batch_sizes])
        parts.append(
            f"{humanize.plural(scope.prompts, 'prompt')} at batch sizes {sizes}, "
            f"{humanize.plural(scope.repeats or 0, 'run')} each; "
            f"{humanize.plural(scope.pairs_of_wordings or 0, 'pair')} of wordings; "
            f"{humanize.plural(scope.extreme_inputs or 0, 'extreme input')}"
        )
        parts.append(
            f"{humanize.plural(scope.other_seeds, 'other seed')} compared"
            if scope.other_seeds
            else "other seeds not compared"
        )
    return f"{'; '.join(parts)}. Intervals of {humanize.percent(scope.confidence)}."
