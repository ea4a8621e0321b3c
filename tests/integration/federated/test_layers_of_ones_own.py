"""Layers that clients keep: what is sent, what is not, and taking them out of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samara.errors import CheckpointError, ConfigError
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.federated.messages import ClientState, Instruction
from samara.federated.personal import export_personal, import_personal, reset_personal
from samara.runs import RunFolder


def test_clients_keep_their_layers_send_the_others_and_say_so(
    bases, rows, tmp_path, settings, finished
):
    config = settings(bases["samara"], rows, server__rounds=4, sharing__head="personal")
    result = finished(config, tmp_path / "run")
    sharing = json.loads((tmp_path / "run/sharing.json").read_text())
    kept = {int(c): entry["personal"] for c, entry in sharing["clients"].items()}
    assert any(kept.values())
    assert all(len(layers) <= 3 for layers in kept.values())
    for layer, clients in enumerate(sharing["holders"]):
        assert clients == [c for c in sorted(kept) if layer in kept[c]]
    for entry in result["clients"]["each"]:
        assert entry["personal_layers"] == kept.get(entry["client"], [])
    for record in RunFolder(tmp_path / "run").metrics()[1:]:
        assert record["senders"]["head"] == 0
        for layer in range(4):
            most = sum(layer not in c["personal_layers"] for c in record["clients"])
            assert record["senders"][str(layer)] <= most


def test_a_client_sends_what_the_server_insists_on_and_works_with_its_own(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, sharing__direction="none")
    job = Job(config, folder_of(tmp_path / "run"))
    start, groups = job.trainer.tensors(), job.trainer.layout.groups
    asked = Instruction(round=0, client=2, must_share=(1,))
    reply, state = job.trainer.train(asked, start, ClientState())
    assert {groups[name] for name in reply.tensors} == {"1", "head"}
    assert {groups[name] for name in state.personal} == {"0", "1", "2", "3"}
    other = {name: value + 1 for name, value in start.items()}
    local = job.trainer.local_values(other, state)
    for name, group in groups.items():
        expected = other[name] if group == "head" else state.personal[name]
        np.testing.assert_array_equal(local[name], expected)


def test_a_layer_that_no_batch_ran_is_not_sent(bases, rows, tmp_path, settings, folder_of):
    config = settings(bases["samara"], rows, local__steps=1, sharing__direction="all")
    job = Job(config, folder_of(tmp_path / "run"))
    asked = Instruction(round=0, client=2, rate=0.5, shape="uniform")
    reply, _ = job.trainer.train(asked, job.trainer.tensors(), ClientState())
    assert reply.active_layers == (2,)
    assert len({job.trainer.layout.groups[name] for name in reply.tensors}) == 3


def test_what_a_client_keeps_is_exported_imported_and_removed(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, sharing__direction="none")
    federate(config, folder_of(tmp_path / "run"))
    run = tmp_path / "run"
    client = min(int(c) for c in json.loads((run / "sharing.json").read_text())["clients"])
    newest = sorted((run / "clients" / f"client-{client:08d}").iterdir())[-1]
    before = load_file(newest / "personal.safetensors")
    assert before
    export_personal(run, client, tmp_path / "out")
    reset_personal(run, client)
    assert not (run / "clients" / f"client-{client:08d}").exists()
    with pytest.raises(CheckpointError, match=f"client {client} never took part"):
        reset_personal(run, client)
    with pytest.raises(CheckpointError, match="nothing to export"):
        export_personal(run, client, tmp_path / "out2")
    import_personal(run, client, tmp_path / "out")
    audit = json.loads((run / "checkpoints/round-00000002/state.json").read_text())
    audit = audit["state"]["server"]["audit"]["clients"]
    assert audit[str(client)]["personal"] == [0, 1, 2, 3]
    newest = sorted((run / "clients" / f"client-{client:08d}").iterdir())[-1]
    after = load_file(newest / "personal.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match=f"holds the layers of client {client}, not of 99"):
        import_personal(run, 99, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no checkpoint of a federation"):
        export_personal(tmp_path / "out", client, tmp_path / "out3")


def test_own_layers_are_listed_and_go_on_in_another_run(
    bases, rows, samara, tmp_path, settings, folder_of, finished
):
    config = settings(bases["samara"], rows, sharing__direction="none")
    federate(config, folder_of(tmp_path / "run"))
    listed = json.loads(samara("personal", "list", "run", "--json").stdout)
    reported = json.loads((tmp_path / "run/sharing.json").read_text())["clients"]
    assert {str(own["client"]): own["hash"] for own in listed} == {
        client: entry["hash"] for client, entry in reported.items()
    }
    assert all(own["layers"] == [0, 1, 2, 3] and own["as_reported"] for own in listed)
    table = samara("personal", "list", "run").stdout.splitlines()
    assert len(table) == 1 + len(listed)
    assert samara("personal", "export", "run", "own").returncode == 0
    clients = [own["client"] for own in listed]

    begun = config.clients.model_copy(update={"personal_from": str(tmp_path / "own")})
    job = Job(config.model_copy(update={"clients": begun}), folder_of(tmp_path / "next"))
    for client in range(6):
        state = job.store.load_client(client)
        assert bool(state.personal) == (client in clients)
    result = finished(job.config.model_copy(update={"server": config.server}), tmp_path / "next")
    kept = {own["client"] for own in result["clients"]["each"] if own["personal_layers"]}
    assert kept >= set(clients)

    one = str(clients[0])
    assert samara("personal", "reset", "run", "--client", one).returncode == 0
    left = json.loads(samara("personal", "list", "run", "--json").stdout)
    assert [own["client"] for own in left] == clients[1:]
    assert samara("personal", "import", "run", "own", "--client", one).returncode == 0
    again = json.loads(samara("personal", "list", "run", "--json").stdout)
    assert [own["hash"] for own in again] == [own["hash"] for own in listed]
    assert all(own["as_reported"] for own in again)


def test_own_layers_of_something_else_are_refused(
    bases, rows, samara, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, sharing__direction="none")
    federate(config, folder_of(tmp_path / "run"))
    assert samara("personal", "export", "run", "own").returncode == 0
    refused = {
        ("personal", "reset", "run"): "give --client NUMBER, or --all",
        ("personal", "import", "run", "run"): "holds nothing that `samara personal export` wrote",
        ("personal", "list", "own"): "has no checkpoint of a federation",
        ("personal", "export", "run", "x", "--client", "99"): "nothing to export",
    }
    for command, message in refused.items():
        done = samara(*command)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr

    def begins(folder: str, **changes):
        return settings(
            changes.pop("base", bases["samara"]),
            rows,
            clients__personal_from=str(tmp_path / folder),
            **changes,
        )

    with pytest.raises(ConfigError, match=r"no folder .*nowhere; write one with"):
        Job(begins("nowhere"), folder_of(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="layers for another base model"):
        Job(begins("own", base=bases["bert"]), folder_of(tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"does not fit this run: .* take it from a run with"):
        Job(begins("own", lora__rank=3), folder_of(tmp_path / "c"))
