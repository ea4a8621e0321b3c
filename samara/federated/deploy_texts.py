"""The texts of a deployment's folder: its Flower app and its page of commands."""

from __future__ import annotations

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "samara-federation"
version = "1.0.0"
description = "A federation of Samara. Its code is Samara's own; this app names it."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={flwr},<1.42", "samara=={samara}"]

[tool.hatch.build.targets.wheel]
packages = ["samara_app"]

[tool.flwr.app]
publisher = "samara"
fab-format-version = 1
flwr-version-target = "{flwr}"

[tool.flwr.app.components]
serverapp = "samara_app.server:app"
clientapp = "samara_app.client:app"

# On the SuperLink's host; change one run's by: flwr run app --run-config "wait-seconds=60"
[tool.flwr.app.config]
recipe = {recipe}
run = {run}
wait-seconds = {wait}    # for a node that is not there; without it the round goes on
reply-seconds = {reply}  # for the reply of a node that is there
"""

SERVER_APP = '''\
"""The server: Samara's own, on the grid that Flower gives it."""

from samara.deployment import make_server_app

app = make_server_app()
'''

CLIENT_APP = '''\
"""A client: Samara's own, on the rows and the model that its node names."""

from samara.federated.node import make_client_app

app = make_client_app()
'''

LICENSE = """\
This app only names code of Samara, which is under the Apache License, Version 2.0:
https://www.apache.org/licenses/LICENSE-2.0
"""

README = """\
# {name}: {clients} clients on devices of their own

Every machine needs the same version of Samara: `pip install 'samara[federated]'`.
What each command is for, and what it does not protect, is in Samara's `docs/federated.md`.

    export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1

Flower keeps its files in `~/.flwr`, or where FLWR_HOME says.

## 1. On the server's machine

Certificates, once. Name the server as the nodes reach it:

    samara deployment certificates {folder}/tls --host {host}

The SuperLink (one HTTPS port for everything; `--host 0.0.0.0` for nodes on other machines):

    export FLWR_HOME={folder}/flower
    cd {folder}
    flower-superlink --host {host} --port {port} --database {folder}/superlink.db \\
        --ssl-ca-certfile tls/ca.crt --ssl-certfile tls/server.crt --ssl-keyfile tls/server.key \\
        --enable-supernode-auth --disable-runtime-dependency-installation

## 2. On each node N, of 0 to {last}

A key pair, made where it stays. Send `client-N.pub` to the server's operator, and take `ca.crt`:

    samara deployment node-key client-N

## 3. On the server's machine, for each public key

The name decides which client a node is:

    export FLWR_HOME={folder}/flower
    flwr supernode register client-N.pub {connection} --name client-N

## 4. On each node N

    flower-supernode --superlink {address} --root-certificates ca.crt \\
        --auth-supernode-private-key client-N --node-config \\
        'partition-id=N data="{rows}" model="{model}" state="state"'

`data`: the node's own rows, as the recipe's task reads them; nothing else is read. `model`: the
node's copy of the base model. `state`: what it keeps between its participations. Also possible:
`device="cpu"`, and `personal="FOLDER"` with what `samara personal export` wrote. Several nodes on
one machine need a `--port` each. Run it under a supervisor that restarts it, as systemd.

## 5. Run, on the server's machine

    FLWR_HOME={folder}/flower flwr run {folder}/app {connection} --stream

Stopped or killed, the same command goes on from the newest round. Results: `{folder}/run`.

## All of it on this machine, for a trial

    samara federate {folder}/recipe.yaml --deploy {folder} --start
"""
