"""What low rank does inside: effective ranks as heat-maps, a row per layer, a column per linear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from samara.report import humanize
from samara.report.analysis_inputs import (
    Analysis,
    AnalyzedModel,
    RankAllocation,
    RankSite,
)
from samara.report.charts import Chart, Series, line_chart
from samara.report.inputs import Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import color
from samara.report.scales import Axis, Place, axis_around
from samara.report.section import Section, missing

SPACES = {
    "output": "Outputs of the linears",
    "input": "Inputs of the linears",
    "bottleneck": "Low-rank bottlenecks, before their nonlinearity",
    "activated": "Low-rank bottlenecks, after their nonlinearity",
}
STRONGEST = 46  # per cent of the hue in the darkest cell: the page's ink stays readable on it
SWATCHES = 5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a heat-map."""

    text: str
    beside: str | None
    """A second number, small."""
    share: float
    """Of its width: how strong the colour is."""
    words: str


def ranks(inputs: Inputs) -> Section | None:
    """The effective ranks of an analysis; nothing where the report names none."""
    if inputs.config.analysis is None:
        return None
    analysis = inputs.analysis
    body = missing(inputs.analysis_note) if analysis is None else _body(analysis, inputs)
    return Section(id="ranks", title="Rank inside", aside=_aside(analysis), body=body)


def _aside(analysis: Analysis | None) -> Html:
    held = "most" if analysis is None else humanize.percent(analysis.alphas[0])
    return together(
        paragraph(
            "One row per layer, the first at the bottom. A number is the effective rank: how many "
            f"directions hold {held} of the energy of the activations there. The stronger the "
            "colour, the larger a share of the width they are."
        ),
        paragraph(
            "The first number counts the mean as a direction like any other, as CoLA's paper does. "
            "Where all tokens share one strong direction it is close to 1, whatever else is going "
            "on; the small number is the rank with the mean taken away."
        ),
    )


def _body(analysis: Analysis, inputs: Inputs) -> Html:
    top = _top(analysis)
    parts: list[Html | None] = [paragraph(_findings(analysis))]
    parts += [
        paragraph(f"{name}: {model.warning}.", class_="missing")
        for name, model in analysis.models.items()
        if model.warning
    ]
    parts.append(_legend(top))
    for space, title in SPACES.items():
        panels = [
            _panel(name, _names(name, inputs), _cells(sites), top)
            for name, model in analysis.models.items()
            if (sites := [site for site in model.final if site.space == space])
        ]
        if panels:
            parts += [element("h3", title), element("div", *panels, class_="heat-maps")]
    parts.append(_over_training(analysis, inputs))
    if analysis.allocation is not None:
        parts.append(_allocation(analysis.allocation, analysis, inputs, top))
    return together(*parts)


def _top(analysis: Analysis) -> float:
    """The share of the strongest colour, common to all maps."""
    return max(site.share for model in analysis.models.values() for site in model.final)


def _mean_share(sites: Iterable[RankSite], space: str, *, centred: bool = False) -> float:
    shares = [
        site.centred_share if centred else site.share for site in sites if site.space == space
    ]
    return sum(shares) / len(shares)


def _needs(sites: Sequence[RankSite], space: str) -> str:
    without = _mean_share(sites, space, centred=True)
    return (
        f"{humanize.percent(_mean_share(sites, space))} "
        f"({humanize.percent(without)} with the mean taken away)"
    )


def _findings(analysis: Analysis) -> str:
    said = [
        f"{name}: {_needs(model.final, 'output')} at the outputs, "
        f"{_needs(model.final, 'input')} at the inputs"
        for name, model in analysis.models.items()
    ]
    fewest = min(model.num_tokens for model in analysis.models.values())
    return (
        f"Share of the width that holds {humanize.percent(analysis.alphas[0])} of the energy, on "
        f"average over layers and linears, measured over {humanize.whole(fewest)} tokens. "
        f"{'. '.join(said)}."
    )


def _names(name: str, inputs: Inputs) -> str | None:
    """The class of the arm's colour, where the model is one of the page's arms."""
    arm = next((one for one in inputs.arms if one.name == name), None)
    return None if arm is None else f"arm s{color(arm)}"


def _legend(top: float) -> Html:
    steps = [index / (SWATCHES - 1) for index in range(SWATCHES)]
    swatches = [
        element("span", humanize.percent(step**2 * top), class_="heat", style=_strength(step**2))
        for step in steps
    ]
    return element("p", "share of the width ", *swatches, class_="heat-legend")


