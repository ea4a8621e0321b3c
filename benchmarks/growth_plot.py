"""The picture of the growth benchmark: how well the loss after k steps ranks as the last one does.

One panel per objective, for their intervals overlap: the mean over seeds as a line, its interval as
a band, each seed as a faint dot. The axis of k is logarithmic; 0 has a place of its own before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from growth_findings import Foretold, foretold, grown, objectives

from samara.report.markup import Html, element, together
from samara.report.page import page_colors
from samara.report.scales import Axis

LEFT, TOP, BOTTOM, RIGHT = 52, 74, 48, 16
WIDTH, HEIGHT, GAP = 258, 220, 26
INSET = 14  # from a panel's edge to its first and last rung
CORRELATIONS = Axis(-1.0, 1.0)
STYLE = """
svg { font-family: var(--sans); }
.ground { fill: var(--paper); }
.title { fill: var(--c); font-size: 14px; font-weight: 600; }
.head { fill: var(--ink); font-size: 13px; }
.tick, .sub { fill: var(--muted); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.tick.x { text-anchor: middle; }
.tick.y { text-anchor: end; }
.grid { stroke: var(--rule); }
.zero { stroke: var(--strong-rule); }
.band { fill: var(--c); opacity: .16; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.mean { fill: var(--c); }
.seed { fill: var(--c); opacity: .45; }
"""


def picture(files: Sequence[Any]) -> str:
    """An SVG that stands alone, of the first file."""
    rows = files[0]["rows"]
    shown = objectives(rows)
    width = LEFT + len(shown) * (WIDTH + GAP) - GAP + RIGHT
    height = TOP + HEIGHT + BOTTOM
    panels = []
    for number, objective in enumerate(shown):
        pool = grown(rows, objective)
        size = f"{len(next(iter(pool.values())))} operators, {len(pool)} seeds"
        panels.append(
            element(
                "g",
                element("text", objective, class_="title", y=-24),
                element("text", size, class_="sub", y=-9),
                _panel(foretold(pool), with_scale=number == 0),
                class_=f"s{1 + number % 7}",
                transform=f"translate({LEFT + number * (WIDTH + GAP)} {TOP})",
            )
        )
    head = "Rank correlation (Spearman) of the loss k steps after growth with the last loss"
    foot = (
        "k, steps (logarithmic, 0 before the scale); line: mean over seeds; "
        "band: its 95 % interval; small dots: seeds"
    )
    return (
        element(
            "svg",
            element("style", Html(page_colors() + STYLE)),
            element("rect", class_="ground", width="100%", height="100%"),
            element("text", head, class_="head", x=LEFT, y=24),
            together(*panels),
            element("text", foot, class_="sub", x=LEFT, y=height - 10),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            role="img",
            aria_label=head,
        )
        + "\n"
    )


def _panel(findings: Sequence[Foretold], *, with_scale: bool) -> Html:
    places = _places([one.step for one in findings])
    points = [(places[one.step], one) for one in findings]
    upper = [_point(x, one.spearman.high) for x, one in points]
    lower = [_point(x, one.spearman.low) for x, one in reversed(points)]
    middle = [_point(x, one.spearman.value) for x, one in points]
    return together(
        _grid(with_scale=with_scale),
        *(element("text", str(k), class_="tick x", x=x, y=HEIGHT + 18) for k, x in places.items()),
        element("polygon", class_="band", points=" ".join(upper + lower)),
        element("polyline", class_="line", points=" ".join(middle)),
        *(_dot(x, value, "seed", 2.5) for x, one in points for value in one.by_seed),
        *(_dot(x, one.spearman.value, "mean", 4.0) for x, one in points),
    )


def _grid(*, with_scale: bool) -> Html:
    parts = []
    for value in CORRELATIONS.ticks(4):
        y = _y(value)
        style = "zero" if value == 0.0 else "grid"
        parts.append(element("line", class_=style, x1=0, x2=WIDTH, y1=y, y2=y))
        if with_scale:
            text = f"{value:+.1f}" if value else "0"
            parts.append(element("text", text, class_="tick y", x=-8, y=y, dy="0.32em"))
    return together(*parts)


def _places(steps: Sequence[int]) -> dict[int, float]:
    """Where each k stands; 0 a doubling and a half before the first of the others."""
    logs = {step: math.log2(step) for step in steps if step}
    if 0 in steps:
        logs[0] = min(logs.values()) - 1.5
    axis = Axis(min(logs.values()), max(logs.values()))
    return {
        step: round(INSET + axis.share(logs[step]) * (WIDTH - 2 * INSET), 1)
        for step in sorted(steps)
    }


def _y(value: float) -> float:
    return round(HEIGHT * (1 - CORRELATIONS.share(value)), 1)


def _point(x: float, value: float) -> str:
    return f"{x},{_y(value)}"


def _dot(x: float, value: float, style: str, radius: float) -> Html:
    return element("circle", class_=style, cx=x, cy=_y(value), r=radius)
