"""What a deployment is made of: its folder, a node's side, its driver, certificates and keys."""

from __future__ import annotations

import json
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from samara.config import dump_yaml
from samara.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ResourceError,
    SamaraError,
)
from samara.federated.certificates import make_certificates, make_node_key
from samara.federated.deploy import Address, write_deployment
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.federated.messages import ClientState, Instruction
from samara.federated.node import Node, NodeSettings, _node_for, what_the_server_is_told
from samara.federated.superlink import Session, SuperLinkDriver, serving
from samara.measure.task_rows import read_rows
from samara.recipe import load_recipe

ADDRESS = Address(host="127.0.0.1", port=8000)
FEDERATION = "0123456789abcdef"


def _deployed(config, folder):
    return write_deployment("small", config, folder, address=ADDRESS)


# --- the folder -----------------------------------------------------------------------------------


def test_the_folder_says_what_the_server_cannot_see_and_deals_the_rows_out(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, clients__number=3)
    deployed = _deployed(config, tmp_path / "it")
    assert deployed.task.labels == ("negative", "positive")
    assert deployed.clients.number == 3
    job = Job(config, folder_of(tmp_path / "run"))
    ids = []
    for client in range(3):
        own = read_rows(tmp_path / f"it/rows/client-{client:08d}.jsonl")
        parts = job.trainer.data.parts[client]
        assert len(own) == len(parts.train) + len(parts.validation) + len(parts.test)
        ids += [row.id for row in own]
    held_out = [row.id for row in read_rows(tmp_path / "it/server/validation.jsonl")]
    everything = [row.id for row in read_rows(rows / "train.jsonl")]
    assert sorted(ids + held_out) == sorted(everything)
    recipe = load_recipe(tmp_path / "it/recipe.yaml")
    assert recipe.stages[0].config({}) == deployed
    page = (tmp_path / "it/README.md").read_text()
    assert "flower-supernode --superlink 127.0.0.1:8000" in page
    assert f"{tmp_path}/it/rows/client-0000000N.jsonl" in page
    _deployed(deployed, tmp_path / "it")  # again, by the recipe that it wrote
    assert (tmp_path / "it/README.md").read_text() == page


def test_rows_that_are_elsewhere_need_nothing_but_what_the_recipe_says(
    bases, rows, tmp_path, settings
):
    said = {
        "task__labels": ["negative", "positive"],
        "data__validation": str(rows / "test.jsonl"),
        "data__train": str(tmp_path / "elsewhere.jsonl"),
    }
    _deployed(settings(bases["samara"], rows, **said), tmp_path / "it")
    assert not (tmp_path / "it/rows").exists()
    assert '"/path/on/the/node/rows.jsonl"' in (tmp_path / "it/README.md").read_text()
    said["task__labels"] = None
    with pytest.raises(ConfigError, match=r"task\.labels: engine superlink cannot see the rows"):
        _deployed(settings(bases["samara"], rows, **said), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__labels": None}, r"task\.labels: .*name all labels"),
        ({"data__validation": None}, r"data\.validation: .*a file of the server's own"),
        ({"data__max_rows": 9}, r"data\.max_rows: .*leave it out"),
        ({"payload": "sparse"}, r"payload: sparse needs .* use lora or full"),
        (
            {"clients__number": None, "clients__partition": {"kind": "key", "field": "user"}},
            r"clients\.number: .*give it",
        ),
        ({"clients__personal_from": "x"}, r"clients\.personal_from: .*personal=FOLDER"),
    ],
)
def test_a_server_without_rows_says_what_it_needs(bases, rows, settings, changes, message):
    whole = {"engine": "superlink", "task__labels": ["a", "b"], "data__validation": "v.jsonl"}
    settings(bases["samara"], rows, **whole)
    with pytest.raises(ConfigError, match=message):
        settings(bases["samara"], rows, **{**whole, **changes})


def test_a_folder_with_a_run_of_another_recipe_is_left_alone(bases, rows, tmp_path, settings):
    config = settings(bases["samara"], rows)
    deployed = _deployed(config, tmp_path / "it")
    (tmp_path / "it/run").mkdir()
    recipe = {"schema": 1, "name": "small", "federate": deployed.model_dump(mode="json")}
    (tmp_path / "it/run/recipe.yaml").write_text(dump_yaml(recipe))
    _deployed(config, tmp_path / "it")
    with pytest.raises(ConfigError, match=r"another recipe \(method: .*fedlora"):
        _deployed(settings(bases["samara"], rows, method="fedlora"), tmp_path / "it")


def test_the_engine_does_not_run_outside_of_its_app(bases, rows, tmp_path, settings, folder_of):
    config = _deployed(settings(bases["samara"], rows), tmp_path / "it")
    with pytest.raises(ConfigError, match="write one with `samara federate RECIPE --deploy"):
        federate(config, folder_of(tmp_path / "run"))


