"""The charts: SVG that is as wide as its place, with text of constant size, in the page's colours.

Places are percentages of the plot, which has no view box of its own; only curves live in a nested
one that is stretched, with strokes that are not. So one picture serves a wide screen, a phone and
paper, in light and dark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from samara.report.humanize import fixed, shortened
from samara.report.markup import Html, element, joined, together
from samara.report.scales import Axis, Place, some, spread, thinned, tick_places

LABEL_GAP = 17.0  # pixels between two labels at the ends of curves
MOST_DRAWN = 500  # points of a curve: more than a screen shows
MOST_HOVERED = 160
MOST_DOTS = 24
GRID = 10_000  # units of the stretched view box


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a chart."""

    name: str
    color: int
    """Which of the page's series colours."""
    raw: Sequence[Place]
    """Drawn faint."""
    line: Sequence[Place]
    marks: Sequence[Place]
    """Drawn as dots."""

    @property
    def end(self) -> Place:
        """The place that the label belongs to."""
        return self.marks[-1] if self.marks else self.line[-1]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """How curves are shown."""

    x: Axis
    y: Axis
    x_title: str
    y_title: str
    x_text: Callable[[float], str]
    """A value of x in words."""
    description: str
    """What a reader who does not see it should know."""
    height: int
    names: bool
    """Write names at the ends of the curves, not only values."""
    mark: float | None = None
    """A place on x to mark from top to bottom."""


def line_chart(series: Sequence[Series], chart: Chart) -> Html:
    """Curves over a common x, each with its name and last value at its end."""
    plot = element(
        "svg",
        _grid(chart),
        element(
            "svg",
            *(_curves(one, chart) for one in series),
            viewBox=f"0 0 {GRID} {GRID}",
            preserveAspectRatio="none",
            width="100%",
            height="100%",
        ),
        *(_dots(one, chart) for one in series),
        _end_labels(series, chart),
        element("line", class_="cursor", y1="0", y2="100%", x1="0", x2="0", visibility="hidden"),
        class_="plot",
        height=chart.height,
        role="img",
        aria_label=chart.description,
    )
    return element(
        "div",
        element("div", chart.y_title, class_="axis-title"),
        plot,
        element("div", chart.x_title, class_="axis-title x"),
        element("div", class_="readout", aria_live="polite", hidden=True),
        class_="chart named" if chart.names else "chart",
        tabindex=0,
        role="group",
        aria_label=f"{chart.y_title} over {chart.x_title}; arrow keys read values",
        data_values=_hover_values(series, chart),
    )


