"""A whole deployment on one machine: SuperLink and SuperNodes as processes of their own.

For a trial, and for tests: the same commands as the folder's README.md, over TLS on the loopback
interface, every node with its registered key. Each program is ended with all that it has started,
and Flower's own files stay in the deployment's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from samara.errors import ConfigError, ResourceError
from samara.federated.certificates import CA_CERTIFICATE, make_certificates, make_node_key
from samara.federated.config import FederateConfig
from samara.federated.deploy import CONNECTION, Address, write_flower_config
from samara.federated.store import client_name
from samara.progress import ProgressLine
from samara.runs import RunFolder

if TYPE_CHECKING:
    import psutil

LOOPBACK = "127.0.0.1"
SECONDS_TO_START = 120.0
SECONDS_TO_STOP = 15.0
SECONDS_BETWEEN_LISTS = 20.0


class LocalDeployment:
    """The processes of a deployment whose clients' rows were dealt out into its folder.

    Attributes:
        folder: Of the deployment.
        clients: How many there are.
        trial: Where Flower keeps its files and the programs' words are; made anew.
        address: Of the SuperLink; the port is one that was free.
    """

    def __init__(self, folder: Path, *, clients: int, model: str) -> None:
        """Make what is missing of certificates and keys.

        Args:
            folder: That `write_deployment` wrote.
            clients: How many there are.
            model: The base model, which all nodes read from the same place here.

        Raises:
            ConfigError: If a client's rows are not in the folder.
        """
        self.folder, self.clients, self.model = folder.absolute(), clients, model
        self.address = Address(host=LOOPBACK, port=free_port())
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for client in range(clients):
            if not self._rows(client).exists():
                raise ConfigError(
                    f"--start: no rows of client {client} in {self._rows(client)}; a trial on one "
                    "machine needs data.train on it, or start the nodes as README.md says"
                )
        if not (self.folder / "tls" / CA_CERTIFICATE).exists():
            make_certificates(self.folder / "tls", hosts=[LOOPBACK, "localhost"])
        for client in range(clients):
            if not self.key(client).exists():
                make_node_key(self.key(client))
        self.trial = self.folder / "trial"
        shutil.rmtree(self.trial, ignore_errors=True)  # another port, and keys to register anew
        write_flower_config(self.trial, self.folder, self.address)

    def __enter__(self) -> Self:
        """Start SuperLink and nodes, each registered.

        Raises:
            ResourceError: If one does not start.
        """
        try:
            self.start_server()
            for client in range(self.clients):
                self.register(client)
                self.start_node(client)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def key(self, client: int) -> Path:
        """The private key of a client's node."""
        return self.folder / "nodes" / f"client-{client}"

    def start_server(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            ResourceError: If it does not.
        """
        tls = self.folder / "tls"
        self.start(
            "superlink",
            "flower-superlink",
            *("--host", LOOPBACK, "--port", str(self.address.port)),
            *("--ssl-ca-certfile", str(tls / CA_CERTIFICATE)),
            *("--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--database", str(self.trial / "superlink.db")),
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            self._check_alive("superlink")
            with (
                contextlib.suppress(OSError),
                socket.create_connection((LOOPBACK, self.address.port), timeout=1),
            ):
                return
            if time.monotonic() > deadline:
                raise ResourceError(f"the SuperLink does not answer; see {self._log('superlink')}")
            time.sleep(0.2)

    def register(self, client: int) -> None:
        """Tell the SuperLink which key is a client's."""
        public = f"{self.key(client)}.pub"
        self.flwr("supernode", "register", public, CONNECTION, "--name", f"client-{client}")

    def start_node(self, client: int) -> subprocess.Popen[bytes]:
        """Start a client's SuperNode."""
        key = ("--auth-supernode-private-key", str(self.key(client)))
        return self.start(f"client-{client}", "flower-supernode", *key, *self.node_options(client))

    def node_options(self, client: int) -> tuple[str, ...]:
        """Options of a client's SuperNode but for its key."""
        config = (
            f"partition-id={client} data={json.dumps(str(self._rows(client)))} "
            f"model={json.dumps(self.model)} "
            f"state={json.dumps(str(self.folder / 'nodes/state'))}"
        )
        return (
            *("--superlink", str(self.address)),
            *("--root-certificates", str(self.folder / "tls" / CA_CERTIFICATE)),
            *("--node-config", config, "--port", str(free_port())),
        )

    def submit(self) -> int:
        """Start the run; returns Flower's number of it."""
        answer = self.flwr("run", str(self.folder / "app"), CONNECTION, "--format", "json")
        return int(answer["run-id"])

    def wait(self, run_id: int, *, line: ProgressLine | None = None) -> None:
        """Wait until the run has ended well.

        Args:
            run_id: Flower's number of it.
            line: Is told how many rounds are done.

        Raises:
            ResourceError: If it has failed, with what its log says.
        """
        run, listed, shown = RunFolder(self.folder / "run"), time.monotonic(), 0
        while run.status().get("state") != "finished":
            self._check_alive("superlink")
            done = run.metrics()
            if line is not None and len(done) > shown:
                line.update(done[-1]["step"], loss=f"{done[-1]['validation_loss']:.3f}")
                shown = len(done)
            if time.monotonic() - listed > SECONDS_BETWEEN_LISTS:
                listed = time.monotonic()
                status = self.status(run_id)
                if status.startswith("finished") and run.status().get("state") != "finished":
                    reason = run.status().get("message") or f"see {self._log('superlink')}"
                    raise ResourceError(f"the run on the SuperLink {status}: {reason}")
            time.sleep(0.5)

    def status(self, run_id: int) -> str:
        """What Flower says of a run, as ``running`` or ``finished:failed``."""
        answer = self.flwr("list", CONNECTION, "--run-id", str(run_id), "--format", "json")
        return str(answer["runs"][0]["status"])

    def start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program out of reach of Ctrl-C, its words in a file of ``trial/logs``."""
        path = self._log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            process = subprocess.Popen(
                [program(command), *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def kill(self, name: str) -> None:
        """Kill a program and all that it started, at once."""
        process = self._processes.pop(name)
        started = _started_by(process)
        process.kill()
        process.wait()
        _kill(started)

    def stop(self) -> None:
        """End everything that was started: ask the programs, then kill what is left of them."""
        own = [*self._processes.values()]
        started = [child for process in own for child in _started_by(process)]
        for process in own:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for process in own:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
        for name in list(self._processes):
            self.kill(name)
        _kill(started)

    def flwr(self, *arguments: str) -> Any:
        """Run a command of `flwr`; returns its JSON, or nothing.

        Raises:
            ResourceError: If it fails.
        """
        done = subprocess.run(
            [program("flwr"), *arguments],
            env=self._environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            raise ResourceError(f"flwr {' '.join(arguments[:2])} failed: {said[-2000:]}")
        return json.loads(done.stdout) if "--format" in arguments else None

    def _check_alive(self, name: str) -> None:
        code = self._processes[name].poll()
        if code is not None:
            raise ResourceError(f"{name} ended with {code}; see {self._log(name)}")

    def _log(self, name: str) -> Path:
        return self.trial / "logs" / f"{name}.log"

    def _rows(self, client: int) -> Path:
        return self.folder / "rows" / f"{client_name(client)}.jsonl"

    def _environment(self) -> Mapping[str, str]:
        """Flower finds its programs on the path, and keeps its files in the folder."""
        bin_ = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([bin_, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.trial),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }


def _started_by(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What a process has started, and they; Flower puts some into sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(process.pid).children(recursive=True))
    return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # another process under its number is left alone


def program(name: str) -> str:
    """The path of a program of Flower.

    Raises:
        ConfigError: If it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"--start: no program {name}; pip install 'samara[federated]'")
    return found


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def run_trial(folder: Path, config: FederateConfig) -> None:
    """Run a deployment from beginning to end on this machine.

    Args:
        folder: That `write_deployment` wrote.
        config: That it returned.

    Raises:
        ConfigError: If rows are missing.
        ResourceError: If a program does not start, or the run fails.
    """
    assert config.clients.number is not None, "checked with the settings"
    rounds, label = config.server.rounds, f"federate {folder.name}"
    with (
        LocalDeployment(folder, clients=config.clients.number, model=config.init_from) as here,
        ProgressLine(label, total=rounds, unit="rounds") as line,
    ):
        here.wait(here.submit(), line=line)
