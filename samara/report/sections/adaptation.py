"""Fine-tuning: for each task a table of the methods, and how they learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from samara.report import humanize
from samara.report.adaptation_inputs import Tuned, TunedResults, TunedScore
from samara.report.charts import Chart, Series, line_chart
from samara.report.inputs import Inputs
from samara.report.markup import Html, element, joined, paragraph, together
from samara.report.measures import interval_text
from samara.report.run_files import Point
from samara.report.scales import Axis, Place, axis_around, smoothed
from samara.report.section import Section, missing

SMOOTHING = 0.03  # standard deviation of the window, as a share of the run


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: what a run took."""

    title: str
    value: Callable[[TunedResults], float | None]
    text: Callable[[float], str]


FIGURES = (
    Figure(title="trained weights", value=lambda r: r.trained_parameters, text=humanize.count),
    Figure(
        title="share of the model",
        value=lambda r: r.trained_parameters / r.parameters,
        text=humanize.percent,
    ),
    Figure(
        title="choosing them", value=lambda r: r.seconds.selection or None, text=humanize.seconds
    ),
    Figure(title="training", value=lambda r: r.seconds.training, text=humanize.seconds),
    Figure(title="tokens per second", value=lambda r: r.tokens_per_second, text=humanize.count),
    Figure(title="peak memory", value=lambda r: r.peak_memory_bytes, text=humanize.size),
    Figure(title="optimizer state", value=lambda r: r.optimizer_bytes, text=humanize.size),
    Figure(title="to store and send", value=lambda r: r.storage_bytes, text=humanize.size),
    Figure(
        title="bytes per trained weight",
        value=lambda r: r.storage_bytes / r.trained_parameters,
        text=lambda value: humanize.fixed(value, 1),
    ),
)


def adaptation(inputs: Inputs) -> Section | None:
    """The fine-tuning runs, task by task; nothing where there are none."""
    if not inputs.tuned:
        return None
    aside = together(
        paragraph(
            "Runs of one task share the base model, the rows, their order and the evaluation; only "
            "the method differs. Small figures: the interval over the scored rows."
        ),
        paragraph(
            "A sparse update trains few weights in place and is stored as a delta file, which "
            "comes off again bit for bit. A new head, where a task needs one, counts as trained "
            "weights and is stored beside it."
        ),
    )
    tasks = dict.fromkeys(one.results.task.name for one in inputs.tuned if one.results)
    parts: list[Html | None] = [
        _task(name, [one for one in inputs.tuned if one.results and one.results.task.name == name])
        for name in tasks
    ]
    parts += [
        missing(f"{one.name} has no results yet ({one.note}).")
        for one in inputs.tuned
        if one.results is None
    ]
    return Section(id="adaptation", title="Fine-tuning", aside=aside, body=together(*parts))


def _task(name: str, runs: Sequence[Tuned]) -> Html:
    first = _results(runs[0])
    said = f"{humanize.plural(first.num_items, 'row')} scored"
    if first.left_out:
        said += f"; {humanize.whole(first.left_out)} more have another label and were left out"
    return together(
        element("h3", f"{name} ({first.task.kind})"),
        paragraph(f"{said}.", *_findings(runs)),
        element("div", _table(runs), class_="scroll"),
        _plot(runs),
    )


def _results(run: Tuned) -> TunedResults:
    assert run.results is not None
    return run.results


def _named(run: Tuned) -> Html:
    return element("b", run.name, class_=f"arm s{run.color}")


def _findings(runs: Sequence[Tuned]) -> list[Html]:
    """Each run against the last one: score, and what it takes to store."""
    *others, reference = runs
    full = _results(reference)
    metric = next(iter(full.scores))
    found = []
    for run in others:
        own = _results(run)
        if metric not in own.scores:
            continue
        a, b = own.scores[metric], full.scores[metric]
        ratio = own.storage_bytes / full.storage_bytes
        found.append(
            together(
                " ",
                _named(run),
                f": {metric.replace('_', ' ')} {humanize.fixed(a.value)} against "
                f"{humanize.fixed(b.value)} of ",
                _named(reference),
                f" ({_apart(a, b)}), {humanize.compared(ratio, 'smaller', 'larger')} to store.",
            )
        )
    return found


