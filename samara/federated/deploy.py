"""The folder of a deployment: recipe, Flower app, and how to start it all.

    README.md             the commands, in order, for this federation
    recipe.yaml           the recipe as the server runs it: what it cannot see is written out
    server/               validation rows that were held out of the training rows
    app/                  the Flower app: two files that name functions of Samara, and settings
    flower/config.toml    of the `flwr` command (FLWR_HOME): where the SuperLink is
    tls/  nodes/          certificates and keys, once `samara deployment` has made them
    rows/client-00000003.jsonl     each client's rows, dealt out as on one machine; for a trial
    run/                  the run folder, once it runs
    trial/                of `--start`: Flower's files, and what the programs said

The server never reads the clients' rows, so the recipe has to say what otherwise follows from
them: labels, number of clients, a file of validation rows. Where the training rows are on this
machine, these are made from them, and the result is that of the other engines, bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.adapt.config import LabelsConfig
from samara.config import dump_yaml, load_yaml, validate
from samara.errors import ConfigError
from samara.federated.config import FederateConfig
from samara.federated.deploy_texts import CLIENT_APP, LICENSE, PYPROJECT, README, SERVER_APP
from samara.federated.run_rows import RunRows, read_run_rows
from samara.federated.store import client_name
from samara.federated.task_data import deal_rows
from samara.measure.task_rows import Row
from samara.runs import RunFolder, differences, write_text

FLWR = "1.41.0"
"""The release whose commands and settings are written; its minor versions change them."""
CONNECTION = "samara"
WAIT_SECONDS, REPLY_SECONDS = 600, 3600


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where nodes reach the SuperLink."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def write_deployment(
    name: str, settings: FederateConfig, folder: Path, *, address: Address
) -> FederateConfig:
    """Write the folder; what is in it already (keys, a run) stays.

    Args:
        name: Of the recipe.
        settings: The recipe, of any engine.
        folder: Where to.
        address: Of the SuperLink.

    Returns:
        The settings as the server runs them.

    Raises:
        ConfigError: If the training rows are elsewhere and the recipe leaves out what follows from
            them, or if the folder holds a run that goes by other settings.
        DataError: If rows are missing or malformed.
    """
    folder = folder.absolute()
    train = Path(settings.data.train).expanduser()
    changes = _absolute(settings)
    dealt: list[list[Row]] = []
    if settings.engine != "superlink" and train.exists():
        read = read_run_rows(settings)
        dealt = [
            [read.rows.train[row] for row in part]
            for part in deal_rows(settings, read.rows.train, labels=read.labels)
        ]
        _write_out(settings, read, len(dealt), folder, changes)
    config = validate(FederateConfig, {**settings.model_dump(mode="json"), **changes})
    recipe = {"schema": 1, "name": name, "federate": config.model_dump(mode="json")}
    _check_run(folder, recipe)
    if dealt and settings.data.validation is None:
        write_rows(folder / "server/validation.jsonl", read.rows.validation)
    for client, rows in enumerate(dealt):
        write_rows(folder / "rows" / f"{client_name(client)}.jsonl", rows)
    write_text(folder / "recipe.yaml", dump_yaml(recipe))
    _write_app(folder, address)
    _write_readme(folder, name, config, address)
    return config


def write_rows(path: Path, rows: list[Row] | tuple[Row, ...]) -> None:
    """Write rows as JSON Lines."""
    lines = [json.dumps(dict(row.fields), ensure_ascii=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def _absolute(settings: FederateConfig) -> dict[str, Any]:
    """The settings whose paths the server has to find from wherever it is started."""
    plain = settings.model_dump(mode="json")

    def here(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    plain["clients"]["devices"] = [
        {**entry, "profile": here(entry["profile"])}
        if entry["profile"].endswith((".yaml", ".yml"))
        else entry
        for entry in plain["clients"]["devices"]
    ]
    if plain["data"]["validation"] is not None:
        plain["data"]["validation"] = here(plain["data"]["validation"])
    return {
        "engine": "superlink",
        "init_from": here(plain["init_from"]),
        "task": {**plain["task"], "data": here(plain["task"]["data"])},
        "data": plain["data"],
        "clients": plain["clients"],
    }


def _write_out(
    settings: FederateConfig,
    read: RunRows,
    num_clients: int,
    folder: Path,
    changes: dict[str, Any],
) -> None:
    """Put into the settings what follows from the training rows."""
    changes["clients"]["number"] = num_clients
    changes["data"].update({"max_rows": None, "train": str(folder / "rows")})
    if settings.data.validation is None:
        changes["data"]["validation"] = str(folder / "server/validation.jsonl")
    if isinstance(settings.task, LabelsConfig):
        assert read.labels is not None
        changes["task"].update({"labels": list(read.labels), "max_labels": None})


def _check_run(folder: Path, recipe: dict[str, Any]) -> None:
    run = RunFolder(folder / "run")
    if not run.recipe_path.exists():
        return
    changed = differences(load_yaml(run.recipe_path)["federate"], recipe["federate"])
    if changed:
        raise ConfigError(
            f"{run.path}: holds a run of another recipe ({'; '.join(changed[:3])}); give --deploy "
            "another folder"
        )


def _write_app(folder: Path, address: Address) -> None:
    app = folder / "app"
    write_text(
        app / "pyproject.toml",
        PYPROJECT.format(
            flwr=FLWR,
            samara=importlib.metadata.version("samara"),
            recipe=json.dumps(str(folder / "recipe.yaml")),
            run=json.dumps(str(folder / "run")),
            wait=WAIT_SECONDS,
            reply=REPLY_SECONDS,
        ),
    )
    write_text(app / "LICENSE", LICENSE)
    write_text(app / "samara_app/__init__.py", "")
    write_text(app / "samara_app/server.py", SERVER_APP)
    write_text(app / "samara_app/client.py", CLIENT_APP)
    write_flower_config(folder / "flower", folder, address)


def write_flower_config(home: Path, folder: Path, address: Address) -> None:
    """Tell the `flwr` command where the SuperLink is.

    Args:
        home: Its FLWR_HOME.
        folder: Of the deployment.
        address: Of the SuperLink.
    """
    write_text(
        home / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(str(address))}\n"
        f"root-certificates = {json.dumps(str(folder / 'tls/ca.crt'))}\n",
    )


def _write_readme(folder: Path, name: str, config: FederateConfig, address: Address) -> None:
    rows = "/path/on/the/node/rows.jsonl"
    if (folder / "rows").exists():
        rows = f"{folder}/rows/client-0000000N.jsonl"
    text = README.format(
        name=name,
        folder=folder,
        address=address,
        host=address.host,
        port=address.port,
        clients=config.clients.number,
        last=(config.clients.number or 1) - 1,
        rows=rows,
        model=config.init_from,
        connection=CONNECTION,
    )
    write_text(folder / "README.md", text)
