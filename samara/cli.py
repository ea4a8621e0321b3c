"""The command line: ``samara VERB RECIPE [key=value …]``.

A verb's module is imported only when the verb runs, so ``samara --help`` imports no torch. What a
user can mend is one line on standard error and exit status 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core

from samara import (
    analyze_command,
    audit_command,
    delta_commands,
    deployment_commands,
    model_commands,
    personal_commands,
    registry_commands,
)
from samara.errors import ConfigError, SamaraError, Stopped

if TYPE_CHECKING:
    from samara.measure.design import DesignInput

# Plain help: with rich found, typer escapes brackets for it even where its markup is off.
typer.core.HAS_RICH = False

app = typer.Typer(
    name="samara",
    help="Build, grow and adapt your own language models on little hardware, and prove what it "
    "cost and gained.\n\nFirst steps: samara run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(delta_commands.app, name="delta")
app.add_typer(registry_commands.app, name="registry")
app.add_typer(personal_commands.app, name="personal")
app.add_typer(deployment_commands.app, name="deployment")

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings laid over the recipe, as optimizer.lr=1e-3.", metavar="[KEY=VALUE]..."
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="The run folder.", show_default="runs/NAME of the recipe")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every verb; :func:`main` reads ``--debug`` itself."""
    del debug


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    stage: Annotated[str | None, typer.Option(help="Work off only this stage.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Work off a recipe: its one verb, or its stages in order; what is finished is skipped.

    Example: samara run recipes/quickstart.yaml
    """
    _work(recipe, overrides, out, verb=None, stage=stage, dry_run=dry_run)


@app.command()
def prepare(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Make a corpus: documents, one split, a tokenizer, token shards.

    Example: samara prepare recipes/interpreter-docs.yaml tokenizer.vocab_size=4096
    """
    _work(recipe, overrides, out, verb="prepare", dry_run=dry_run)


@app.command()
def pretrain(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Train a model on a corpus; resumes by itself if its run folder exists.

    Example: samara pretrain recipes/cola-60m.yaml optimizer.lr=3e-3 --out runs/cola-60m
    """
    _work(recipe, overrides, out, verb="pretrain", dry_run=dry_run)


@app.command()
def grow(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Grow a trained model: race growth operators from its checkpoint, train the winner on.

    Example: samara grow recipes/grow.yaml source=runs/own-text --out runs/grow
    """
    _work(recipe, overrides, out, verb="grow", dry_run=dry_run)


@app.command()
def instruct(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Tune a model on conversations, the loss on the answers only; resumes by itself.

    Example: samara instruct recipes/instruct.yaml --out runs/instruct
    """
    _work(recipe, overrides, out, verb="instruct", dry_run=dry_run)


@app.command()
def finetune(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Adapt a model to a task: few weights (a delta file), an adapter, or all; resumes by itself.

    Example: samara finetune recipes/finetune.yaml method.selection.density=small
    """
    _work(recipe, overrides, out, verb="finetune", dry_run=dry_run)


@app.command()
def federate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    deploy: Annotated[
        Path | None,
        typer.Option(help="Write a Flower app for devices of their own into this folder."),
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="With --deploy: run all of it on this machine.")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(help="With --deploy: the server, as nodes reach it. None: 127.0.0.1."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="With --deploy: its port. None: 8000.", min=1, max=65535)
    ] = None,
) -> None:
    """Fine-tune over many clients whose data stays where it is; resumes by itself.

    Example: samara federate recipes/federate.yaml method=fedlora --out runs/fedlora
    """
    if deploy is not None:
        if out is not None or dry_run:
            option = "--dry-run" if dry_run else "--out"
            raise ConfigError(f"{option}: goes without --deploy; the run is in {deploy}/run")
        _deploy(recipe, overrides, deploy, host=host, port=port, start=start)
        return
    if start or host is not None or port is not None:
        option = "--start" if start else "--host" if host is not None else "--port"
        raise ConfigError(f"{option}: goes with --deploy FOLDER, which writes what it is for")
    _work(recipe, overrides, out, verb="federate", dry_run=dry_run)


@app.command()
def release(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Register runs as versions of a line, promote them through gates, roll back; resumes.

    Example: samara release my-release.yaml --out runs/release
    """
    _work(recipe, overrides, out, verb="release", dry_run=dry_run)


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="A recipe with settings, or one or two model folders.", metavar="TARGET..."
        ),
    ],
    suite: Annotated[str | None, typer.Option(help="openelm-zero-shot, openllm or llm360.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A standard task, a task file, or a data file.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the standard tasks' files.")] = None,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Say whether the second model is better, and by how much."),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    out: Out = None,
    dry_run: DryRun = False,
) -> None:
    """Score models: held-out loss by a recipe, or suites and local tasks by name.

    Example: samara evaluate runs/a runs/b --suite openelm-zero-shot --data qa --paired
    """
    if targets[0].endswith((".yaml", ".yml")):
        _work(Path(targets[0]), targets[1:], out, verb="evaluate", dry_run=dry_run)
        return
    if paired and len(targets) != 2:
        raise ConfigError(f"--paired: compares two models, {len(targets)} given")
    from samara.measure.paired import paired_report, paired_table
    from samara.measure.task_evaluation import evaluate_tasks
    from samara.measure.task_results import task_table
    from samara.runs import write_json

    base = out or Path("runs") / "evaluation"
    folders = [base / f"{number}-{Path(t).name}" for number, t in enumerate(targets)]
    for target, folder in zip(targets, folders, strict=True):
        result = evaluate_tasks(
            Path(target),
            out=folder,
            tasks=task or (),
            suite=suite,
            data_dir=data,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
        )
        typer.echo(task_table(result))
    if paired:
        comparison = paired_report(*folders)
        write_json(base / "paired.json", comparison)
        typer.echo(paired_table(comparison))


app.command()(audit_command.audit)
app.command()(analyze_command.analyze)


@app.command()
def report(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, dry_run: DryRun = False
) -> None:
    """Turn run folders into one self-contained HTML page.

    Example: samara report my-report.yaml --out runs/report
    """
    _work(recipe, overrides, out, verb="report", dry_run=dry_run)


@app.command()
def design(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="Recipes with a pretrain section; what has a '=' is a setting laid over each.",
            metavar="RECIPE... [KEY=VALUE]...",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Device profile (a name or a YAML file) for time and cost.")
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--fit",
            help="Search the best design under limits: params=30M, flops=8e15, memory=8GB, "
            "hours=8, or several by comma.",
            metavar="LIMITS",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the layers' widths into this .svg or .html file.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="With --fit: write the answer's recipe to this file.")
    ] = None,
) -> None:
    """Show what a design is and costs: layers, parameters, FLOPs, memory, time. Trains nothing.

    Example: samara design recipes/openelm-1_1b.yaml recipes/cola-1b.yaml
    """
    from samara.designs import design_inputs
    from samara.measure.design import design_data, design_text

    recipes, overrides = _recipes_and_settings(arguments)
    if limits:
        _fit(recipes, overrides, limits, device=device, write=write, plot=plot, as_json=as_json)
        return
    if write is not None:
        raise ConfigError(f"--write {write}: goes with --fit, which makes a recipe to write")
    inputs = design_inputs(recipes, overrides)
    _plot(inputs, plot)
    data = design_data(inputs, device=device)
    typer.echo(json.dumps(data, indent=2) if as_json else design_text(data))


def _fit(
    recipes: list[Path],
    overrides: list[str],
    limits: list[str],
    *,
    device: str | None,
    write: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from samara.designs import fit_recipe
    from samara.measure.fit import parse_limits
    from samara.measure.fit_table import fit_data, fit_text

    found = fit_recipe(recipes, overrides, parse_limits(limits), device=device, write=write)
    _plot([found.best.input], plot)
    typer.echo(json.dumps(fit_data(found), indent=2) if as_json else fit_text(found))
    if write is not None:
        _say(f"{write}: the recipe; check it with `samara check {write}`")


def _plot(designs: list[DesignInput], path: Path | None) -> None:
    if path is None:
        return
    from samara.report.design_plot import plot_designs

    plot_designs(designs, path)
    _say(f"{path}: the layers' widths")


def _recipes_and_settings(arguments: list[str]) -> tuple[list[Path], list[str]]:
    recipes = [Path(argument) for argument in arguments if "=" not in argument]
    if not recipes:
        raise ConfigError(f"{arguments[0]}: is a setting; give the recipe that it changes, too")
    return recipes, [argument for argument in arguments if "=" in argument]


for command in (model_commands.convert, model_commands.average, model_commands.generate):
    app.command()(command)


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="List the techniques with papers and modules.")
    ] = False,
) -> None:
    """Validate a recipe and print it with nothing left implicit.

    Example: samara check recipes/quickstart.yaml
    """
    if list_:
        _list_techniques()
        return
    if schema:
        from samara.recipe import RecipeFile

        typer.echo(json.dumps(RecipeFile.model_json_schema(), indent=2))
        return
    if recipe is None:
        raise ConfigError("check: give a recipe, --schema, or --list")
    from samara.config import dump_yaml
    from samara.recipe import load_recipe

    typer.echo(dump_yaml(load_recipe(recipe, overrides or ()).resolved()), nl=False)


def _list_techniques() -> None:
    from samara.catalog import TECHNIQUES

    width = max(len(item.name) for item in TECHNIQUES)
    for item in TECHNIQUES:
        paper = f"arXiv {item.arxiv}" if item.arxiv else item.paper
        typer.echo(f"{item.name:<{width}}  {paper:<18}  {item.module}")


def _work(
    path: Path,
    overrides: list[str] | None,
    out: Path | None,
    *,
    verb: str | None,
    stage: str | None = None,
    dry_run: bool,
) -> None:
    from samara.errors import did_you_mean
    from samara.lifecycle import plan, run_recipe
    from samara.recipe import load_recipe

    recipe = load_recipe(path, overrides or ())
    if verb is not None and recipe.is_lifecycle:
        raise ConfigError(
            f"{path}: has stages; use `samara run {path}` (one of them: --stage NAME)"
        )
    if verb is not None and recipe.stages[0].verb != verb:
        own = recipe.stages[0].verb
        # `samara audit` and `analyze` take models, no recipe.
        runs = "run" if own in ("audit", "analyze") else own
        raise ConfigError(f"{path}: is a recipe of `{own}`; use `samara {runs} {path}`")
    names = [item.name for item in recipe.stages]
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage {stage}: no such stage{did_you_mean(stage, names)}")
    folder = out or Path("runs") / recipe.name
    if dry_run:
        for item in plan(recipe, folder):
            typer.echo(f"{item.action:<6} {item.folder}  {item.stage.verb}  ({item.reason})")
        return
    run_recipe(recipe, folder, say=_say, only=stage)


def _deploy(
    path: Path,
    overrides: list[str] | None,
    folder: Path,
    *,
    host: str | None,
    port: int | None,
    start: bool,
) -> None:
    from samara.recipe import load_recipe

    recipe = load_recipe(path, overrides or ())
    if recipe.is_lifecycle or recipe.stages[0].verb != "federate":
        raise ConfigError(f"{path}: --deploy needs a recipe of `federate` alone")
    deployment_commands.deploy(recipe, folder, host=host, port=port, start=start)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def main() -> None:
    """Entry point of the ``samara`` command."""
    debug = "--debug" in sys.argv
    # transformers loads torchao where it is installed, which lists the kernels it has no use for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(args=[a for a in sys.argv[1:] if a != "--debug"], standalone_mode=False)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except Stopped as stop:
        _say(f"samara: {stop}")
        sys.exit(128 + stop.signal_number)
    except (KeyboardInterrupt, typer.Abort):
        _say("samara: interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _fail(error)


def _fail(error: Exception) -> None:
    import click

    if isinstance(error, SamaraError):
        _say("\n".join(f"samara: {line}" for line in str(error).splitlines()))
        sys.exit(2)
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    _say(
        f"samara: internal error: {type(error).__name__}: {error} "
        "(run it again with --debug for the traceback)"
    )
    sys.exit(1)
