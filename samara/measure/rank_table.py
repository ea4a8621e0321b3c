"""``ranks.json`` as tables: effective ranks by layer and projection, and how they moved."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from samara.measure.activations import SPACES

TITLES = {
    "input": "inputs",
    "bottleneck": "bottleneck before its nonlinearity",
    "activated": "bottleneck after its nonlinearity",
    "output": "outputs",
}
TEXT_WIDTH = 100
Record = Mapping[str, Any]


def rank_tables(results: Record) -> str:
    """All tables of some results, as plain text."""
    parts: list[Table | str] = []
    alpha = results["alphas"][0]
    for name, model in results["models"].items():
        parts.append(
            f"{name}: r({alpha:g}), the directions that hold {100 * alpha:g} % of the energy, over "
            f"{model['num_tokens']:,} tokens; in brackets: with the mean taken away"
        )
        if model["warning"]:
            parts.append(f"warning: {model['warning']}")
        last = model["measurements"][-1]["sites"]
        parts += [_table(own, TITLES[space]) for space in SPACES if (own := _of(last, space))]
        if len(model["measurements"]) > 1:
            parts.append(_over_training(model["measurements"]))
    if results["allocation"] is not None:
        parts += _allocation(results["allocation"])
    console = Console(file=io.StringIO(), width=_width(results))
    for part in parts:
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _width(results: Record) -> int:
    columns = max(
        len({site["projection"] for site in model["measurements"][-1]["sites"]})
        for model in results["models"].values()
    )
    return max(TEXT_WIDTH, 12 + 17 * columns)


def _of(sites: Iterable[Record], space: str) -> list[Record]:
    return [site for site in sites if site["space"] == space]


def _projections(sites: Iterable[Record]) -> list[str]:
    """Their projections, each once, in order."""
    return list(dict.fromkeys(str(site["projection"]) for site in sites))


def _table(sites: Sequence[Record], title: str) -> Table:
    """A row per layer, a column per projection."""
    names = _projections(sites)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    cells = {(site["layer"], site["projection"]): site for site in sites}
    for layer in sorted({site["layer"] for site in sites}):
        table.add_row(str(layer), *(_cell(cells.get((layer, name))) for name in names))
    table.add_section()
    widths = {
        name: sorted({s["width"] for s in sites if s["projection"] == name}) for name in names
    }
    table.add_row("of", *("-".join(map(str, _ends(widths[name]))) for name in names))
    return table


def _cell(site: Record | None) -> str:
    return "" if site is None else f"{site['ranks'][0]} ({site['centred_ranks'][0]})"


def _ends(values: Sequence[int]) -> list[int]:
    return [values[0]] if len(values) == 1 else [values[0], values[-1]]


def _mean_shares(sites: Sequence[Record]) -> str:
    """The mean over places of rank over width, and with the mean taken away."""
    shares = (
        sum(site[key][0] / site["width"] for site in sites) / len(sites)
        for key in ("ranks", "centred_ranks")
    )
    return "{:.3f} ({:.3f})".format(*shares)


def _over_training(measurements: Sequence[Record]) -> Table:
    """A row per checkpoint, a column per projection: outputs, averaged over the layers."""
    names = _projections(measurements[-1]["sites"])
    table = Table(
        title="outputs during training: mean over layers of rank / width",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for one in measurements:
        outputs = _of(one["sites"], "output")
        shares = (
            _mean_shares([site for site in outputs if site["projection"] == name]) for name in names
        )
        step = "final" if one["step"] is None else f"{one['step']:,}"
        table.add_row(step, *shares)
    return table


def _allocation(found: Record) -> list[Table | str]:
    """The ranks of an allocation, and what they hold."""
    names = list(found["ranks"][0])
    table = Table(
        title=f"ranks for a low-rank design, from {found['model']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for layer, ranks in enumerate(found["ranks"]):
        table.add_row(str(layer), *(str(ranks[name]) for name in names))
    proof = "no allocation holds more" if found["exact"] else f"at most {found['bound']:.2%} can be"
    energy = "energy without its mean" if found["centred"] else "energy"
    return [
        table,
        f"{found['parameters']:,} of {found['budget']:,} parameters (dense: "
        f"{found['dense_parameters']:,}); {found['captured']:.2%} of the outputs' "
        f"{energy} on average, {proof}",
    ]