def _strength(share: float) -> str:
    # By the root: most shares are small, and the first layer's would leave the rest pale.
    return f"--heat: {math.sqrt(share) * STRONGEST:.1f}%"


def _cells(sites: Sequence[RankSite]) -> dict[tuple[int, str], Cell]:
    return {
        (site.layer, site.projection): Cell(
            text=humanize.whole(site.ranks[0]),
            beside=humanize.whole(site.centred_ranks[0]),
            share=site.share,
            words=f"layer {site.layer + 1}, {site.projection}: rank {site.ranks[0]} of "
            f"{site.width}; {site.centred_ranks[0]} with the mean taken away",
        )
        for site in sites
    }


def _panel(
    title: str, class_: str | None, cells: Mapping[tuple[int, str], Cell], top: float
) -> Html:
    """One heat-map: a table, so that it can be read, copied and printed as numbers."""
    columns = list(dict.fromkeys(name for _, name in cells))
    head = element(
        "tr",
        element("th", "layer", scope="col"),
        *(element("th", name.removesuffix("_proj"), scope="col") for name in columns),
    )
    rows = [
        element(
            "tr",
            element("th", str(layer + 1), scope="row"),
            *(_cell(cells.get((layer, name)), top) for name in columns),
        )
        for layer in sorted({layer for layer, _ in cells}, reverse=True)
    ]
    return element(
        "figure",
        element("figcaption", element("b", title, class_=class_)),
        element(
            "div",
            element("table", element("thead", head), element("tbody", *rows), class_="heat-map"),
            class_="scroll",
        ),
    )


def _cell(cell: Cell | None, top: float) -> Html:
    if cell is None:
        return element("td")
    strength = _strength(cell.share / top if top else 0.0)
    beside = None if cell.beside is None else element("small", cell.beside)
    text = together(cell.text, None if beside is None else " ", beside)
    return element("td", text, class_="heat", style=strength, title=cell.words)


def _over_training(analysis: Analysis, inputs: Inputs) -> Html | None:
    """The mean share at the outputs over the checkpoints of each model."""
    series = [
        Series(
            name=f"{name}, without mean" if centred else name,
            color=_series_color(name, index, inputs),
            raw=(),
            line=line,
            marks=line,
        )
        for index, (name, model) in enumerate(analysis.models.items())
        for centred in (False, True)
        if len(line := _line(model, centred=centred)) > 1
    ]
    if not series:
        return None
    places = [place for one in series for place in one.line]
    ends = "; ".join(f"{one.name} ends at {humanize.fixed(one.end.y)}" for one in series)
    chart = Chart(
        x=Axis(0.0, max(place.x for place in places)),
        y=axis_around([place.y for place in places]),
        x_title="training step",
        y_title="rank over width, mean of all outputs",
        x_text=humanize.tick,
        description=f"Effective rank at the outputs by training step: {ends}.",
        height=240,
        names=True,
    )
    return together(element("h3", "During training"), line_chart(series, chart))


def _line(model: AnalyzedModel, *, centred: bool) -> list[Place]:
    return [
        Place(float(one.step), _mean_share(one.sites, "output", centred=centred))
        for one in model.measurements
        if one.step is not None
    ]


def _series_color(name: str, index: int, inputs: Inputs) -> int:
    arm = next((one for one in inputs.arms if one.name == name), None)
    return index % 8 if arm is None else color(arm)


def _allocation(found: RankAllocation, analysis: Analysis, inputs: Inputs, top: float) -> Html:
    """The ranks that a budget buys, drawn like those that were measured."""
    widths = {
        (site.layer, site.projection): site.width
        for site in analysis.models[found.model].final
        if site.space == "output"
    }
    cells = {
        (layer, name): Cell(
            text=humanize.whole(rank),
            beside=None,
            share=min(rank / widths[layer, name], top),
            words=f"layer {layer + 1}, {name}: rank {rank}",
        )
        for layer, own in enumerate(found.ranks)
        for name, rank in own.items()
    }
    return together(
        element("h3", "Ranks that a budget buys"),
        paragraph(
            f"{humanize.whole(found.parameters)} parameters in the linears, "
            f"{humanize.percent(found.parameters / found.dense_parameters)} of the dense ones', "
            f"given to where they hold most: {humanize.percent(found.captured)} of the outputs' "
            f"energy on average{', the mean taken away' if found.centred else ''}. Whether a model "
            "with these ranks learns better is for a training run to say."
        ),
        element(
            "div",
            _panel(f"from {found.model}", _names(found.model, inputs), cells, top),
            class_="heat-maps",
        ),
    )
