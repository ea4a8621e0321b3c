"""The shape of designs: heads, FFN width and rank of every layer, drawn to one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from samara.measure.budget import Budget, LayerBudget
from samara.report import humanize
from samara.report.inputs import Inputs
from samara.report.markup import Html, element, joined, paragraph, together
from samara.report.measures import color
from samara.report.section import Section, missing

WIDTH = 270  # units of the drawing: about the pixels of a column
EDGE = 37  # room for the numbers at both sides
TOP = 20
TEXT_ROW = 12  # height of a line of numbers


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A design to draw."""

    name: str
    color: int
    """Which of the page's eight series colours it has."""
    budget: Budget

    @property
    def layers(self) -> tuple[LayerBudget, ...]:
        return self.budget.layers

    @property
    def caption(self) -> str:
        """Its measures in a line."""
        ranks = {_rank_text(layer) for layer in self.layers if _rank(layer)}
        rank = f", rank {ranks.pop()}" if len(ranks) == 1 else ", low rank" if ranks else ""
        return (
            f"{len(self.layers)} layers, {humanize.whole(self.budget.hidden_size)} wide, heads of "
            f"{self.layers[0].head_dim}{rank}"
        )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where things stand in the drawing of every design."""

    scale: float
    """Units per column of a matrix."""
    left: float
    """Where attention starts, growing to the left."""
    right: float
    """Where the FFN starts, growing to the right."""
    row: float
    """Height of a layer."""

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def shape(inputs: Inputs) -> Section | None:
    """Small multiples: one tree per arm, the first layer at the bottom."""
    if not inputs.arms:
        return None
    shown = [
        Shape(name=arm.name, color=color(arm), budget=arm.budget)
        for arm in inputs.finished
        if arm.budget is not None
    ]
    if not shown:
        body = missing("No arm has finished yet, so no shape is recorded.")
        return Section(id="shape", title="Shape", aside=_legend(shown), body=body)
    return shapes(shown)


def shapes(shown: Sequence[Shape]) -> Section:
    """The section of these designs, all to one scale, with their numbers as tables."""
    one = frame(shown)
    body = element("div", *(_panel(item, one) for item in shown), class_="shapes")
    return Section(id="shape", title="Shape", aside=_legend(shown), body=body)


def _legend(shown: Sequence[Shape]) -> Html:
    low_rank = any(_rank(layer) for item in shown for layer in item.layers)
    return together(
        paragraph(
            "One row per layer, the first at the bottom, all to one scale. Left: query heads, a "
            "box each, over the key-value heads they share. Right: the width of the FFN. The "
            "numbers say the same: query heads / key-value heads, and FFN width."
        ),
        paragraph(
            "Hollow: low-rank layers, whose every product passes through the narrow solid neck in "
            "the middle, the rank."
        )
        if low_rank
        else None,
    )


def _rank(layer: LayerBudget) -> int:
    """The widest rank of a layer's linears; 0: dense."""
    return max(linear.rank for linear in layer.linears.values())


def frame(shown: Sequence[Shape]) -> Frame:
    """The common scale of designs."""
    layers = [layer for item in shown for layer in item.layers]
    attention = max(layer.num_query_heads * layer.head_dim for layer in layers)
    ffn = max(layer.ffn_dim for layer in layers)
    neck = max(_rank(layer) for layer in layers)
    scale = (WIDTH - 2 * EDGE - 10) / (attention + neck + ffn)
    left = EDGE + attention * scale
    most = max(len(item.layers) for item in shown)
    return Frame(
        scale=scale,
        left=left,
        right=left + 10 + neck * scale,
        row=max(7.0, min(21.0, 300 / most)),
    )


def _panel(item: Shape, frame: Frame) -> Html:
    return element(
        "figure",
        element(
            "figcaption",
            element("b", item.name, class_=f"arm s{item.color}"),
            element("span", item.caption),
        ),
        drawing(item, frame),
        element("details", element("summary", "Numbers"), _numbers(item.layers)),
    )


def height_of(item: Shape, frame: Frame) -> float:
    """Height of a drawing, in its units; its width is :data:`WIDTH`."""
    return TOP + len(item.layers) * frame.row + 6


def drawing(item: Shape, frame: Frame, **place: float) -> Html:
    """One design's layers.

    Args:
        item: The design.
        frame: The scale that it shares with others.
        place: x, y, width and height, for a drawing within another.
    """
    layers, height = item.layers, height_of(item, frame)
    numbered = _numbered(len(layers), frame)
    drawn = [
        _layer(
            layer,
            frame,
            top=TOP + (len(layers) - 1 - index) * frame.row,
            numbered=index in numbered,
            number=index + 1,
        )
        for index, layer in enumerate(layers)
    ]
    stream = element(
        "line", class_="stream", x1=frame.middle, x2=frame.middle, y1=TOP - 4, y2=height
    )
    titles = together(
        element("text", "attention", x=frame.left, y=11, class_="tick end"),
        element("text", "FFN", x=frame.right, y=11, class_="tick start"),
    )
    return element(
        "svg",
        stream,
        titles,
        *drawn,
        **place,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        class_=f"shape series s{item.color}",
        role="img",
        aria_label=_description(item),
    )


