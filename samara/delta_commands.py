"""``samara delta …``: small, exactly reversible changes of a model, as files.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from samara.errors import ConfigError

if TYPE_CHECKING:
    from samara.sparse.delta import Delta
    from samara.sparse.delta_records import Provenance

app = typer.Typer(
    help="Sparse deltas: small files that change a model and change it back, bit for bit.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DeltaArgument = Annotated[Path, typer.Argument(help="A delta file (.sdelta).")]
ModelArgument = Annotated[Path, typer.Argument(help="A model folder, or a run folder.")]
BaseOption = Annotated[Path, typer.Option(help="The model folder the delta is made for.")]
OutFile = Annotated[Path, typer.Option(help="The delta file to write.")]
RecordOption = Annotated[
    Path | None,
    typer.Option(help="YAML with train, eval, audit, license and more for the file's record."),
]


@app.command()
def show(
    delta: Annotated[
        Path, typer.Argument(help="A delta file, or a model folder that may carry some.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record.")] = False,
) -> None:
    """Say what a delta file is: base, size, origin, scores, audit, licence.

    Of a model folder: which deltas it carries. Example: samara delta show summaries.sdelta
    """
    if delta.is_dir():
        _show_folder(delta, as_json=as_json)
        return
    from samara.sparse.delta_file import read_delta
    from samara.sparse.delta_text import describe

    data = read_delta(delta)
    if as_json:
        typer.echo(json.dumps(data.record.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        typer.echo(describe(data, num_bytes=delta.stat().st_size))


def _show_folder(folder: Path, *, as_json: bool) -> None:
    from samara.sparse.delta_checkpoint import checkpoint_state

    state = checkpoint_state(folder)
    if as_json:
        typer.echo(json.dumps({"stack": list(state.stack), "pending": state.pending}))
        return
    if state.pending:
        action, delta_id = state.pending
        typer.echo(
            f"{folder}: a process was killed amid `{action}` of {delta_id[:12]}; the next command "
            "that changes the folder puts it right"
        )
    for number, delta_id in enumerate(state.stack, start=1):
        typer.echo(f"{number:>3}  {delta_id}")
    if not state.stack:
        typer.echo(f"{folder}: carries no delta")


@app.command()
def verify(
    delta: DeltaArgument,
    base: Annotated[Path | None, typer.Option(help="Model folder it should fit.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Hash every byte of the base; trust no cache.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(help="The signer's public key; the delta must be signed by it.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="The signature file.", show_default="DELTA.sig")
    ] = None,
) -> None:
    """Check a delta file, who signed it, and that it fits a model as it is now. Writes nothing.

    Example: samara delta verify summaries.sdelta --base llama-1b --full
    """
    from samara.sparse.delta_file import read_delta

    if full and base is None:
        raise ConfigError("--full: hashes the base; name it with --base")
    if signature is not None and key is None:
        raise ConfigError("--signature: needs the signer's public key; name it with --key")
    data = read_delta(delta)
    typer.echo(f"{delta}: whole; delta {data.id}")
    if key is not None:
        from samara.sparse.delta_signature import signature_path, verify_signature

        signer = verify_signature(data, signature or signature_path(delta), key)
        typer.echo(f"{delta}: data and record signed by {signer}")
    if base is not None:
        from samara.sparse.delta_checkpoint import verify_checkpoint

        verify_checkpoint(data, base, full=full)
        typer.echo(f"{base}: is the base it was made for")


@app.command()
def sign(
    delta: DeltaArgument,
    key: Annotated[
        Path, typer.Option(help="Your private Ed25519 key, as ssh-keygen -t ed25519 makes it.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The signature file to write.", show_default="DELTA.sig")
    ] = None,
) -> None:
    """Sign a delta with its whole record: weights, scores, audits, licence.

    Example: samara delta sign summaries.sdelta --key ~/.ssh/release
    """
    from samara.sparse.delta_file import read_delta
    from samara.sparse.delta_signature import sign as sign_delta
    from samara.sparse.delta_signature import signature_path

    path = out or signature_path(delta)
    signer = sign_delta(read_delta(delta), key, path)
    typer.echo(f"{path}: signed by {signer}")


@app.command()
def apply(delta: DeltaArgument, model: ModelArgument) -> None:
    """Patch a model folder in place, all or nothing; `revert` gives back every bit.

    Example: samara delta apply summaries.sdelta llama-1b
    """
    from samara.sparse.delta_checkpoint import apply_to_checkpoint
    from samara.sparse.delta_file import read_delta

    data = read_delta(delta)
    apply_to_checkpoint(data, model)
    typer.echo(f"{model}: carries delta {data.id[:12]}, {data.nnz:,} weights changed")


@app.command()
def revert(
    model: ModelArgument,
    delta: Annotated[
        str | None, typer.Option(help="Id (or its beginning) expected on top; else refuse.")
    ] = None,
) -> None:
    """Take the last delta off a model folder, bit for bit; its file is not needed.

    Example: samara delta revert llama-1b
    """
    from samara.sparse.delta_checkpoint import revert_checkpoint

    typer.echo(f"{model}: delta {revert_checkpoint(model, delta)[:12]} is off")


@app.command()
def compose(
    deltas: Annotated[list[Path], typer.Argument(help="Two or more delta files of one base.")],
    base: BaseOption,
    out: OutFile,
    policy: Annotated[
        Literal["error", "last", "priority", "sum"],
        typer.Option(help="What counts where deltas change the same weight."),
    ] = "error",
    priority: Annotated[
        list[int] | None, typer.Option(help="One per delta, in their order; larger wins.")
    ] = None,
) -> None:
    """Make one delta of several, and say where they meet.

    Example: samara delta compose a.sdelta b.sdelta --base llama-1b --policy sum --out ab.sdelta
    """
    from samara.sparse.delta_compose import compose as compose_deltas
    from samara.sparse.delta_compose import overlaps
    from samara.sparse.delta_file import read_delta
    from samara.sparse.tensor_files import CheckpointFiles

    members = [read_delta(path) for path in deltas]
    if priority and len(priority) != len(members):
        raise ConfigError(f"--priority: {len(priority)} given for {len(members)} deltas")
    files = CheckpointFiles(base)
    for met in overlaps(members, files):
        if met.shared:
            typer.echo(
                f"{met.name}: {met.first[:12]} and {met.second[:12]} share {met.shared:,} weights, "
                f"{met.opposed:,} moved in opposite directions"
            )
    priorities = dict(zip((member.id for member in members), priority or [], strict=False))
    composed = compose_deltas(members, files, policy=policy, priorities=priorities)
    composed.delta.save(out)
    typer.echo(f"{out}: delta {composed.delta.id[:12]} of {len(members)} deltas")


@app.command()
def export(
    deltas: Annotated[list[Path], typer.Argument(help="Delta files, in the order they apply.")],
    base: BaseOption,
    out: Annotated[Path, typer.Option(help="The model folder to make; must not exist.")],
) -> None:
    """Write a plain checkpoint with deltas merged in; the base stays as it is.

    Example: samara delta export summaries.sdelta --base llama-1b --out llama-1b-summaries
    """
    from samara.sparse.delta_exchange import export_checkpoint
    from samara.sparse.delta_file import read_delta

    for warning in export_checkpoint([read_delta(path) for path in deltas], base, out):
        typer.echo(f"samara: {warning}", err=True)
    typer.echo(f"{out}: {base} with {len(deltas)} delta(s)")


@app.command("import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="Folder of a SHiRA adapter saved by peft.")],
    base: BaseOption,
    out: OutFile,
    record: RecordOption = None,
) -> None:
    """Make a delta file of a SHiRA adapter.

    Example: samara delta import shira-adapter --base llama-1b --out shira.sdelta
    """
    from samara.sparse.delta_exchange import import_shira

    _save(import_shira(adapter, base, records=_records(record)), out)


@app.command()
def diff(
    base: ModelArgument,
    tuned: Annotated[Path, typer.Argument(help="A model folder of the same design.")],
    out: OutFile,
    density: Annotated[
        float | None,
        typer.Option(help="Keep only this share of each tensor, what moved furthest. None: all."),
    ] = None,
    record: RecordOption = None,
) -> None:
    """Make a delta file of the difference between two checkpoints.

    Example: samara delta diff llama-1b llama-1b-tuned --out tuned.sdelta
    """
    from samara.sparse.delta_exchange import delta_between

    _save(delta_between(base, tuned, density=density, records=_records(record)), out)


def _records(path: Path | None) -> Provenance | None:
    if path is None:
        return None
    from samara.config import load_yaml, validate
    from samara.sparse.delta_records import Provenance

    return validate(Provenance, load_yaml(path), path=str(path))


def _save(delta: Delta, path: Path) -> None:
    delta.save(path)
    size = path.stat().st_size
    per_entry = f", {size / delta.nnz:.2f} bytes each" if delta.nnz else ""
    typer.echo(f"{path}: delta {delta.id[:12]}, {delta.nnz:,} weights, {size:,} bytes{per_entry}")
