"""The server's app of a deployment: works off the recipe on the grid that Flower gives it.

Flower starts it on the SuperLink's host; ``samara federate RECIPE --deploy`` writes the app that
names it. The run folder is that of every other run: it is locked, resumes, and says how it ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samara.federated.superlink import Session, serving
from samara.lifecycle import run_recipe
from samara.progress import say
from samara.recipe import load_recipe


def make_server_app() -> Any:
    """The app of the server."""
    from flwr.serverapp import ServerApp

    app = ServerApp()
    app.main()(serve)
    return app


def serve(grid: Any, context: Any) -> None:
    """Run the federation, or go on with it.

    Args:
        grid: Of Flower.
        context: With the app's settings: recipe, run, wait-seconds, reply-seconds.

    Raises:
        SamaraError: As the verb; the run is shown as failed.
    """
    settings = context.run_config
    session = Session(
        grid=grid,
        wait_seconds=float(settings["wait-seconds"]),
        reply_seconds=float(settings["reply-seconds"]),
    )
    with serving(session):
        run_recipe(load_recipe(Path(settings["recipe"])), Path(settings["run"]), say=say)