def _grid(chart: Chart) -> Html:
    lines = []
    y_ticks = chart.y.ticks(6)
    for tick in y_ticks:
        y = _percent(1 - chart.y.share(tick))
        lines.append(element("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        text = fixed(tick, tick_places(y_ticks))
        lines.append(element("text", text, class_="tick y", x=-8, y=y, dy="0.32em"))
    for tick in chart.x.ticks(5):
        x = _percent(chart.x.share(tick))
        lines.append(element("line", class_="stub", x1=x, x2=x, y1="100%", y2=chart.height + 4))
        lines.append(element("text", chart.x_text(tick), class_="tick x", x=x, y=chart.height + 18))
    lines.append(element("line", class_="axis", x1="0", x2="100%", y1="100%", y2="100%"))
    if chart.mark is not None:
        x = _percent(chart.x.share(chart.mark))
        lines.append(element("line", class_="mark", x1=x, x2=x, y1="0", y2="100%"))
    return joined(lines)


def _curves(one: Series, chart: Chart) -> Html:
    return element(
        "g",
        element("path", class_="raw", d=_path(thinned(one.raw, most=MOST_DRAWN), chart)),
        element("path", class_="line", d=_path(thinned(one.line, most=MOST_DRAWN), chart)),
        class_=f"series s{one.color}",
    )


def _path(curve: Sequence[Place], chart: Chart) -> str | None:
    """Steps of a curve in the stretched view box; what lies above the plot is cut at its edge."""
    if len(curve) < 2:
        return None
    parts: list[str] = []
    inside = False
    for before, point in zip([curve[0], *curve[:-1]], curve, strict=True):
        if point.y > chart.y.high:
            if inside:
                parts.append(_step("L", _crossing(before, point, chart.y.high), chart))
            inside = False
            continue
        if not inside:
            entry = _crossing(before, point, chart.y.high) if before.y > chart.y.high else point
            parts.append(_step("M", entry, chart))
        parts.append(_step("L", point, chart))
        inside = True
    return "".join(parts) or None


def _crossing(first: Place, second: Place, y: float) -> Place:
    share = (y - first.y) / (second.y - first.y)
    return Place(first.x + share * (second.x - first.x), y)


def _step(command: str, point: Place, chart: Chart) -> str:
    x = round(GRID * chart.x.share(point.x))
    y = round(GRID * (1 - chart.y.share(point.y)))
    return f"{command}{x} {y}"


def _dots(one: Series, chart: Chart) -> Html:
    shown = [point for point in some(one.marks, most=MOST_DOTS) if point.y <= chart.y.high]
    dots = [
        element(
            "circle",
            cx=_percent(chart.x.share(point.x)),
            cy=_percent(1 - chart.y.share(point.y)),
            r=3.5,
        )
        for point in shown
    ]
    return element("g", *dots, class_=f"series s{one.color}")


def _end_labels(series: Sequence[Series], chart: Chart) -> Html:
    """Names and values right of the plot, moved apart, with a thread to the curve's end."""
    shown = [one for one in series if one.line or one.marks]
    wished = [chart.height * (1 - chart.y.share(one.end.y)) for one in shown]
    placed = spread(wished, gap=LABEL_GAP, low=4, high=chart.height - 4)
    labels, leads = [], []
    for one, from_y, to_y in zip(shown, wished, placed, strict=True):
        texts = [element("tspan", fixed(one.end.y, 3), class_="value")]
        if chart.names:
            name = shortened(one.name, 20)
            texts.append(element("tspan", name, class_="name", dx=6))
        thread = element(
            "path",
            class_="thread",
            d=f"M4 {from_y:.1f}C14 {from_y:.1f} 10 {to_y:.1f} 20 {to_y:.1f}",
        )
        text = element("text", *texts, x=24, y=round(to_y, 1), dy="0.34em")
        labels.append(element("g", thread, text, class_=f"series s{one.color}"))
        if chart.x.share(one.end.x) < 0.99:
            leads.append(_lead(one, chart))
    # A place of its own at the right edge: inside it, pixels count from there.
    ends = element("svg", *labels, x="100%", y=0, width=1, height=1, class_="ends")
    return together(*leads, ends)


def _lead(one: Series, chart: Chart) -> Html:
    """From the end of a curve that stops early to the edge where its label stands."""
    y = _percent(1 - chart.y.share(one.end.y))
    x = _percent(chart.x.share(one.end.x))
    line = element("line", class_="lead", x1=x, x2="100%", y1=y, y2=y)
    return element("g", line, class_=f"s{one.color}")


def _hover_values(series: Sequence[Series], chart: Chart) -> str:
    """What the reading cursor shows: per series its name and (place, x in words, value)."""
    data = []
    for one in series:
        points = thinned(one.line, most=MOST_HOVERED)
        data.append(
            {
                "name": one.name,
                "color": one.color,
                "at": [round(chart.x.share(p.x), 4) for p in points],
                "x": [chart.x_text(p.x) for p in points],
                "y": [fixed(p.y, 3) for p in points],
            }
        )
    return json.dumps({"title": chart.x_title, "series": data}, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar from zero."""

    label: str
    value: float
    text: str
    strong: bool = False


def bars(rows: Sequence[Bar], *, description: str) -> Html:
    """Horizontal bars as a table: label, bar, value."""
    longest = max((row.value for row in rows), default=0) or 1
    body = [
        element(
            "tr",
            element("th", row.label, scope="row"),
            element("td", bar(row.value / longest, strong=row.strong)),
            element("td", row.text, class_="number"),
        )
        for row in rows
    ]
    return element("table", element("tbody", *body), class_="bars", aria_label=description)


def bar(share: float, *, strong: bool = False) -> Html:
    """One bar, ``share`` of the width of its place."""
    return element(
        "svg",
        element("rect", width=_percent(share), height="100%", rx=1.5),
        class_="series strong" if strong else "series neutral",
        width="100%",
        height=11,
        aria_hidden="true",
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a whole."""

    share: float
    style: str
    """Its CSS class, as ``s0`` or ``vocabulary``."""


def stacked_bar(pieces: Sequence[Piece], *, description: str) -> Html:
    """Parts of a whole side by side."""
    drawn = []
    left = 0.0
    for piece in pieces:
        x, width = _percent(left), _percent(piece.share)
        drawn.append(
            element("rect", x=x, width=width, height="100%", class_=f"piece {piece.style}")
        )
        left += piece.share
    return element(
        "svg",
        *drawn,
        class_="stack",
        width="100%",
        height=14,
        role="img",
        aria_label=description,
    )


def interval_mark(
    low: float | None, value: float, high: float | None, axis: Axis, *, color: int
) -> Html:
    """A point with its interval on a row of a forest plot, and the line at zero."""
    zero = _percent(axis.share(0))
    parts = [element("line", class_="zero", x1=zero, x2=zero, y1="0", y2="100%")]
    if low is not None and high is not None:
        x1, x2 = _percent(axis.share(low)), _percent(axis.share(high))
        parts.append(element("line", class_="interval", x1=x1, x2=x2, y1="50%", y2="50%"))
        for x in (x1, x2):
            parts.append(element("line", class_="cap", x1=x, x2=x, y1="30%", y2="70%"))
    parts.append(element("circle", cx=_percent(axis.share(value)), cy="50%", r=5.5))
    return element(
        "svg",
        *parts,
        class_=f"marks series s{color}",
        width="100%",
        height=38,
        aria_hidden="true",
    )


def dot_row(values: Sequence[tuple[int, float]], axis: Axis, *, at: float) -> Html:
    """Dots of one measure on a row, joined by a thread, with the line of the baseline."""
    shares = [axis.share(value) for _, value in values]
    line = _percent(axis.share(at))
    dots = [
        element("circle", cx=_percent(share), cy="50%", r=5.5, class_=f"series s{color}")
        for (color, _), share in zip(values, shares, strict=True)
    ]
    ends = [*shares, axis.share(at)]
    return element(
        "svg",
        element(
            "line",
            class_="reach",
            x1=_percent(min(ends)),
            x2=_percent(max(ends)),
            y1="50%",
            y2="50%",
        ),
        element("line", class_="zero", x1=line, x2=line, y1="0", y2="100%"),
        *dots,
        class_="marks",
        width="100%",
        height=26,
        aria_hidden="true",
    )


def strip(shares: Sequence[float | None], *, color: int) -> Html:
    """Cells side by side, each as full as its share says; None leaves its place empty."""
    width = 1 / max(1, len(shares))
    gap = 0.12 if len(shares) <= 60 else 0.0
    cells = [
        element(
            "rect",
            x=_percent(number * width),
            width=_percent((1 - gap) * width),
            height="100%",
            fill_opacity=round(0.1 + 0.9 * share, 3),
        )
        for number, share in enumerate(shares)
        if share is not None
    ]
    return element(
        "svg",
        *cells,
        class_=f"series strip s{color}",
        width="100%",
        height=14,
        aria_hidden="true",
    )


def client_row(
    values: Sequence[float], axis: Axis, *, mean: float, worst: float, color: int
) -> Html:
    """A dot per client, with the mean of all and that of the worst of them."""
    dots = [
        element("circle", cx=_percent(axis.share(value)), cy="50%", r=4, fill_opacity=0.4)
        for value in values
    ]
    lines = [
        element("line", class_="interval", x1=x, x2=x, y1=start, y2=end)
        for x, start, end in (
            (_percent(axis.share(mean)), "0", "100%"),
            (_percent(axis.share(worst)), "25%", "75%"),
        )
    ]
    return element(
        "svg",
        *dots,
        *lines,
        class_=f"marks series s{color}",
        width="100%",
        height=34,
        aria_hidden="true",
    )


def ruler(axis: Axis, text: Callable[[float], str], *, about: int = 5) -> Html:
    """The scale under rows of marks."""
    ticks = [
        together(
            element("line", class_="stub", x1=x, x2=x, y1=0, y2=5),
            element("text", text(tick), class_="tick x", x=x, y=18),
        )
        for tick in axis.ticks(about)
        for x in [_percent(axis.share(tick))]
    ]
    line = element("line", class_="axis", x1="0", x2="100%", y1="0", y2="0")
    return element("svg", line, *ticks, class_="ruler", width="100%", height=22, aria_hidden="true")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
