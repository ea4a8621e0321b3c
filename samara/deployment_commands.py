"""``samara deployment …``: what a federation on devices of their own needs besides its recipe.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samara.errors import ConfigError

if TYPE_CHECKING:
    from samara.recipe import Recipe

app = typer.Typer(
    help="Certificates and keys of a federation over TLS (see docs/federated.md).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(help="Where the four files go.")],
    host: Annotated[
        list[str],
        typer.Option(help="The server as nodes reach it, by name or IP address; repeat for more."),
    ],
    days: Annotated[int, typer.Option(min=1, help="How long they are valid.")] = 365,
) -> None:
    """Make an authority of your own and the server's certificate.

    Example: samara deployment certificates deploy/tls --host federation.example.org
    """
    from samara.federated.certificates import make_certificates

    make_certificates(folder, hosts=host, days=days)
    typer.echo(f"{folder}: ca.crt goes to every node; server.key and ca.key stay here")


@app.command()
def node_key(
    path: Annotated[Path, typer.Argument(help="The private key; the public one gets .pub.")],
) -> None:
    """Make a node's key pair, on the node.

    Example: samara deployment node-key client-3
    """
    from samara.federated.certificates import make_node_key

    make_node_key(path)
    typer.echo(f"{path}: stays here; send {path}.pub to the server's operator")


def deploy(
    recipe: Recipe, folder: Path, *, host: str | None, port: int | None, start: bool
) -> None:
    """Write a recipe's deployment; with ``start`` run all of it on this machine.

    Args:
        recipe: Of `federate`.
        folder: Where to.
        host: Of the SuperLink; None: this machine.
        port: Of it; None: 8000.
        start: Run it, on ports that are free.

    Raises:
        ConfigError: If the recipe does not say what the server cannot see, or ``start`` is given
            with a host or port.
    """
    if start and (host is not None or port is not None):
        option = "--port" if host is None else "--host"
        raise ConfigError(f"{option}: goes without --start, which stays on this machine")
    from samara.federated.config import FederateConfig
    from samara.federated.deploy import Address, write_deployment

    settings = recipe.stages[0].config({})
    assert isinstance(settings, FederateConfig)
    address = Address(host=host or "127.0.0.1", port=port or 8000)
    config = write_deployment(recipe.name, settings, folder, address=address)
    if not start:
        typer.echo(f"{folder}: {config.clients.number} clients; the commands are in README.md")
        return
    from samara.federated.launch import run_trial

    run_trial(folder, config)
    typer.echo(f"{folder / 'run'}: finished")
