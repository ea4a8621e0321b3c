"""``samara registry …``: versions that never change, aliases that move through gates, and a log.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samara.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from samara.registry.records import Description, Evidence
    from samara.registry.registry import Registry

app = typer.Typer(
    help="Versions of models and deltas: kept, promoted through gates, rolled back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Location = Annotated[
    str,
    typer.Option("--registry", envvar="SAMARA_REGISTRY", help="Folder or fsspec URL."),
]
CatalogueUrl = Annotated[
    str | None,
    typer.Option(
        "--catalogue",
        envvar="SAMARA_CATALOGUE",
        help="SQLAlchemy URL of the catalogue. None: SQLite in the registry's folder.",
    ),
]
By = Annotated[str | None, typer.Option("--by", help="Who does it. None: the user logged in.")]
Reference = Annotated[
    str,
    typer.Argument(help="LINE:VERSION; the version by number, alias or hash.", metavar="VERSION"),
]


@app.command()
def add(
    line: Annotated[str, typer.Argument(help="The model line; made if it is new.")],
    source: Annotated[Path, typer.Argument(help="A model folder, run folder, or delta file.")],
    parent: Annotated[
        list[str] | None, typer.Option(help="Version of the line that it was made from.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="YAML or JSON with evaluations and audits.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="A word about it.")] = None,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
    by: By = None,
) -> None:
    """Keep a model, run or delta as the next version of a line.

    Example: samara registry add assistant summaries.sdelta --parent stable
    """
    description = _describe(source, note)
    opened = _open(registry, catalogue)
    version = opened.add(line, source, description, actor=_actor(by), parents=parent or ())
    typer.echo(f"{version.name}: {version.kind} {version.identity[:12]}")
    if description.license.redistribution in ("unknown", "internal"):
        typer.echo(
            f"samara: {version.name}: its licence record says redistribution: "
            f"{description.license.redistribution}",
            err=True,
        )
    if evidence is not None:
        opened.add_evidence(line, str(version.number), _evidence(evidence), actor=_actor(by))


@app.command("list")
def list_(
    line: Annotated[str | None, typer.Argument(help="One line. None: all.")] = None,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
) -> None:
    """List versions with their aliases, oldest first.

    Example: samara registry list assistant
    """
    opened = _open(registry, catalogue)
    names: dict[int, list[str]] = {}
    for alias in opened.aliases(line):
        names.setdefault(alias.version.id, []).append(alias.name)
    for version in opened.versions(line):
        marks = [*names.get(version.id, []), *(["(files dropped)"] if version.is_dropped else [])]
        typer.echo(
            f"{version.name:<24} {version.kind:<6} {version.identity[:12]}  {version.added_at}  "
            f"{version.added_by}  {' '.join(marks)}".rstrip()
        )


@app.command()
def show(
    version: Reference, registry: Location = "registry", catalogue: CatalogueUrl = None
) -> None:
    """Say what a version is: files, parents, scores, audits, licence.

    Example: samara registry show assistant:stable
    """
    from samara.registry.version_text import describe_version

    opened = _open(registry, catalogue)
    typer.echo(describe_version(opened, opened.resolve(*_split(version))))


@app.command()
def fetch(
    version: Reference,
    out: Annotated[Path, typer.Argument(help="The folder to make; must not exist.")],
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
) -> None:
    """Write a version's files to a new folder, every hash checked.

    Example: samara registry fetch assistant:stable assistant
    """
    found = _open(registry, catalogue).fetch(*_split(version), out)
    typer.echo(f"{out}: {found.name}")


@app.command()
def promote(
    version: Reference,
    alias: Annotated[str, typer.Option(help="stable, candidate, or any other name.")] = "stable",
    gates: Annotated[
        Path | None, typer.Option(help="YAML of what must hold; kept for this alias.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="YAML or JSON with more evaluations and audits.")
    ] = None,
    override_by: Annotated[
        str | None, typer.Option(help="Name of the person who overrules the gates.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why the gates are overruled.")] = None,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
    by: By = None,
) -> None:
    """Point an alias to a version, if its gates let it pass.

    Example: samara registry promote assistant:4 --gates gates.yaml
    """
    if (override_by is None) != (reason is None):
        raise ConfigError("an override takes both --override-by NAME and --reason TEXT")
    from samara.config import load_yaml, validate
    from samara.registry.config import Gates

    rules = validate(Gates, load_yaml(gates), path=str(gates)) if gates else None
    opened = _open(registry, catalogue)
    from samara.registry.registry import Override

    override = Override(name=override_by, reason=reason) if override_by and reason else None
    line, reference = _split(version)
    if evidence is not None:
        opened.add_evidence(line, reference, _evidence(evidence), actor=_actor(by))
    moved = opened.promote(
        line, reference, alias=alias, actor=_actor(by), gates=rules, override=override
    )
    before = f" (was {moved.previous.number})" if moved.previous else ""
    typer.echo(f"{line}: {alias} is version {moved.version.number}{before}")
    if moved.decision:
        typer.echo(f"gates: {moved.decision.outcome} ({moved.decision.text()})")


@app.command()
def rollback(
    line: Annotated[str, typer.Argument(help="The model line.")],
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")],
    alias: Annotated[str, typer.Option(help="The alias.")] = "stable",
    to: Annotated[int | None, typer.Option(help="An earlier one. None: the one before.")] = None,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
    by: By = None,
) -> None:
    """Point an alias back to where it pointed before; no gate stands in the way.

    Example: samara registry rollback assistant --reason "answers in the wrong language"
    """
    opened = _open(registry, catalogue)
    moved = opened.rollback(line, alias=alias, actor=_actor(by), reason=reason, to=to)
    assert moved.previous is not None
    typer.echo(f"{line}: {alias} is version {moved.version.number} (was {moved.previous.number})")


@app.command()
def log(
    line: Annotated[str | None, typer.Argument(help="One line. None: all.")] = None,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
) -> None:
    """Print the log: who did what, and what the gates said.

    Example: samara registry log assistant
    """
    from samara.registry.version_text import describe_entry

    for entry in _open(registry, catalogue).log(line):
        typer.echo(describe_entry(entry))


@app.command()
def gc(
    drop_older_than_days: Annotated[
        float | None,
        typer.Option(
            min=0, help="Also drop the files of older versions that no alias ever had or needs."
        ),
    ] = None,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
    by: By = None,
) -> None:
    """Remove objects that no version needs.

    Example: samara registry gc --drop-older-than-days 90
    """
    opened = _open(registry, catalogue)
    from samara.registry.upkeep import collect_garbage

    swept = collect_garbage(opened, actor=_actor(by), drop_older_than_days=drop_older_than_days)
    for version in swept.versions:
        typer.echo(f"{version.name}: files dropped")
    typer.echo(f"{swept.num_objects} objects removed, {swept.num_bytes:,} bytes")


@app.command()
def verify(
    full: Annotated[bool, typer.Option("--full", help="Read and hash every object.")] = False,
    registry: Location = "registry",
    catalogue: CatalogueUrl = None,
) -> None:
    """Check the log's chain, the aliases and the objects.

    Example: samara registry verify --full
    """
    opened = _open(registry, catalogue)
    from samara.registry import upkeep

    problems = upkeep.verify(opened, full=full)
    if problems:
        raise RegistryError("\n".join(problems))
    typer.echo(
        f"{registry}: whole; {len(opened.log())} log entries, {len(opened.versions())} versions"
    )


def _open(location: str, catalogue: str | None) -> Registry:
    try:
        from samara.registry.registry import Registry
    except ModuleNotFoundError as error:
        if error.name not in ("sqlalchemy", "fsspec"):
            raise
        raise RegistryError(
            f"registry: needs {error.name}; install it with `pip install 'samara[registry]'`"
        ) from None
    return Registry.open(location, catalogue_url=catalogue)


def _describe(source: Path, note: str | None) -> Description:
    from samara.registry.artifacts import describe_folder

    if source.suffix == ".sdelta":
        from samara.sparse.delta_artifact import describe_delta_file

        description = describe_delta_file(source)
    else:
        description = describe_folder(source)
    return description.model_copy(update={"note": note})


def _evidence(path: Path) -> Evidence:
    from samara.config import load_yaml, validate
    from samara.registry.records import Evidence

    return validate(Evidence, load_yaml(path), path=str(path))


def _split(text: str) -> tuple[str, str]:
    line, colon, reference = text.rpartition(":")
    if not colon or not line or not reference:
        raise ConfigError(f"{text}: give LINE:VERSION, such as assistant:stable or assistant:3")
    return line, reference


def _actor(name: str | None) -> str:
    try:
        return name or getpass.getuser()
    except OSError:  # a container's user without a name
        raise ConfigError("--by: the user logged in has no name; give one") from None