def test_the_command_refuses_what_it_cannot_start(bases, rows, samara, tmp_path, settings):
    said = settings(
        bases["samara"],
        rows,
        task__labels=["negative", "positive"],
        data__validation=str(rows / "test.jsonl"),
        data__train="elsewhere.jsonl",
    ).model_dump(mode="json")
    recipe = {"schema": 1, "name": "small", "federate": said}
    (tmp_path / "small.yaml").write_text(dump_yaml(recipe))
    asked = ("federate", "small.yaml", "--deploy", "it", "--start")
    refused = {
        asked: "no rows of client 0",
        (*asked, "--host", "example.org"): "--host: goes without --start",
        (*asked, "--out", "run"): "--out: goes without --deploy; the run is in it/run",
        ("federate", "small.yaml", "--port", "9000"): "--port: goes with --deploy FOLDER",
    }
    for command, message in refused.items():
        done = samara(*command)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


# --- a node ---------------------------------------------------------------------------------------


def _message(job, **changes):
    from samara.federated.superlink import _without_paths

    return {
        "recipe": _without_paths(job.config.model_dump(mode="json")),
        "flops": asdict(job.trainer.flops),
        "federation": FEDERATION,
        "method": job.config.method,
        "init_from": job.parents["init_from"],
        "client": 1,
        **changes,
    }


@pytest.fixture
def own(bases, rows, tmp_path, settings, folder_of):
    """A job on one machine, and client 1 of it on a machine of its own."""
    config = settings(bases["samara"], rows, clients__number=2, sharing__direction="none")
    deployed = _deployed(config, tmp_path / "it")
    job = Job(config, folder_of(tmp_path / "run"))
    node_config = {
        "partition-id": 1,
        "data": str(tmp_path / "it/rows/client-00000001.jsonl"),
        "model": str(bases["samara"]),
        "state": str(tmp_path / "state"),
        "device": "cpu",
    }
    job.config = deployed
    return job, node_config


