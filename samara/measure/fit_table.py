"""What ``samara design --fit`` found, as data and as text, with the rule that chose it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from samara.measure.design import TEXT_WIDTH, design_data, design_text, duration, prefixed
from samara.measure.fit import (
    DATA,
    DATA_EXPONENT,
    FITTED_PARAMETERS,
    FITTED_TOKENS,
    IRREDUCIBLE,
    SIZE,
    SIZE_EXPONENT,
    Candidate,
    Fit,
    limits_text,
)

RULE = (
    "Rule: the lowest loss by Chinchilla's law (Hoffmann et al., arXiv 2203.15556, approach 3) as "
    "fitted again by Besiroglu et al. (arXiv 2404.10102): "
    f"{IRREDUCIBLE} + {SIZE} / N^{SIZE_EXPONENT} + {DATA} / D^{DATA_EXPONENT}, N parameters (the "
    "vocabulary matrix once), D tokens. It ranks designs; your text's loss is another number."
)
GROUND = (
    "It rests on dense, uniform models of 70 M to 16 B parameters and 5 to 500 B tokens, none seen "
    "twice."
)
EXTRAPOLATED = "The answer lies outside of that: extrapolated, so take it as a starting point."
FAMILIES = (
    "Marked: the answer, of the recipe's own family. The law cannot tell families apart but by N "
    "and D, and none is published for low rank (N: what is trained): start from a recipe of the "
    "family that you want."
)


def fit_data(found: Fit) -> dict[str, Any]:
    """The answer as plain data: the limits, the rule, and the best design of each family.

    Returns:
        ``candidates`` holds what ``samara design --json`` gives for a design, with ``family``,
        ``predicted_loss``, and ``model``, the widths' keys of a recipe; the first is the answer.
    """
    limits = {key: value for key, value in asdict(found.limits).items() if value is not None}
    return {
        "schema": 1,
        "limits": limits,
        "rule": RULE,
        "extrapolated": _extrapolated(found.best),
        "candidates": [
            {
                "family": one.family.name,
                "predicted_loss": one.loss,
                "model": one.shape,
                **design_data([one.input], utilization=found.utilization),
            }
            for one in found.candidates
        ],
    }


def fit_text(found: Fit) -> str:
    """The families side by side, the rule with its sources, and the answer in full."""
    data = fit_data(found)
    console = Console(file=io.StringIO(), width=TEXT_WIDTH)
    console.print(f"Best design for {limits_text(found.limits)}", highlight=False)
    console.print(_table(data["candidates"]))
    notes = [RULE, GROUND + (f" {EXTRAPOLATED}" if data["extrapolated"] else ""), FAMILIES]
    for note in notes:
        console.print(note, highlight=False, markup=False)
    output = console.file
    assert isinstance(output, io.StringIO)
    text = "\n".join(line.rstrip() for line in output.getvalue().splitlines())
    return f"{text}\n\n{design_text(data['candidates'][0])}"


def _table(candidates: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("family")
    for column in ("hidden", "layers", "parameters", "tokens", "FLOPs", "memory", "time", "loss"):
        table.add_column(column, justify="right")
    for place, one in enumerate(candidates):
        table.add_row(
            "*" if place == 0 else "",
            one["family"],
            str(one["hidden_size"]),
            str(len(one["layers"])),
            prefixed(one["parameters"], ""),
            prefixed(one["training"]["tokens"], ""),
            prefixed(one["training"]["flops"], ""),
            prefixed(one["memory"]["total"], "B"),
            duration(one["estimate"]["seconds"]),
            f"{one['predicted_loss']:.3f}",
        )
    return table


def _extrapolated(one: Candidate) -> bool:
    low_size, high_size = FITTED_PARAMETERS
    low_data, high_data = FITTED_TOKENS
    inside = low_size <= one.parameters <= high_size and low_data <= one.input.tokens <= high_data
    return not inside
