"""``samara analyze``: effective ranks of activations, and ranks for a low-rank design from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from samara.errors import ConfigError

NUMBERS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}


def analyze(
    models: Annotated[
        list[str],
        typer.Argument(help="Model or run folders, the baseline first.", metavar="MODEL..."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="A prepared corpus, or a .txt, .jsonl or .parquet file."),
    ] = None,
    split: Annotated[
        Literal["validation", "test", "train"], typer.Option(help="Of a prepared corpus.")
    ] = "validation",
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Share of the energy; several times: several.", show_default="0.95"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(min=1, help="Longer documents are cut.")] = 256,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also each checkpoint that a run kept.")
    ] = False,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="Choose ranks for a low-rank design from the first model: parameters of all "
            "linears (3M), or a share of the dense ones' (40%).",
            metavar="BUDGET",
        ),
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(min=1, help="With --allocate: ranks are multiples of this.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/analysis")
    ] = None,
) -> None:
    """Show how many directions a model's activations need, layer by layer: their effective rank.

    Example: samara analyze runs/dense runs/cola --data runs/corpus --allocate 40%
    """
    from samara.lifecycle import run_recipe
    from samara.measure.rank_table import rank_tables
    from samara.recipe import parse_recipe
    from samara.runs import read_json

    if data is None:
        raise ConfigError("--data: is missing; give a prepared corpus or a file with text")
    if multiple is not None and allocate is None:
        raise ConfigError(f"--multiple {multiple}: goes with --allocate, which chooses ranks")
    if models[0].endswith((".yaml", ".yml")):
        raise ConfigError(f"{models[0]}: is a recipe; use `samara run {models[0]}`")
    settings: dict[str, Any] = {
        "models": _named(models),
        "data": str(data),
        "split": split,
        "alphas": alpha or [0.95],
        "max_tokens": max_tokens,
        "sequence_length": sequence_length,
        "checkpoints": checkpoints,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
    }
    if allocate is not None:
        settings["allocate"] = {"budget": parse_budget(allocate)}
        if multiple is not None:
            settings["allocate"]["multiple"] = multiple
    folder = out or Path("runs") / "analysis"
    recipe = parse_recipe({"schema": 1, "name": "analysis", "analyze": settings})
    run_recipe(recipe, folder, say=lambda line: typer.echo(line, err=True))
    typer.echo(rank_tables(read_json(folder / "ranks.json")))
    typer.echo(f"{folder / 'ranks.json'}: the figures")
    if allocate is not None:
        typer.echo(f"{folder / 'allocated.yaml'}: the ranks as a recipe's")


def _named(models: list[str]) -> dict[str, str]:
    """Each folder under its own name, numbered where two are alike."""
    names = [Path(model).resolve().name for model in models]
    return {
        name if names.count(name) == 1 else f"{number}-{name}": model
        for number, (name, model) in enumerate(zip(names, models, strict=True), start=1)
    }


def parse_budget(text: str) -> float:
    """``3M``, ``1.5B``, ``800k`` or ``250000`` parameters, or ``40%`` as 0.4.

    Raises:
        ConfigError: If it is none of them.
    """
    number, unit = text.strip(), ""
    if number.endswith("%"):
        number, scale = number[:-1], 0.01
    else:
        unit = number[-1:] if number[-1:] in ("k", "M", "B") else ""
        number, scale = number.removesuffix(unit) if unit else number, NUMBERS[unit]
    try:
        value = float(number) * scale
    except ValueError:
        value = 0.0
    is_share = text.strip().endswith("%")
    if not 0 < value < 1e15 or (is_share and value > 1) or (not is_share and value < 1):
        raise ConfigError(
            f"--allocate {text}: is no budget; write parameters as 3M, or a share as 40%"
        )
    return value
