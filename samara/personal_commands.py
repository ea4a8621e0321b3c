"""``samara personal …``: the layers that clients of a federation keep to themselves.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from samara.errors import ConfigError

app = typer.Typer(
    help="Layers that clients of a federation keep: who holds what, export, import, reset.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path, typer.Argument(help="A run folder, or a node's folder of one federation (state/…).")
]
Clients = Annotated[
    list[int] | None, typer.Option("--client", help="Its number; repeat for more.", min=0)
]


@app.command(name="list")
def list_(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say who holds which layers, by what is on disk, checked.

    Example: samara personal list runs/federate
    """
    from samara.federated.personal import list_personal

    holdings = list_personal(folder)
    if as_json:
        typer.echo(json.dumps([asdict(own) for own in holdings], indent=2))
        return
    typer.echo("client  round  tensors      bytes  hash          layers")
    for own in holdings:
        layers = " ".join(str(layer) for layer in own.layers)
        changed = "  (not what it reported)" if own.as_reported is False else ""
        typer.echo(
            f"{own.client:>6}  {own.round:>5}  {len(own.tensors):>7}  {own.bytes:>9}  "
            f"{(own.hash or '-')[:12]:<12}  {layers or '-'}{changed}"
        )


@app.command()
def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="Where to; a folder for each client.")],
    client: Clients = None,
) -> None:
    """Copy what clients keep, for another run or machine; the run stays as it is.

    Example: samara personal export runs/federate own-layers
    """
    from samara.federated.personal import export_clients

    clients = export_clients(folder, target, clients=client or ())
    typer.echo(f"{target}: {len(clients)} clients; a new run begins with them by")
    typer.echo(f"    clients.personal_from={target}")


@app.command(name="import")
def import_(
    folder: Folder,
    source: Annotated[Path, typer.Argument(help="What `samara personal export` wrote.")],
    client: Clients = None,
) -> None:
    """Give clients of a run that has begun what was exported.

    Example: samara personal import runs/federate own-layers --client 3
    """
    from samara.federated.personal import exported_clients, import_personal
    from samara.federated.store import client_name
    from samara.runs import RunFolder

    clients = client or exported_clients(source)
    with RunFolder(folder).locked():
        for number in clients:
            import_personal(folder, number, source / client_name(number))
    typer.echo(f"{folder}: {len(clients)} clients")


@app.command()
def reset(
    folder: Folder,
    client: Clients = None,
    everyone: Annotated[bool, typer.Option("--all", help="Of all clients.")] = False,
) -> None:
    """Remove everything that is kept of clients; they go on as new ones.

    Example: samara personal reset runs/federate --client 3
    """
    from samara.federated.personal import list_personal, reset_personal
    from samara.runs import RunFolder

    if bool(client) == everyone:
        raise ConfigError("personal reset: give --client NUMBER, or --all")
    with RunFolder(folder).locked():
        clients = client or [own.client for own in list_personal(folder)]
        for number in clients:
            reset_personal(folder, number)
    typer.echo(f"{folder}: {len(clients)} clients removed")
