"""A whole deployment on one machine: SuperLink and SuperNodes as processes of their own.

For a trial, and for tests: the same commands as the folder's README.md, over TLS on the loopback
interface, every node with its registered key. Each program is started in a process group of its own
and ended with it. Flower's own files stay in the deployment's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from samara.errors import ConfigError, ResourceError
from samara.federated.certificates import CA_CERTIFICATE, make_certificates, make_node_key
from samara.federated.deploy import CONNECTION, Address, write_flower_config
from samara.federated.store import client_name
from samara.runs import RunFolder

LOOPBACK = "127.0.0.1"
SECONDS_TO_START = 120.0
SECONDS_TO_STOP = 15.0
SECONDS_BETWEEN_LISTS = 20.0


class LocalDeployment:
    """The processes of a deployment whose clients' rows were dealt out into its folder.

    Attributes:
        folder: Of the deployment.
        clients: How many there are.
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
        write_flower_config(self.folder, self.address)

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
        self._start(
            "superlink",
            "flower-superlink",
            *("--host", LOOPBACK, "--port", str(self.address.port)),
            *("--ssl-ca-certfile", str(tls / CA_CERTIFICATE)),
            *("--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--database", str(self.folder / "superlink.db")),
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

    def start_node(self, client: int, *, key: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a client's SuperNode.

        Args:
            client: Its number.
            key: Its private key. Left out: the client's.
        """
        config = (
            f"partition-id={client} data={json.dumps(str(self._rows(client)))} "
            f"model={json.dumps(self.model)} "
            f"state={json.dumps(str(self.folder / 'nodes/state'))}"
        )
        return self._start(
            f"client-{client}" if key is None else key.name,
            "flower-supernode",
            *("--superlink", str(self.address)),
            *("--root-certificates", str(self.folder / "tls" / CA_CERTIFICATE)),
            *("--auth-supernode-private-key", str(key or self.key(client))),
            *("--node-config", config, "--port", str(free_port())),
        )

    def submit(self) -> int:
        """Start the run; returns Flower's number of it."""
        answer = self.flwr("run", str(self.folder / "app"), CONNECTION, "--format", "json")
        return int(answer["run-id"])

    def wait(self, run_id: int) -> None:
        """Wait until the run has ended well.

        Raises:
            ResourceError: If it has failed, with what its log says.
        """
        run, listed = RunFolder(self.folder / "run"), time.monotonic()
        while run.status().get("state") != "finished":
            self._check_alive("superlink")
            if time.monotonic() - listed > SECONDS_BETWEEN_LISTS:
                listed = time.monotonic()
                status = self.status(run_id)
                if status.startswith("finished") and run.status().get("state") != "finished":
                    reason = run.status().get("error") or f"see {self._log('superlink')}"
                    raise ResourceError(f"the run on the SuperLink {status}: {reason}")
            time.sleep(0.5)

    def status(self, run_id: int) -> str:
        """What Flower says of a run, as ``running`` or ``finished:failed``."""
        answer = self.flwr("list", CONNECTION, "--run-id", str(run_id), "--format", "json")
        return str(answer["runs"][0]["status"])

    def kill(self, name: str) -> None:
        """Kill a program and all that it started, at once."""
        process = self._processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End everything that was started, nodes first."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_STOP
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
        for name in list(self._processes):
            self.kill(name)

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

    def _start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
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

    def _check_alive(self, name: str) -> None:
        code = self._processes[name].poll()
        if code is not None:
            raise ResourceError(f"{name} ended with {code}; see {self._log(name)}")

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _rows(self, client: int) -> Path:
        return self.folder / "rows" / f"{client_name(client)}.jsonl"

    def _environment(self) -> Mapping[str, str]:
        """Flower finds its programs on the path, and keeps its files in the folder."""
        bin_ = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join([bin_, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }


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


def run_trial(folder: Path, *, clients: int, model: str) -> None:
    """Run a deployment from beginning to end on this machine.

    Raises:
        ConfigError: If rows are missing.
        ResourceError: If a program does not start, or the run fails.
    """
    with LocalDeployment(folder, clients=clients, model=model) as deployment:
        deployment.wait(deployment.submit())
