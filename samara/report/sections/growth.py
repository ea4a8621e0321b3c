"""How a model grew: the race of its operators, and what growing was worth against scratch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from samara.report import humanize
from samara.report.charts import Chart, Series, line_chart
from samara.report.inputs import Arm, Inputs, RaceCandidate, RaceStage
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import interval_text, named
from samara.report.scales import Axis, Place, axis_around
from samara.report.section import Section

EXACTNESS = {"exact": "same, bit for bit", "tolerance": "same, to rounding", "changes": "another"}


@dataclass(frozen=True)
class RungAxis(Axis):
    """Rungs side by side: their steps double, so a linear axis would hide the first ones."""

    def ticks(self, about: int = 5) -> list[float]:
        """Every rung."""
        del about
        return [float(rung) for rung in range(round(self.low), round(self.high) + 1)]


def growth(inputs: Inputs) -> Section | None:
    """The races of the arms that grew; nothing where none did."""
    grown = [arm for arm in inputs.arms if arm.races]
    if not grown:
        return None
    aside = together(
        paragraph(
            "Each candidate grew from the same checkpoint by another operator, read the same "
            "batches, and was measured on the same held-out rows after the same steps. The winner "
            "went on from there; what the others took is counted as the price of the choice."
        ),
        paragraph(
            "The dashed line marks where the ranking became what it was at the end of the race. "
            "Before it, losses right after growth mislead."
        ),
        paragraph(
            "One race is one seed and one order of the data. It says which operator was ahead "
            "here, not which is better."
        ),
    )
    parts: list[Html | None] = []
    for arm in grown:
        parts += [_race(arm, stage) for stage in arm.races]
        parts.append(_against_scratch(arm, inputs))
    return Section(id="growth", title="Growing", aside=aside, body=together(*parts))


def _race(arm: Arm, stage: RaceStage) -> Html:
    number = f", stage {stage.stage}" if len(arm.races) > 1 else ""
    ranked = _ranked(stage)
    rungs = sorted({step for one in ranked for step in one.losses})
    return together(
        element("h3", named(arm), number),
        paragraph(_findings(stage)),
        _plot(stage, ranked, rungs) if len(rungs) > 1 else None,
        element("div", _table(stage, ranked), class_="scroll"),
    )


def _ranked(stage: RaceStage) -> list[RaceCandidate]:
    """Winner first, then who came furthest, and of those the lowest loss."""
    return sorted(
        stage.candidates,
        key=lambda one: (
            one.label != stage.winner,
            -max(one.losses, default=-1),
            one.losses[max(one.losses)] if one.losses else 0.0,
            one.label,
        ),
    )


def _findings(stage: RaceStage) -> str:
    if stage.winner is None:
        return "The race is not over."
    if len(stage.candidates) == 1:
        return f"One operator, {stage.winner}: nothing to choose."
    said = (
        f"{stage.winner} went on after {humanize.plural(stage.k, 'step')} "
        f"({humanize.count(stage.k_tokens)} tokens, {humanize.percent(stage.k_share)} of the "
        f"stage), ranked by {stage.metric.replace('_', ' ')}"
    )
    if stage.undecided:
        others = [label for label in stage.undecided if label != stage.winner]
        said += f"; the race could not tell it from {humanize.listed(others)}"
    settled = ""
    if stage.settled_at:
        settled = f" The ranking settled at {humanize.plural(stage.settled_at, 'step')}."
    elif stage.settled_at == 0:
        settled = " The ranking was settled right after growth."
    elif stage.k:
        settled = " The ranking had not settled before the last rung."
    return (
        f"{said}. All candidates together took {humanize.flops(stage.spent_flops)}, "
        f"{humanize.flops(stage.net_flops)} of it beside the winner's own training.{settled}"
    )


def _plot(stage: RaceStage, ranked: Sequence[RaceCandidate], rungs: Sequence[int]) -> Html:
    place = {step: float(index) for index, step in enumerate(rungs)}
    series = [
        Series(
            name=one.label,
            color=index % 8,
            raw=(),
            line=points,
            marks=points,
        )
        for index, one in enumerate(ranked)
        if (points := [Place(place[step], loss) for step, loss in sorted(one.losses.items())])
    ]
    ends = "; ".join(f"{one.name} ends at {humanize.fixed(one.end.y)}" for one in series)
    chart = Chart(
        x=RungAxis(0.0, float(len(rungs) - 1)),
        y=axis_around([point.y for one in series for point in one.line]),
        x_title="steps since growth",
        y_title="validation loss, nats per token",
        x_text=lambda rung: humanize.tick(rungs[round(rung)]),
        description=f"Loss of each candidate by rung: {ends}.",
        height=300,
        names=True,
        mark=None if stage.settled_at is None else place.get(stage.settled_at),
    )
    return line_chart(series, chart)


def _table(stage: RaceStage, ranked: Sequence[RaceCandidate]) -> Html:
    titles = ("candidate", "function after growth", "loss before", "after", "at its end", "")
    numbers = {"loss before", "after", "at its end"}
    head = element(
        "tr",
        *(element("th", t, scope="col", class_="number" if t in numbers else None) for t in titles),
    )
    rows = [_row(stage, one, index) for index, one in enumerate(ranked)]
    return element("table", element("thead", head), element("tbody", *rows))


def _row(stage: RaceStage, one: RaceCandidate, index: int) -> Html:
    last = max(one.losses, default=None)
    return element(
        "tr",
        element(
            "th",
            element("b", one.label, class_=f"arm s{index % 8}"),
            element("small", f" {humanize.shortened(one.layer_map, 60)}"),
            scope="row",
        ),
        element("td", EXACTNESS[one.exactness]),
        element("td", humanize.fixed(stage.loss_before), class_="number"),
        element("td", _loss(one.losses.get(0)), class_="number"),
        element("td", _loss(None if last is None else one.losses[last]), class_="number"),
        element("td", _fate(stage, one)),
    )


def _loss(value: float | None) -> str:
    return humanize.MISSING if value is None else humanize.fixed(value)


def _fate(stage: RaceStage, one: RaceCandidate) -> str:
    if one.failure is not None:
        return f"failed: {humanize.shortened(one.failure, 60)}"
    if one.label == stage.winner:
        return "went on"
    joined = f"neighbour of {one.proposed_from}; " if one.proposed_from else ""
    if one.left_at is not None:
        return f"{joined}left after {humanize.plural(one.left_at, 'step')}"
    return f"{joined}not chosen"


def _against_scratch(arm: Arm, inputs: Inputs) -> Html | None:
    """The grown model beside those that did not grow, at the FLOPs that both have spent."""
    if arm.summary is None:
        return None
    rows = [
        row
        for other in inputs.finished
        if not other.races and (row := _scratch_row(arm, other)) is not None
    ]
    if not rows:
        return None
    titles = ("at equal total FLOPs", "its loss there", "grown", "difference")
    head = element(
        "tr",
        element("th", "from scratch", scope="col"),
        *(element("th", title, scope="col", class_="number") for title in titles),
    )
    total = humanize.flops(arm.total_flops)
    return together(
        paragraph(
            named(arm),
            f" took {total} in all: its source, the race and its own training. Losses are those of "
            "validation during training, between two measurements on a straight line.",
        ),
        element(
            "div",
            element("table", element("thead", head), element("tbody", *rows)),
            class_="scroll",
        ),
        _evaluated(arm, inputs.baseline),
    )


def _scratch_row(arm: Arm, other: Arm) -> Html | None:
    flops = min(arm.total_flops, other.total_flops)
    grown, scratch = _loss_at(arm, flops), _loss_at(other, flops)
    if grown is None or scratch is None:
        return None
    return element(
        "tr",
        element("th", named(other), scope="row"),
        element("td", humanize.flops(flops), class_="number"),
        element("td", humanize.fixed(scratch), class_="number"),
        element("td", humanize.fixed(grown), class_="number"),
        element("td", humanize.fixed(grown - scratch, sign=True), class_="number"),
    )


def _loss_at(arm: Arm, flops: float) -> float | None:
    """Validation loss when the run, its trials and its ancestors had taken ``flops``."""
    assert arm.summary is not None
    before = arm.total_flops - arm.summary.flops
    points = [(before + point.flops, point.loss) for point in arm.validation]
    for (x, first), (end, second) in itertools.pairwise(points):
        if x <= flops <= end and end > x:
            return first + (flops - x) / (end - x) * (second - first)
    if points and abs(points[-1][0] - flops) <= 1e-9 * flops:
        return points[-1][1]
    return None


def _evaluated(arm: Arm, baseline: Arm | None) -> Html | None:
    """What the evaluation says of the grown model against the report's baseline."""
    found = arm.comparison
    if found is None or baseline is None:
        return None
    interval = interval_text(found.loss_difference, 3, sign=True)
    return paragraph(
        f"In the end, {humanize.flops(arm.total_flops)} against "
        f"{humanize.flops(baseline.total_flops)} in all, its loss on held-out documents differs "
        "from that of ",
        named(baseline),
        f" by {humanize.fixed(found.loss_difference.value, sign=True)} {interval}: "
        f"{found.verdict}.",
    )
