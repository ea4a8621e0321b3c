"""Loss curves: against tokens, against FLOPs, against seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from samara.report import humanize
from samara.report.charts import Chart, Series, line_chart
from samara.report.inputs import Arm, Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import color, key, named
from samara.report.run_files import Point
from samara.report.scales import Axis, Place, axis_around, smoothed, some
from samara.report.section import Section, missing

SMOOTHING = 0.018  # standard deviation of the window, as a share of the run
WARM = 0.10  # the vertical axis starts where this share of the run is done


def curves(inputs: Inputs) -> Section | None:
    """Three views of the same losses, by what they had cost."""
    if not inputs.arms:
        return None
    drawn = [arm for arm in inputs.arms if len(arm.training) > 1]
    aside = together(
        paragraph(
            "Lines: training loss, each point a mean over neighbouring steps; the faint line is "
            "what was logged. Dots: loss on held-out text. The number at the end is the last dot."
        ),
        paragraph(
            "Left to right is what was spent. Equal tokens is the fair race of designs; equal "
            "FLOPs and equal seconds show what the cheaper designs leave unspent."
        ),
        *(paragraph(note) for note in _crossings(inputs)),
    )
    if not drawn:
        body = missing("No training loss has been logged yet.")
        return Section(id="curves", title="Learning", aside=aside, body=body)
    y = _loss_axis(drawn)
    start = max(arm.training[0].loss for arm in drawn)
    if start > y.high:
        above = f"Training starts at {humanize.fixed(start, 1)}, above the plots."
        aside = together(aside, paragraph(above))
    body = together(
        key(drawn),
        _chart(drawn, y, "tokens", lambda p: p.tokens, humanize.tick, height=340),
        element(
            "div",
            _chart(drawn, y, "training FLOPs", lambda p: p.flops, humanize.tick, height=220),
            _chart(drawn, y, "seconds of training", lambda p: p.seconds, humanize.tick, height=220),
            class_="pair",
        ),
        _numbers(drawn),
    )
    return Section(id="curves", title="Learning", aside=aside, body=body)


def _loss_axis(arms: Sequence[Arm]) -> Axis:
    """A common axis without the first steep fall, which would flatten all that follows."""
    values: list[float] = []
    for arm in arms:
        start = arm.training[-1].tokens * WARM
        losses = [point.loss for point in arm.training if point.tokens >= start]
        values += losses or [arm.training[-1].loss]
        values += [point.loss for point in arm.validation if point.tokens >= start]
    return axis_around(values, padding=0.04)


def _chart(
    arms: Sequence[Arm],
    y: Axis,
    title: str,
    x_of: Callable[[Point], float],
    text: Callable[[float], str],
    *,
    height: int,
) -> Html:
    most = max(x_of(arm.training[-1]) for arm in arms)
    x = Axis(0.0, most or 1.0)
    series = []
    for arm in arms:
        raw = [Place(x_of(point), point.loss) for point in arm.training]
        means = _means(arm)
        series.append(
            Series(
                name=arm.name,
                color=color(arm),
                raw=raw,
                line=[Place(at.x, mean) for at, mean in zip(raw, means, strict=True)],
                marks=[Place(x_of(point), point.loss) for point in arm.validation],
            )
        )
    ends = "; ".join(f"{one.name} ends at {humanize.fixed(one.end.y)}" for one in series)
    chart = Chart(
        x=x,
        y=y,
        x_title=title,
        y_title="loss, nats per token",
        x_text=text,
        description=f"Loss against {title}: {ends}.",
        height=height,
        names=height > 300,
    )
    return line_chart(series, chart)


def _means(arm: Arm) -> list[float]:
    """The smoothed training losses: over tokens, so that every view shows the same curve."""
    losses = [Place(point.tokens, point.loss) for point in arm.training]
    return [at.y for at in smoothed(losses, width=SMOOTHING * (losses[-1].x or 1.0))]


def _crossings(inputs: Inputs) -> list[Html]:
    """When each arm passed the loss at which the baseline ended."""
    baseline = inputs.baseline
    if baseline is None or baseline.summary is None or not baseline.validation:
        return []
    goal, spent = baseline.validation[-1].loss, baseline.validation[-1].flops
    notes = []
    for arm in inputs.arms:
        if arm is baseline or not arm.validation or not spent:
            continue
        reached = next((point for point in arm.validation if point.loss <= goal), None)
        if reached is not None:
            said = f" got there with {humanize.percent(reached.flops / spent)} of the FLOPs."
        else:
            share = humanize.percent(arm.validation[-1].flops / spent)
            said = f" did not get there; it spent {share} of the FLOPs."
        notes.append(together(" ", named(arm), said))
    if not notes:
        return []
    return [together(named(baseline), f" ended at {humanize.fixed(goal)}.", *notes)]


def _numbers(arms: Sequence[Arm]) -> Html | None:
    """The dots as a table, for those who read numbers, or cannot see the picture."""
    steps = sorted({point.step for arm in arms for point in arm.validation})
    if not steps:
        return None
    by_arm = [{point.step: point for point in arm.validation} for arm in arms]
    rows = []
    for step in some(steps, most=24):
        tokens = next(points[step].tokens for points in by_arm if step in points)
        losses = (
            humanize.fixed(points[step].loss) if step in points else humanize.MISSING
            for points in by_arm
        )
        rows.append(
            element(
                "tr",
                element("th", humanize.whole(step), scope="row", class_="number"),
                element("td", humanize.count(tokens), class_="number"),
                *(element("td", loss, class_="number") for loss in losses),
            )
        )
    head = element(
        "tr",
        element("th", "step", scope="col", class_="number"),
        element("th", "tokens", scope="col", class_="number"),
        *(element("th", named(arm), scope="col", class_="number") for arm in arms),
    )
    table = element("table", element("thead", head), element("tbody", *rows))
    return element(
        "details",
        element("summary", "The dots as numbers"),
        element("div", table, class_="scroll"),
    )
