"""A deployment on one machine: a SuperLink and SuperNodes as processes, over TLS, with keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samara.config import dump_yaml
from samara.federated.certificates import make_node_key
from samara.federated.deploy import Address, write_deployment
from samara.federated.federate import federate
from samara.federated.launch import LOOPBACK, LocalDeployment

SECONDS = 300
"""For anything that takes a few seconds on a machine without other work."""


def _same(outcome, one: Path, other: Path) -> None:
    """Equal in everything but who carried the messages, and which files the server read."""
    found = [outcome(path) for path in (one, other)]
    kept = [{n: v for n, v in own.items() if not n.startswith("clients/")} for own in found]
    for own in kept:
        del own["results"]["engine"], own["results"]["parents"]
    assert kept[0] == kept[1]


def _wait_for(true, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)


def _running_in(folder: Path) -> list[str]:
    """Commands of processes that have to do with a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(path.with_name("cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


def test_the_command_deploys_and_runs_to_the_same_result_bit_for_bit(
    bases, rows, tmp_path, settings, folder_of, outcome
):
    pytest.importorskip("flwr")
    config = settings(bases["samara"], rows, clients__number=2, server__rounds=1)
    federate(config, folder_of(tmp_path / "one"))
    recipe = {"schema": 1, "name": "small", "federate": config.model_dump(mode="json")}
    (tmp_path / "small.yaml").write_text(dump_yaml(recipe))
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "samara", "federate", "small.yaml", "--deploy", "it", "--start"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "it/run: finished" in done.stdout
    _same(outcome, tmp_path / "one", tmp_path / "it/run")
    assert json.loads((tmp_path / "it/run/results.json").read_text())["engine"] == "superlink"
    assert not (home / ".flwr").exists()
    _wait_for(lambda: not _running_in(tmp_path / "it"), 20)
    state = next((tmp_path / "it/nodes/state").iterdir())  # what clients keep is theirs alone
    assert not (tmp_path / "it/run/clients").exists()
    for client in (0, 1):
        own, there = (
            folder / f"clients/client-{client:08d}/round-00000000/personal.safetensors"
            for folder in (tmp_path / "one", state)
        )
        assert own.read_bytes() == there.read_bytes()


def test_strangers_are_refused_and_whoever_is_killed_the_run_goes_on_to_the_same_result(
    bases, rows, tmp_path, settings, folder_of, outcome
):
    pytest.importorskip("flwr")
    config = settings(bases["samara"], rows, clients__number=2, server__rounds=3)
    federate(config, folder_of(tmp_path / "one"))
    folder = tmp_path / "it"
    address = Address(host=LOOPBACK, port=8000)
    write_deployment("small", config, folder, address=address)
    with LocalDeployment(folder, clients=2, model=str(bases["samara"])) as deployment:
        make_node_key(tmp_path / "key")
        key = ("--auth-supernode-private-key", str(tmp_path / "key"))
        strangers = {
            name: deployment.start(name, "flower-supernode", *own, *deployment.node_options(number))
            for number, (name, own) in enumerate({"unknown": key, "keyless": ()}.items())
        }
        assert all(stranger.wait(timeout=SECONDS) for stranger in strangers.values())
        said = [(folder / f"trial/logs/{name}.log").read_text() for name in strangers]
        assert "[code: 2004] Failed to activate SuperNode" in said[0]
        assert "All SuperNodes must be registered" in said[1]

        deployment.submit()
        _wait_for((folder / "run/checkpoints/round-00000001").exists)
        deployment.kill("superlink")  # and its app
        deployment.start_server()
        run = deployment.submit()  # the nodes are still known
        log = folder / "trial/logs/client-1.log"
        before = log.read_text().count("Receiving: train")
        _wait_for(lambda: log.read_text().count("Receiving: train") > before)
        deployment.kill("client-1")
        accepted = log.read_text().count("SuperNode ID")
        node = deployment.start_node(1)
        while log.read_text().count("SuperNode ID") == accepted:
            if node.poll() is not None:  # refused until the SuperLink misses the old one
                time.sleep(5)
                node = deployment.start_node(1)
            time.sleep(0.2)
        deployment.wait(run)
    _same(outcome, tmp_path / "one", folder / "run")
