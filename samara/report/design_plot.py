"""The per-layer plot of designs that were never trained: an SVG file, or a page with the numbers.

The drawing is the report's own (:mod:`samara.report.sections.shape`), so a design looks the same
before and after its training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from samara.errors import ConfigError
from samara.measure.budget import budget
from samara.measure.design import DesignInput
from samara.report.humanize import count, listed
from samara.report.markup import Html, element, paragraph, together
from samara.report.page import ASSETS, assemble, page_colors
from samara.report.sections.shape import WIDTH, Shape, drawing, frame, height_of, shapes
from samara.runs import write_text

MARGIN = 16
HEAD = 44  # room for a design's name and its measures
COLUMNS = 3  # drawings side by side


def plot_designs(designs: Sequence[DesignInput], path: Path) -> None:
    """Draw designs to one scale.

    Args:
        designs: One or more.
        path: A file that ends in ``.svg`` or ``.html``; replaced if it exists.

    Raises:
        ConfigError: If it ends otherwise, or a design names no vocabulary size.
    """
    if path.suffix not in {".svg", ".html"}:
        raise ConfigError(f"--plot {path}: ends in neither .svg nor .html; name one of them")
    shown = [
        Shape(name=item.name, color=index % 8, budget=budget(item.model))
        for index, item in enumerate(designs)
    ]
    write_text(path, _page(shown) if path.suffix == ".html" else _svg(shown))


def _page(shown: Sequence[Shape]) -> str:
    names = listed([item.name for item in shown])
    sizes = listed([f"{count(item.budget.parameters.total)} parameters" for item in shown]) + "."
    return assemble(
        [shapes(shown)],
        title=f"Design of {names}",
        headline=together(element("h1", f"Design of {names}"), paragraph(sizes, class_="done")),
        contents=Html(),
        version="Samara",
    )


def _svg(shown: Sequence[Shape]) -> str:
    """One picture that stands alone: drawings in rows, with the page's colours inside."""
    common = frame(shown)
    row_height = HEAD + max(height_of(item, common) for item in shown) + MARGIN
    columns = min(COLUMNS, len(shown))
    width = MARGIN + columns * (WIDTH + MARGIN)
    height = MARGIN + -(-len(shown) // columns) * row_height
    parts = []
    for index, item in enumerate(shown):
        x = MARGIN + index % columns * (WIDTH + MARGIN)
        y = MARGIN + index // columns * row_height
        # Drawings grow from a common ground: the first layers stand side by side.
        own = height_of(item, common)
        top = y + row_height - MARGIN - own
        parts += [
            element("text", item.name, x=x, y=top - 28, class_=f"name s{item.color}"),
            element("text", item.caption, x=x, y=top - 12, class_="tick"),
            drawing(item, common, x=x, y=round(top, 2), width=WIDTH, height=round(own, 2)),
        ]
    return (
        element(
            "svg",
            element("style", Html(_style())),
            element("rect", class_="ground", width="100%", height="100%"),
            together(*parts),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height:.0f}",
            width=width,
            height=round(height),
        )
        + "\n"
    )


def _style() -> str:
    """What of the page's style a drawing needs."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    rules = re.findall(r"^\.(?:shape \.|series rect|tick)[^{]*\{[^}]*\}$", css, re.MULTILINE)
    own = ".ground { fill: var(--paper); }\n.name { fill: var(--c); font: 600 15px var(--sans); }"
    return "\n".join([page_colors(), *rules, own])