def test_a_node_trains_as_the_client_on_one_machine_and_names_no_path(own, bases, rows, tmp_path):
    job, node_config = own
    message = _message(job)
    for place in (str(tmp_path), str(rows), str(bases["samara"])):
        assert place not in json.dumps(message)
    node = Node(NodeSettings.read(node_config), message)
    asked = Instruction(round=3, client=1, rate=0.5, shape="incremental")
    start = job.trainer.tensors()
    here, kept_here = job.trainer.train(asked, start, ClientState())
    there, kept_there = node.trainer.train(asked, start, node.kept(None))
    assert here.plain() == there.plain()
    for one, other in ((here.tensors, there.tensors), (kept_here.personal, kept_there.personal)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_a_node_keeps_what_the_server_may_go_back_to_and_begins_anew_if_it_was_removed(
    own, samara, tmp_path
):
    job, node_config = own
    node = Node(NodeSettings.read(node_config), _message(job))
    start = job.trainer.tensors()
    _, state = node.trainer.train(Instruction(round=0, client=1), start, node.kept(None))
    for round, before in ((0, None), (2, 0), (5, 2)):
        node.keep(state, round=round, before=before)
    assert node.store.rounds_of(1) == [2, 5]
    assert node.kept(2).personal.keys() == state.personal.keys()
    with pytest.raises(CheckpointError, match="no such file"):
        node.kept(4)
    folder = f"state/{FEDERATION}"
    listed = json.loads(samara("personal", "list", folder, "--json").stdout)
    assert [(o["client"], o["round"], o["layers"]) for o in listed] == [(1, 5, [0, 1, 2, 3])]
    assert samara("personal", "export", folder, "mine").returncode == 0
    done = samara("personal", "import", folder, "mine")
    assert (done.returncode, "by personal=FOLDER" in done.stderr) == (2, True)
    assert samara("personal", "reset", folder, "--all").returncode == 0
    assert not node.kept(5).personal
    begins = {**node_config, "personal": str(tmp_path / "mine")}
    again = Node(NodeSettings.read(begins), _message(job))
    for name, value in again.kept(None).personal.items():
        np.testing.assert_array_equal(value, state.personal[name])


@pytest.mark.parametrize(
    ("node", "message", "error"),
    [
        ({"data": None}, {}, "data is missing"),
        ({"partition-id": "one"}, {}, "partition-id='one' is not a client's number"),
        ({}, {"client": 0}, "this node is client 1, and is registered as client 0"),
        ({}, {"init_from": "another"}, "is not the server's base model"),
        ({}, {"federation": "../../etc"}, "is no name of a federation"),
        ({"data": "nowhere.jsonl"}, {}, "nowhere.jsonl"),
    ],
)
def test_a_node_refuses_what_is_not_its_own(own, node, message, error):
    job, node_config = own
    told = {k: v for k, v in {**node_config, **node}.items() if v is not None}
    with pytest.raises(SamaraError, match=error):
        _node_for(SimpleNamespace(node_config=told), _message(job, **message))


def test_what_an_error_quotes_stays_on_the_node(caplog):
    for error in (DataError("rows.jsonl:7: field 'label' holds 'a secret'"), KeyError("a secret")):
        told = what_the_server_is_told(error)
        assert told == f"{type(error).__name__} on the node; its log says more"
        assert "a secret" in caplog.text
        caplog.clear()


# --- the driver -----------------------------------------------------------------------------------


@dataclass
class _HandMadeGrid:
    """Answers of nodes, by hand: what Flower's grid says at each look."""

    nodes: dict[str, str]
    """Name -> when it was activated."""
    answers: dict[str, list[object]]
    """Name -> what its messages come back as, in order; None: not at all."""
    asked: list[str]

    def get_nodes(self):
        return [
            SimpleNamespace(name=name, node_id=name, registered_at="", last_activated_at=at)
            for name, at in self.nodes.items()
        ]

    def push(self, node):
        self.asked.append(node.id)
        return f"{node.id} {len(self.asked)}"

    def pull_messages(self, ids):
        found = []
        for message in ids:
            name = message.split()[0]
            answer = self.answers[name].pop(0) if self.answers[name] else None
            if answer == "restarted":
                self.nodes[name] += "+"
            elif answer is not None:
                code = answer if isinstance(answer, int) else None
                found.append(
                    SimpleNamespace(
                        metadata=SimpleNamespace(reply_to_message_id=message),
                        has_error=lambda code=code: code is not None,
                        error=SimpleNamespace(code=code, reason="first\nlast"),
                        answer=answer,
                    )
                )
        return found


def test_lost_messages_are_sent_again_and_nobody_is_waited_for_in_vain(
    bases, rows, tmp_path, settings, folder_of, monkeypatch
):
    pytest.importorskip("flwr")
    monkeypatch.setattr("samara.federated.superlink.SECONDS_BETWEEN_LOOKS", 0.01)
    grid = _HandMadeGrid(
        nodes={"client-0": "a", "client-1": "a", "client-2": "a", "client-4": "a", "other": "a"},
        answers={
            "client-0": ["well"],
            "client-1": ["restarted", "well"],
            "client-2": [5, 3, "well"],  # node unavailable, message unavailable
            "client-4": [2],  # the app raised an exception: an answer, too
        },
        asked=[],
    )
    monkeypatch.setattr(SuperLinkDriver, "_send", lambda self, node, content, kind: grid.push(node))
    job = Job(settings(bases["samara"], rows), folder_of(tmp_path / "run"))
    driver = SuperLinkDriver(job.server, job.trainer, job.store, job.run)
    contents = dict.fromkeys(range(5), "train")
    with serving(Session(grid=grid, wait_seconds=0.1, reply_seconds=0.2)):
        found = driver.carry(contents, "train")
        assert {client: own.answer for client, own in found.items()} == {
            0: "well",
            1: "well",
            2: "well",
            4: 2,
        }
        assert sorted(grid.asked) == sorted(
            ["client-0", *["client-1"] * 2, *["client-2"] * 3, "client-4"]
        )
        assert driver.carry({0: "train"}, "train") == {}  # it never replies
        grid.answers["client-1"] = ["restarted"] * 10_000
        assert driver.carry({1: "train"}, "train") == {}  # and it never stays
        grid.nodes.clear()
        with pytest.raises(ResourceError, match="found none of 6 nodes"):
            driver.run()


# --- certificates and keys ------------------------------------------------------------------------


def test_certificates_name_the_server_and_are_signed_by_an_authority_of_ones_own(tmp_path):
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

    make_certificates(tmp_path / "tls", hosts=["federation.example.org", "10.0.0.7"], days=30)
    load = {
        name: x509.load_pem_x509_certificate((tmp_path / "tls" / name).read_bytes())
        for name in ("ca.crt", "server.crt")
    }
    builder = PolicyBuilder().store(Store([load["ca.crt"]]))
    policy = builder.build_server_verifier(x509.DNSName("federation.example.org"))
    assert policy.verify(load["server.crt"], []) == [load["server.crt"], load["ca.crt"]]
    with pytest.raises(VerificationError):
        builder.build_server_verifier(x509.DNSName("example.org")).verify(load["server.crt"], [])
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / "tls" / name).stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="holds a private key already, and nodes trust it"):
        make_certificates(tmp_path / "tls", hosts=["other"])
    with pytest.raises(ConfigError, match="--host: name the server"):
        make_certificates(tmp_path / "other", hosts=[])


def test_the_commands_make_certificates_and_keys(samara, tmp_path):
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    done = samara("deployment", "certificates", "tls", "--host", "127.0.0.1")
    assert (done.returncode, "ca.crt goes to every node" in done.stdout) == (0, True)
    assert samara("deployment", "node-key", "client-3").returncode == 0
    private = tmp_path / "client-3"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key(private.read_bytes(), None)
    public = serialization.load_ssh_public_key(Path(f"{private}.pub").read_bytes())
    assert key.public_key() == public
    with pytest.raises(ConfigError, match="give another path"):
        make_node_key(private)