def _apart(one: TunedScore, other: TunedScore) -> str:
    ends = (one.low, one.high, other.low, other.high)
    if any(end is None for end in ends):
        return "too few rows for intervals"
    low, high, other_low, other_high = (end for end in ends if end is not None)
    if low > other_high or other_low > high:
        return "their intervals do not meet"
    return "their intervals overlap"


def _table(runs: Sequence[Tuned]) -> Html:
    head = element(
        "tr",
        element("td", None),
        *(element("th", _named(run), scope="col", class_="number") for run in runs),
    )
    metrics = dict.fromkeys(metric for run in runs for metric in _results(run).scores)
    scores = [_score_row(metric, runs) for metric in metrics]
    before = [_before_row(metric, runs) for metric in metrics]
    losses = _row("validation loss", runs, lambda r: r.validation_loss, humanize.fixed)
    figures = [_row(one.title, runs, one.value, one.text) for one in FIGURES]
    groups = (
        ("What it can do", [*scores, *before, losses]),
        ("What it took", figures),
    )
    bodies = [
        element(
            "tbody",
            element(
                "tr",
                element("th", title, scope="rowgroup", colspan=len(runs) + 1),
                class_="group",
            ),
            *rows,
        )
        for title, rows in groups
    ]
    return element("table", element("thead", head), *bodies, class_="arms")


def _score_row(metric: str, runs: Sequence[Tuned]) -> Html:
    cells = []
    for run in runs:
        score = _results(run).scores.get(metric)
        if score is None:
            cells.append(element("td", humanize.MISSING, class_="number"))
            continue
        text = element("span", humanize.fixed(score.value))
        small = element("small", interval_text(score, 3))
        cells.append(element("td", joined([text, small], " "), class_="number"))
    return element("tr", element("th", metric.replace("_", " "), scope="row"), *cells)


def _before_row(metric: str, runs: Sequence[Tuned]) -> Html | None:
    """The base model's score, where it was taken."""
    bases = [(_results(run).base_scores or {}).get(metric) for run in runs]
    if all(base is None for base in bases):
        return None
    cells = [
        element(
            "td",
            humanize.MISSING if base is None else humanize.fixed(base.value),
            class_="number",
        )
        for base in bases
    ]
    title = element("th", f"{metric.replace('_', ' ')} before", scope="row", class_="inner")
    return element("tr", title, *cells)


def _row(
    title: str,
    runs: Sequence[Tuned],
    value: Callable[[TunedResults], float | None],
    text: Callable[[float], str],
) -> Html:
    cells = []
    for run in runs:
        found = value(_results(run))
        shown = humanize.MISSING if found is None else text(found)
        cells.append(element("td", shown, class_="number"))
    return element("tr", element("th", title, scope="row"), *cells)


def _plot(runs: Sequence[Tuned]) -> Html | None:
    drawn = [run for run in runs if len(run.training) > 1]
    if not drawn:
        return None
    series = [_series(run) for run in drawn]
    shown = [point.y for one in series for point in [*one.line, *one.marks]]
    ends = "; ".join(f"{one.name} ends at {humanize.fixed(one.end.y)}" for one in series)
    chart = Chart(
        x=Axis(0.0, max(one.line[-1].x for one in series)),
        y=axis_around(shown),
        x_title="steps",
        y_title="loss, nats",
        x_text=humanize.tick,
        description=f"Loss of each method against steps: {ends}.",
        height=260,
        names=True,
    )
    return line_chart(series, chart)


def _series(run: Tuned) -> Series:
    raw = _places(run.training)
    means = smoothed(raw, width=SMOOTHING * (raw[-1].x or 1.0))
    return Series(
        name=run.name,
        color=run.color,
        raw=raw,
        line=means,
        marks=_places(run.validation),
    )


def _places(points: Sequence[Point]) -> list[Place]:
    return [Place(float(point.step), point.loss) for point in points]
