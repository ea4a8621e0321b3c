"""Federations: what each method reached and took, whom it told to drop what, who kept what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from samara.report import humanize
from samara.report.charts import Chart, Series, client_row, line_chart, ruler, strip
from samara.report.federation_inputs import (
    FederatedMeasured,
    FederatedResults,
    Federation,
    RoundEnd,
)
from samara.report.inputs import Inputs
from samara.report.markup import Html, element, joined, paragraph, together
from samara.report.scales import Axis, Place, axis_around
from samara.report.section import Section, missing

MOST_COLUMNS = 40
"""Rounds side by side; more are joined."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One horizontal axis: what is spent."""

    title: str
    value: Callable[[RoundEnd], float]
    text: Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table."""

    title: str
    origin: str
    """Measured, counted or modelled."""
    value: Callable[[Federation], float | None]
    text: Callable[[float], str]


def federated(inputs: Inputs) -> Section | None:
    """The federations, task by task; nothing where there are none."""
    if not inputs.federations:
        return None
    aside = together(
        paragraph(
            "A server asks some clients in each round, averages what they send, and never sees "
            "their rows. All methods here have the same clients, rows and devices."
        ),
        paragraph(
            element("b", "Modelled"),
            ": what a batch costs was measured on this machine, and is scaled by the devices' "
            "profiles; a round lasts as long as its slowest client. ",
            element("b", "Counted"),
            ": bytes of the messages. ",
            element("b", "Measured"),
            ": on this machine.",
        ),
        paragraph("One seed each: small differences are no finding."),
    )
    done = [one for one in inputs.federations if one.results]
    tasks = dict.fromkeys(one.results.task.name for one in done if one.results)
    parts: list[Html | None] = [
        _task(name, [one for one in done if one.results and one.results.task.name == name])
        for name in tasks
    ]
    parts += [
        missing(f"{one.name} has no results yet ({one.note}).")
        for one in inputs.federations
        if one.results is None
    ]
    return Section(id="federated", title="Many clients", aside=aside, body=together(*parts))


def _task(name: str, runs: Sequence[Federation]) -> Html:
    first = _results(runs[0])
    return together(
        element("h3", f"{name} ({first.task.kind})"),
        paragraph(f"{humanize.plural(first.clients.number, 'client')}.", *_findings(runs)),
        element("div", _table(runs), class_="scroll"),
        *_curves(runs),
        *(_choices(run) for run in runs),
        *(_kept(run) for run in runs),
        _clients([run for run in runs if _results(run).clients.each]),
        _promises(runs),
    )


def _results(run: Federation) -> FederatedResults:
    assert run.results is not None
    return run.results


def _measured(run: Federation, value: Callable[[FederatedMeasured], float | None]) -> float | None:
    measured = _results(run).measured
    return None if measured is None else value(measured)


def _named(run: Federation) -> Html:
    return element("b", run.name, class_=f"arm s{run.color}")


def _score(value: float, metric: str) -> str:
    return humanize.percent(value) if metric == "accuracy" else f"{humanize.fixed(value)} nats"


# --- what it came to ------------------------------------------------------------------------------


def _findings(runs: Sequence[Federation]) -> list[Html]:
    """Each run against the first: its score, its time and its bytes."""
    reference, *others = runs
    found = []
    for run in others:
        time = run.rounds[-1].seconds / max(reference.rounds[-1].seconds, 1e-12)
        sent = run.rounds[-1].bytes / max(reference.rounds[-1].bytes, 1e-12)
        found.append(
            together(
                " ",
                _named(run),
                f" ends at a validation {run.metric} of "
                f"{_score(run.rounds[-1].score, run.metric)}, ",
                _named(reference),
                f" at {_score(reference.rounds[-1].score, run.metric)}; it takes "
                f"{humanize.compared(time, 'less', 'more')} time on the devices (modelled) and "
                f"{humanize.compared(sent, 'fewer', 'more')} bytes (counted).",
            )
        )
    return found


def _table(runs: Sequence[Federation]) -> Html:
    metric = runs[0].metric

    def shown(value: float) -> str:
        return _score(value, metric)

    good = (
        Figure(
            title=f"test {metric}, global model",
            origin="measured",
            value=lambda r: getattr(_results(r).test.best, metric),
            text=shown,
        ),
        Figure(
            title=f"clients' {metric}, own models",
            origin="measured, mean",
            value=lambda r: _results(r).clients.personal.get(f"{metric}_mean"),
            text=shown,
        ),
        Figure(
            title="worst decile of them",
            origin="measured, mean",
            value=lambda r: _results(r).clients.personal.get(f"{metric}_worst_decile"),
            text=shown,
        ),
    )
    took = (
        Figure(
            title="rounds",
            origin="counted",
            value=lambda r: _results(r).rounds,
            text=humanize.whole,
        ),
        Figure(
            title="time on the devices",
            origin="modelled",
            value=lambda r: _results(r).modelled.seconds,
            text=humanize.seconds,
        ),
        Figure(
            title="energy of the clients",
            origin="modelled",
            value=lambda r: _results(r).modelled.joules,
            text=lambda value: humanize.prefixed(value, "J"),
        ),
        Figure(
            title="peak of a training",
            origin="modelled, mean",
            value=lambda r: fmean(own.peak_bytes for own in r.asked) if r.asked else None,
            text=humanize.size,
        ),
        Figure(
            title="largest peak",
            origin="modelled",
            value=lambda r: max((own.peak_bytes for own in r.asked), default=None),
            text=humanize.size,
        ),
        Figure(
            title="sent and received",
            origin="counted",
            value=lambda r: _measured(r, lambda own: own.bytes_down + own.bytes_up),
            text=humanize.size,
        ),
        Figure(
            title="trained weights",
            origin="counted",
            value=lambda r: _results(r).trained_parameters,
            text=humanize.count,
        ),
        Figure(
            title="processor time here",
            origin="measured",
            # 0 where privacy rules out that clients say it.
            value=lambda r: _measured(r, lambda own: own.cpu_seconds or None),
            text=humanize.seconds,
        ),
    )
    head = element(
        "tr",
        element("td", None),
        *(element("th", _named(run), scope="col", class_="number") for run in runs),
    )
    bodies = [
        element("tbody", _group(title, len(runs)), *(_row(one, runs) for one in figures))
        for title, figures in (("What it can do", good), ("What it took", took))
    ]
    return element("table", element("thead", head), *bodies, class_="arms")


def _group(title: str, runs: int) -> Html:
    return element("tr", element("th", title, scope="rowgroup", colspan=runs + 1), class_="group")


def _row(figure: Figure, runs: Sequence[Federation]) -> Html:
    title = joined([figure.title, element("small", figure.origin)], " ")
    cells = []
    for run in runs:
        value = figure.value(run)
        text = humanize.MISSING if value is None else figure.text(value)
        cells.append(element("td", text, class_="number"))
    return element("tr", element("th", title, scope="row"), *cells)


# --- score against what is spent ------------------------------------------------------------------


def _curves(runs: Sequence[Federation]) -> list[Html]:
    """Score against time, bytes and energy."""
    drawn = [run for run in runs if len(run.rounds) > 1]
    if not drawn:
        return []
    unit, seconds = _time_unit(max(run.rounds[-1].seconds for run in drawn))
    costs = (
        Cost(
            title=f"{unit} on the devices (modelled)",
            value=lambda end: end.seconds / seconds,
            text=humanize.tick,
        ),
        Cost(
            title="bytes sent and received (counted)",
            value=lambda end: end.bytes,
            text=lambda value: _with_unit(value, "B"),
        ),
        Cost(
            title="energy of the clients (modelled)",
            value=lambda end: end.joules,
            text=lambda value: _with_unit(value, "J"),
        ),
    )
    key = paragraph(*(together(_named(run), " ") for run in drawn), class_="key")
    return [key, *(_curve(drawn, cost) for cost in costs)]


def _curve(runs: Sequence[Federation], cost: Cost) -> Html:
    metric = runs[0].metric
    series = []
    for run in runs:
        places = [Place(cost.value(end), end.score) for end in run.rounds]
        series.append(Series(name=run.name, color=run.color, raw=(), line=places, marks=()))
    ends = "; ".join(f"{one.name} ends at {humanize.fixed(one.end.y)}" for one in series)
    title = f"validation {metric}" + (", nats" if metric == "loss" else "")
    chart = Chart(
        x=Axis(0.0, max(one.line[-1].x for one in series) or 1.0),
        y=axis_around([place.y for one in series for place in one.line]),
        x_title=cost.title,
        y_title=title,
        x_text=cost.text,
        description=f"{title} of each method against {cost.title}: {ends}.",
        height=220,
        names=True,
    )
    return line_chart(series, chart)


def _time_unit(longest: float) -> tuple[str, float]:
    for name, seconds in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 3 * seconds:
            return name, seconds
    return "seconds", 1.0


def _with_unit(value: float, unit: str) -> str:
    text = humanize.tick(value)
    return text if value == 0 else text + (unit if humanize.GAP in text else humanize.GAP + unit)


# --- what was dropped, and what was kept ----------------------------------------------------------


def _choices(run: Federation) -> Html | None:
    """Per kind of device, which rates its clients got as the rounds went by."""
    rates = sorted({own.rate for own in run.asked}, reverse=True)
    if len(rates) < 2:
        return None
    columns = min(MOST_COLUMNS, max(own.round for own in run.asked))
    last = max(own.round for own in run.asked)
    tables = []
    for device in sorted({own.device for own in run.asked}):
        mine = [own for own in run.asked if own.device == device]
        rows = []
        for rate in rates:
            shares: list[float | None] = []
            for column in range(columns):
                here = [own for own in mine if (own.round - 1) * columns // last == column]
                hits = sum(own.rate == rate for own in here)
                shares.append(hits / len(here) if here else None)
            got = sum(own.rate == rate for own in mine)
            label = humanize.percent(rate) if rate else "none"
            rows.append((label, strip(shares, color=run.color), f"{got} of {len(mine)}"))
        tables.append(element("h4", device))
        tables.append(_strips(rows, f"Rates given to clients on {device}, by round."))
    return together(
        element("h3", "Layers dropped by ", _named(run), ", by kind of device"),
        paragraph(
            f"Columns: rounds 1 to {last}. The fuller a cell, the more of the round's clients on "
            "that device were told to drop such a share of the layers; empty: none of them was "
            "asked."
        ),
        *tables,
    )


def _kept(run: Federation) -> Html | None:
    """Clients by layers: which client keeps which layer for itself."""
    clients = _results(run).clients.each
    if run.shared is None or not any(one.personal_layers for one in clients):
        return None
    rows = []
    for layer in reversed(range(run.shared.num_layers)):
        cells = [
            float(layer in one.personal_layers) if one.client in run.shared.clients else None
            for one in clients
        ]
        keepers = sum(layer in one.personal_layers for one in clients)
        rows.append((f"layer {layer + 1}", strip(cells, color=run.color), f"{keepers} keep it"))
    never = sum(one.client not in run.shared.clients for one in clients)
    absent = f" {humanize.plural(never, 'client')} never took part." if never else ""
    return together(
        element("h3", "Layers that clients of ", _named(run), " keep for themselves"),
        paragraph(
            "Columns: clients; the top layer is on top. Filled: the client keeps the layer; "
            f"pale: it shares it with all.{absent}"
        ),
        _strips(rows, "Which client keeps which layer."),
    )


def _strips(rows: Sequence[tuple[str, Html, str]], description: str) -> Html:
    body = [
        element(
            "tr",
            element("th", label, scope="row"),
            element("td", cells),
            element("td", text, class_="number"),
        )
        for label, cells, text in rows
    ]
    return element("table", element("tbody", *body), class_="bars", aria_label=description)


# --- clients --------------------------------------------------------------------------------------


def _clients(runs: Sequence[Federation]) -> Html | None:
    """The score of every client, by run, with the mean and the worst decile."""
    if not runs:
        return None
    metric = runs[0].metric
    values = {
        run.name: [float(getattr(one.personal, metric)) for one in _results(run).clients.each]
        for run in runs
    }
    axis = axis_around([value for own in values.values() for value in own])
    rows = []
    for run in runs:
        spread = _results(run).clients.personal
        mean, worst = (spread[f"{metric}_{name}"] for name in ("mean", "worst_decile"))
        picture = client_row(values[run.name], axis, mean=mean, worst=worst, color=run.color)
        text = joined(
            [
                element("span", _score(mean, metric)),
                element("small", f"worst decile {_score(worst, metric)}"),
            ],
            " ",
        )
        rows.append(
            element(
                "tr",
                element("th", _named(run), scope="row"),
                element("td", picture),
                element("td", text, class_="number"),
            )
        )
    unit = "own models" + (", nats" if metric == "loss" else "")
    scale = element(
        "tr",
        element("td", None),
        element("td", ruler(axis, lambda value: humanize.fixed(value, 2))),
        element("td", None),
    )
    table = element(
        "table",
        element("tbody", *rows, scale),
        class_="bars clients",
        aria_label=f"{metric} of each client's test rows.",
    )
    better = "right is better" if metric == "accuracy" else "left is better"
    return together(
        element("h3", f"{metric.capitalize()} of each client (measured)"),
        paragraph(
            f"A dot for each client: its test rows by its {unit}; {better}. Long line: mean of all "
            "clients; short line: mean of the worst tenth of them."
        ),
        table,
    )


# --- privacy --------------------------------------------------------------------------------------


def _promises(runs: Sequence[Federation]) -> Html | None:
    """What is kept from whom, and what of the budgets is spent."""
    said = [_promise(run) for run in runs if _results(run).privacy]
    return together(element("h3", "Privacy"), *said) if said else None


def _promise(run: Federation) -> Html:
    privacy = _results(run).privacy
    parts = []
    if (own := privacy.get("client")) is not None:
        parts.append(
            f"any one client barely matters to what is released: epsilon "
            f"{humanize.fixed(own['epsilon'], 2)} of {own['budget']:g} is spent, at delta "
            f"{own['delta']:g}; costs are expectations over who may be drawn"
        )
    if (own := privacy.get("records")) is not None:
        parts.append(
            f"any one row barely matters to what its client sends: a budget of epsilon "
            f"{own['budget']:g} at delta {own['delta']:g} for each client"
        )
    if "secure_sum" in privacy:
        parts.append("the server learns the sum over clients alone")
    if privacy.get("randomness") == "reproducible":
        parts.append("the noise is reproducible, so nothing is protected here")
    return paragraph(_named(run), ": ", "; ".join(parts), ". No client is scored.")
