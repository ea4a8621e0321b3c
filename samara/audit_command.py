"""``samara audit``: bias, stability and forgetting, before and after a change of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from samara.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from samara.adapt.audits.config import Suite
    from samara.registry.records import Evidence


def audit(
    model: Annotated[Path, typer.Argument(help="The base: a model folder, or a run folder.")],
    delta: Annotated[
        list[Path] | None, typer.Option(help="Delta files, in the order they apply.")
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="In place of deltas: a fine-tuning run, or the changed model's folder."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="bias, stability, forgetting. None: the first two, and the third where there is "
            "text."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Files with text that the base knows.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Or the prepared corpus that the base is from.")
    ] = None,
    templates: Annotated[
        str, typer.Option(help="Sentences and terms: english, documentation, or a file of yours.")
    ] = "english",
    seeds: Annotated[
        list[Path] | None,
        typer.Option(help="Runs like --tuned but for their seed: do answers depend on it?"),
    ] = None,
    limits: Annotated[Path | None, typer.Option(help="YAML with other limits and sizes.")] = None,
    out: Annotated[
        Path, typer.Option(help="The evidence, for `samara registry … --evidence`.")
    ] = Path("audit.json"),
    details: Annotated[
        Path | None, typer.Option(help="Write every pair, answer and loss there, too.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    precision: Annotated[
        Literal["float32", "stored"], typer.Option(help="Of the weights that are asked.")
    ] = "float32",
) -> None:
    """Audit a model before and after a change: bias, stability, forgetting.

    Example: samara audit llama-1b --delta summaries.sdelta --text news.jsonl
    """
    from samara.adapt.audits.config import AuditConfig, AuditRunConfig
    from samara.adapt.audits.verb import run_audit
    from samara.config import load_yaml, validate
    from samara.runs import write_json

    if text and corpus is not None:
        raise ConfigError("--text and --corpus: give one of them")
    if delta and tuned is not None:
        raise ConfigError("--delta and --tuned: give one of them, the change is either")
    suites = _suites(suite, has_text=bool(text) or corpus is not None)
    if "forgetting" in suites and not text and corpus is None:
        raise ConfigError("forgetting: needs text the base knows; give --text or --corpus")
    reads = "forgetting" in suites
    config = AuditRunConfig(
        base=str(model),
        deltas=tuple(map(str, delta or ())),
        tuned=None if tuned is None else str(tuned),
        seeds=tuple(map(str, seeds or ())),
        suites=suites,
        templates=templates,
        texts=tuple(map(str, text or ())) if reads else (),
        corpus=str(corpus) if reads and corpus is not None else None,
        limits=validate(AuditConfig, load_yaml(limits), path=str(limits))
        if limits
        else AuditConfig(),
        device=device,
        precision=precision,
    )
    found = run_audit(config)
    write_json(out, found.evidence.model_dump(mode="json"))
    if details is not None:
        write_json(details, found.details)
    typer.echo(audit_table(found.evidence))
    typer.echo(f"{out}: {len(found.evidence.audits)} audits")


def _suites(names: list[str] | None, *, has_text: bool) -> tuple[Suite, ...]:
    known: tuple[Suite, ...] = ("bias", "stability", "forgetting")
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--suite {name}: no such audit{did_you_mean(name, known)}")
    if names:
        return tuple(own for own in known if own in names)
    return known if has_text else known[:2]


def audit_table(evidence: Evidence) -> str:
    """Audits as plain text, a line each."""
    from samara.measure.task_results import text_table

    rows = [("audit", "before", "after", "interval of the change", "verdict")]
    for row in evidence.audits:
        before, after = ("-" if v is None else f"{v:.4f}" for v in (row.before, row.after))
        ends = row.ci_of_change
        change = "-" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}"
        rows.append((row.suite, before, after, change, row.verdict))
    return text_table(rows, right=(1, 2))