def _numbered(num_layers: int, frame: Frame) -> set[int]:
    """The layers that have room for their numbers: evenly, the first and the last among them."""
    apart = math.ceil(TEXT_ROW / frame.row)
    steps = max(1, (num_layers - 1) // apart)
    return {round(k * (num_layers - 1) / steps) for k in range(steps + 1)}


def _layer(layer: LayerBudget, frame: Frame, *, top: float, numbered: bool, number: int) -> Html:
    rank = _rank(layer)
    height = frame.row * 0.78
    head = layer.head_dim * frame.scale
    width = layer.ffn_dim * frame.scale
    boxes = [
        _heads("query", layer.num_query_heads, head, frame.left, top, height * 0.6),
        _heads("kv", layer.num_kv_heads, head, frame.left, top + height * 0.7, height * 0.3),
        _box("ffn", frame.right, top, width, height),
    ]
    if rank:
        neck = rank * frame.scale
        boxes.append(_box("neck", frame.middle - neck / 2, top, neck, height))
    middle = round(top + height / 2, 2)
    left_end = frame.left - layer.num_query_heads * head
    heads_text = f"{layer.num_query_heads}/{layer.num_kv_heads}"
    texts = together(
        element("text", heads_text, class_="tick end", x=round(left_end - 5, 2), y=middle),
        element(
            "text",
            humanize.whole(layer.ffn_dim),
            class_="tick start",
            x=round(frame.right + width + 5, 2),
            y=middle,
        ),
    )
    words = f"Layer {number}: {_words(layer)}"
    style = "layer hollow" if rank else "layer"
    return element("g", element("title", words), *boxes, texts if numbered else None, class_=style)


def _heads(kind: str, heads: int, head: float, right: float, top: float, height: float) -> Html:
    """Boxes from ``right`` to the left: one thick dashed line, a dash per head."""
    gap = min(1.2, head * 0.18)
    return element(
        "line",
        class_=kind,
        x1=round(right, 2),
        x2=round(right - heads * head, 2),
        y1=round(top + height / 2, 2),
        y2=round(top + height / 2, 2),
        stroke_width=round(height, 2),
        stroke_dasharray=f"{head - gap:.2f} {gap:.2f}",
    )


def _box(kind: str, x: float, y: float, width: float, height: float) -> Html:
    return element(
        "rect",
        class_=kind,
        x=round(x, 2),
        y=round(y, 2),
        width=round(width, 2),
        height=round(height, 2),
        rx=1,
    )


def _words(layer: LayerBudget) -> str:
    rank = _rank(layer)
    narrow = f", rank {_rank_text(layer)}" if rank else ", dense"
    return (
        f"{humanize.plural(layer.num_query_heads, 'query head')}, "
        f"{humanize.plural(layer.num_kv_heads, 'key-value head')}, "
        f"FFN {humanize.whole(layer.ffn_dim)}{narrow}, "
        f"{humanize.count(layer.parameters)} parameters"
    )


def _rank_text(layer: LayerBudget) -> str:
    ranks = sorted({linear.rank for linear in layer.linears.values()})
    texts = ["dense" if rank == 0 else str(rank) for rank in ranks]
    return humanize.DASH.join(texts[:1] + texts[-1:] if len(texts) > 1 else texts)


def _description(item: Shape) -> str:
    first, last = item.layers[0], item.layers[-1]
    return f"Layers of {item.name}. First: {_words(first)}. Last: {_words(last)}."


def _numbers(layers: tuple[LayerBudget, ...]) -> Html:
    head = ("layer", "query", "kv", "FFN", "rank", "parameters")
    rows = [
        element(
            "tr",
            element("th", str(index + 1), scope="row", class_="number"),
            *(
                element("td", text, class_="number")
                for text in (
                    str(layer.num_query_heads),
                    str(layer.num_kv_heads),
                    humanize.whole(layer.ffn_dim),
                    _rank_text(layer),
                    humanize.count(layer.parameters),
                )
            ),
        )
        for index, layer in reversed(list(enumerate(layers)))
    ]
    titles = joined([element("th", title, scope="col", class_="number") for title in head])
    return element(
        "div",
        element("table", element("thead", element("tr", titles)), element("tbody", *rows)),
        class_="scroll",
    )
