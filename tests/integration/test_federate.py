"""Verb federate: the whole of it on a tiny model, from rows to results."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from samara.config import dump_yaml, validate
from samara.data.draws import Draws, Purpose
from samara.data.loader import training_batches
from samara.errors import CheckpointError, ConfigError, Stopped
from samara.federated.config import FederateConfig
from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.federated.messages import ClientState, Instruction
from samara.federated.personal import export_personal, import_personal, reset_personal
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import RunFolder
from samara.train.checkpoint import TrainingState
from samara.train.loop import train
from samara.train.optim import Optimizer

WORDS = "the a film book was good bad great awful fine dull very quite not and".split()
VOCABULARY = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", *WORDS])}
DEVICE = {
    "memory_bytes": 1e9,
    "download_bytes_per_second": 1e6,
    "upload_bytes_per_second": 1e6,
    "compute_watts": 10,
    "communicate_watts": 4,
    "source": "by hand",
}
GIVEN = {
    "kind": "given",
    "seconds_fixed": 0.1,
    "seconds_per_layer": 0.2,
    "bytes_fixed": 1e6,
    "bytes_per_layer": 1e6,
    "source": "by hand",
}


def build(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if kind == "bert":
        BertForMaskedLM(
            BertConfig(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=32,
            )
        ).save_pretrained(folder)
    else:
        design = ModelConfig.model_validate(
            {
                "hidden_size": 16,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "ffn_dim": 24,
                "vocab_size": 32,
                "max_position_embeddings": 32,
            }
        )
        save_model(SamaraForCausalLM(SamaraConfig.from_design(design)), folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: build(kind, root / kind) for kind in ("samara", "bert")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews of eight users, and two kinds of device."""
    folder = tmp_path_factory.mktemp("rows")
    for split, number in (("train", 240), ("test", 24)):
        draw = np.random.default_rng(len(split))
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(number):
                good = bool(draw.integers(2))
                word = draw.choice(["good", "great", "fine"] if good else ["bad", "awful", "dull"])
                filler = " ".join(draw.choice(["very", "quite", "the", "a"], draw.integers(1, 4)))
                row = {
                    "id": f"{split}{i}",
                    "text": f"the {draw.choice(['film', 'book'])} was {filler} {word} .",
                    "label": "positive" if good else "negative",
                    "user": f"user-{i % 8}",
                }
                file.write(json.dumps(row) + "\n")
    for name, slowness in (("quick", 1.0), ("slow", 20.0)):
        (folder / f"{name}.yaml").write_text(
            dump_yaml({"name": name, "slowness": slowness, **DEVICE})
        )
    return folder


def settings(base: Path, rows: Path, **changes: Any) -> FederateConfig:
    """Six clients, two rounds; ``a__b`` changes a.b."""
    data: dict[str, Any] = {
        "seed": 5,
        "init_from": str(base),
        "task": {"kind": "labels", "name": "reviews", "data": str(rows / "test.jsonl")},
        "data": {"train": str(rows / "train.jsonl"), "sequence_length": 16},
        "lora": {"rank": 2, "dropout": 0.1},
        "configurator": {"rates": [0.25, 0.5], "shapes": ["incremental"]},
        "sharing": {"direction": "share_common", "patience": 1, "hysteresis": 0.0},
        "clients": {
            "number": 6,
            "per_round": 3,
            "partition": {"kind": "dirichlet", "alpha": 1.0},
            "devices": [{"profile": str(rows / f"{name}.yaml")} for name in ("quick", "slow")],
        },
        "local": {"steps": 2, "batch_size": 4, "optimizer": {"lr": 0.01}, "device": "cpu"},
        "server": {"rounds": 2},
        "clock": GIVEN,
    }
    for path, value in changes.items():
        node = data
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return validate(FederateConfig, data)


def folder_of(path: Path) -> RunFolder:
    path.mkdir(exist_ok=True)
    return RunFolder(path)


def finished(config: FederateConfig, path: Path) -> dict[str, Any]:
    federate(config, folder_of(path))
    return json.loads((path / "results.json").read_text())


def outcome(path: Path) -> dict[str, Any]:
    """Everything that has to be the same: values, state, log; without times that were measured."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if "cpu_seconds" not in k}
        return [clean(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*.safetensors")):
        found[str(file.relative_to(path))] = file.read_bytes()
    newest = sorted((path / "checkpoints").iterdir())[-1]
    found["state"] = clean(json.loads((newest / "state.json").read_text())["state"])
    found["log"] = [clean(json.loads(x)) for x in (path / "metrics.jsonl").read_text().splitlines()]
    found["results"] = clean(json.loads((path / "results.json").read_text()))
    found["sharing"] = json.loads((path / "sharing.json").read_text())
    return found


METHODS = (
    "droppeft", "static_stld", "fedlora", "fedlora_checkpointing", "frozen_depth", "head_only",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "base"),
    [*((method, "samara") for method in METHODS), ("droppeft", "bert"), ("fedlora", "bert")],
)
def test_one_line_switches_the_method(bases, rows, tmp_path, method, base):
    result = finished(settings(bases[base], rows, method=method), tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()
    assert [record["step"] for record in log] == [0, 1, 2]
    layers = {c["active_layers_max"] for record in log[1:] for c in record["clients"]}
    assert layers == {"static_stld": {2}, "droppeft": layers}.get(method, {4})
    assert (min(layers) < 4) == (method in ("droppeft", "static_stld"))
    assert all(c["verdict"] == "ok" for record in log[1:] for c in record["clients"])
    assert {"seconds", "joules", "clock", "devices"} <= result["modelled"].keys()
    assert result["measured"]["cpu_seconds"] > 0
    assert set(result["modelled"]["devices"]) == {"quick", "slow"}
    groups = set(log[1]["senders"])
    wanted = {"head_only": {"head"}, "frozen_depth": {"2", "3", "head"}}
    assert groups == wanted.get(method, {"0", "1", "2", "3", "head"})
    if method != "droppeft":
        assert all(not entry["personal_layers"] for entry in result["clients"]["each"])
    exported = "head.safetensors" if method == "head_only" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / exported).exists()


def test_causal_models_are_tuned_on_the_text_of_natural_users(bases, rows, tmp_path):
    config = settings(
        bases["samara"],
        rows,
        task={"kind": "perplexity", "name": "text", "data": str(rows / "test.jsonl")},
        clients__number=None,
        clients__partition={"kind": "key", "field": "user"},
        server__rounds=3,
        local__steps=8,
    )
    result = finished(config, tmp_path / "run")
    losses = [record["validation_loss"] for record in RunFolder(tmp_path / "run").metrics()]
    assert min(losses) < losses[0] - 0.1
    assert result["clients"]["number"] == 8
    assert "loss_worst_decile" in result["clients"]["personal"]
    assert result["test"]["best"]["accuracy"] is None


# --- the same result, however it came about -------------------------------------------------------


@pytest.mark.parametrize("method", ["droppeft", "fedlora"])
def test_a_run_that_was_killed_goes_on_to_the_same_result_bit_for_bit(
    bases, rows, tmp_path, monkeypatch, method
):
    config = settings(bases["samara"], rows, method=method, server__rounds=3)
    federate(config, folder_of(tmp_path / "whole"))

    class Killed(BaseException):
        pass

    train_client, calls = InProcessDriver.run_round, []

    def killed_in_the_middle(driver):
        # Once after a round, once with its clients trained and the round not finished.
        calls.append(1)
        if len(calls) == 2:  # the second round: its clients train, and are saved
            monkeypatch.setattr(driver.server, "finish", raise_killed)
        if len(calls) == 4:  # between two rounds
            raise Killed
        return train_client(driver)

    def raise_killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "run_round", killed_in_the_middle)
        for _ in range(2):
            with pytest.raises(Killed):
                federate(config, folder_of(tmp_path / "cut"))
    federate(config, folder_of(tmp_path / "cut"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(bases, rows, tmp_path, caplog):
    config = settings(bases["samara"], rows)
    federate(config, folder_of(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest = tmp_path / "cut/checkpoints/round-00000002"
    (newest / "global.safetensors").write_bytes(b"rubbish")
    federate(config, folder_of(tmp_path / "cut"))
    assert "is cut off" in caplog.text
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    for path in (tmp_path / "cut/checkpoints").iterdir():
        (path / "global.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        federate(config, folder_of(tmp_path / "cut"))


def test_a_checkpoint_of_other_data_is_refused(bases, rows, tmp_path):
    config = settings(bases["samara"], rows, server__rounds=1)
    federate(config, folder_of(tmp_path / "run"))
    other = tmp_path / "other.jsonl"
    other.write_text((rows / "train.jsonl").read_text() + (rows / "test.jsonl").read_text())
    changed = settings(bases["samara"], rows, server__rounds=2, data__train=str(other))
    with pytest.raises(CheckpointError, match="belongs to a run of something else"):
        federate(changed, folder_of(tmp_path / "run"))


def test_a_signal_stops_after_the_round_in_hand(bases, rows, tmp_path, monkeypatch):
    config = settings(bases["samara"], rows)
    federate(config, folder_of(tmp_path / "whole"))
    run_round = InProcessDriver.run_round

    def signalled(driver):
        record = run_round(driver)
        signal.raise_signal(signal.SIGTERM)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "run_round", signalled)
        with pytest.raises(Stopped, match="stopped after round 1; saved"):
            federate(config, folder_of(tmp_path / "cut"))
    federate(config, folder_of(tmp_path / "cut"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_federation_of_one_client_is_training_on_one_machine(bases, rows, tmp_path):
    """Each round an optimizer that starts afresh, on the client's rows in their order."""
    config = settings(
        bases["samara"],
        rows,
        method="fedlora",
        lora__dropout=0.0,
        clients__number=1,
        clients__per_round=1,
        clients__partition={"kind": "iid"},
        server={"rounds": 2, "rollback_rise": None},
    )
    finished(config, tmp_path / "run")
    job = Job(config, folder_of(tmp_path / "alone"))
    trainer, local = job.trainer, config.local
    own = trainer.data.client(0).train
    order = Draws(seed=5, purpose=Purpose.CLIENT_TRAINING).integers(1, below=2**53)
    for round in range(2):
        state = TrainingState()
        train(
            trainer.model,
            objective=trainer.objective,
            optimizer=Optimizer(trainer.model, local.optimizer),
            learning_rate=lambda _: 0.01,
            batches=training_batches(
                own,
                batch_size=4,
                micro_batch_size=4,
                seed=int(order[0]),
                start_step=2 * round,
                num_steps=2,
            ),
            state=state,
            num_steps=2,
            clip_grad_norm=1.0,
        )
    saved = load_file(tmp_path / "run/checkpoints/round-00000002/global.safetensors")
    for name, value in trainer.tensors().items():
        np.testing.assert_array_equal(saved[name].numpy(), value)


def test_a_client_depends_on_nothing_that_happened_before(bases, rows, tmp_path):
    job = Job(settings(bases["samara"], rows), folder_of(tmp_path / "run"))
    start = job.trainer.tensors()
    asked = [Instruction(round=1, client=c, rate=0.5, shape="incremental") for c in (0, 1)]
    first, _ = job.trainer.train(asked[0], start, ClientState())
    job.trainer.train(asked[1], start, ClientState())
    again, _ = job.trainer.train(asked[0], start, ClientState())
    assert first.plain() == again.plain()
    for name, value in first.tensors.items():
        np.testing.assert_array_equal(value, again.tensors[name])


# --- layers of one's own --------------------------------------------------------------------------


def test_clients_keep_their_layers_send_the_others_and_say_so(bases, rows, tmp_path):
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


def test_a_client_sends_what_the_server_insists_on_and_works_with_its_own(bases, rows, tmp_path):
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


def test_a_layer_that_no_batch_ran_is_not_sent(bases, rows, tmp_path):
    config = settings(bases["samara"], rows, local__steps=1, sharing__direction="all")
    job = Job(config, folder_of(tmp_path / "run"))
    asked = Instruction(round=0, client=2, rate=0.5, shape="uniform")
    reply, _ = job.trainer.train(asked, job.trainer.tensors(), ClientState())
    assert reply.active_layers == (2,)
    assert len({job.trainer.layout.groups[name] for name in reply.tensors}) == 3


def test_what_a_client_keeps_is_exported_imported_and_removed(bases, rows, tmp_path):
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


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_round_completes_whatever_its_clients_send(bases, rows, tmp_path):
    config = settings(bases["samara"], rows, clients__per_round=6, method="fedlora")
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    honest = job.trainer.train

    def spoilt(instruction, tensors, state):
        reply, state = honest(instruction, tensors, state)
        sent = dict(reply.tensors)
        name = next(iter(sent))
        match instruction.client:
            case 0:
                sent[name] = np.full_like(sent[name], np.nan)
            case 1:
                sent[name] = sent[name][:1]
            case 2:
                sent["somebody.else"] = sent.pop(name)
            case 3:
                sent = {key: 1e6 * value for key, value in sent.items()}
        return type(reply)(**{**vars(reply), "tensors": sent}), state

    job.trainer.train = spoilt
    record = driver.run_round()
    reasons = {c["client"]: (c["verdict"], c["reason"]) for c in record["clients"]}
    assert [reasons[client][0] for client in range(6)] == ["refused"] * 4 + ["ok"] * 2
    assert "not finite" in reasons[0][1]
    assert "shape" in reasons[1][1]
    assert "unknown tensor somebody.else" in reasons[2][1]
    assert "times the median" in reasons[3][1]
    assert set(record["senders"].values()) == {2}


def test_a_client_whose_own_layers_are_damaged_is_lost_and_the_round_completes(
    bases, rows, tmp_path
):
    config = settings(bases["samara"], rows, clients__per_round=6, sharing__direction="none")
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    driver.run_round()
    file = tmp_path / "run/clients/client-00000003/round-00000000/personal.safetensors"
    file.write_bytes(b"rubbish")
    record = driver.run_round()
    verdicts = {c["client"]: c["verdict"] for c in record["clients"]}
    assert verdicts == {client: "error" if client == 3 else "ok" for client in range(6)}
    assert "is cut off" in record["clients"][3]["reason"]


def test_a_training_that_diverges_is_a_failed_reply_and_changes_nothing(bases, rows, tmp_path):
    config = settings(bases["samara"], rows, local__optimizer={"lr": 1e30})
    job = Job(config, folder_of(tmp_path / "run"))
    state = ClientState()
    reply, after = job.trainer.train(Instruction(round=0, client=0), job.trainer.tensors(), state)
    assert reply.verdict == "not_finite"
    assert reply.message
    assert not reply.tensors
    assert after is state


def test_lost_and_late_clients_do_not_stop_a_run(bases, rows, tmp_path):
    for name, changes in (("lossy", {"failure_probability": 0.5}), ("late", {"slowness": 1e4})):
        path = tmp_path / f"{name}.yaml"
        device = {"name": name, "slowness": 1.0, "availability": 0.9, **DEVICE, **changes}
        path.write_text(dump_yaml(device))
    config = settings(
        bases["samara"],
        rows,
        clients__devices=[{"profile": str(tmp_path / f"{n}.yaml")} for n in ("lossy", "late")],
        clients__per_round=5,
        server={"rounds": 3, "deadline_seconds": 60.0},
    )
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()[1:]
    verdicts = [(c["device"], c["verdict"]) for record in log for c in record["clients"]]
    assert {v for d, v in verdicts if d == "late"} == {"timeout"}
    assert {v for d, v in verdicts if d == "lossy"} == {"ok", "error"}
    assert all(record["round_modelled_seconds"] <= 60 for record in log)


def test_a_round_in_which_nobody_can_be_reached_changes_nothing(bases, rows, tmp_path):
    path = tmp_path / "gone.yaml"
    path.write_text(dump_yaml({"name": "gone", "slowness": 1.0, "availability": 0.0, **DEVICE}))
    config = settings(bases["samara"], rows, clients__devices=[{"profile": str(path)}])
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()
    assert len({record["validation_loss"] for record in log}) == 1
    assert all(not record["clients"] for record in log[1:])


def test_a_device_with_little_memory_drops_layers_or_sits_out(bases, rows, tmp_path):
    small = tmp_path / "small.yaml"
    # With the clock's 1 MB + 1 MB a layer and the margin of a tenth: three layers fit, not four.
    device = {**DEVICE, "name": "small", "slowness": 1.0, "memory_bytes": 4.5e6}
    small.write_text(dump_yaml(device))
    for method in ("droppeft", "fedlora"):
        config = settings(
            bases["samara"],
            rows,
            method=method,
            clients__devices=[{"profile": str(small)}],
            server__rounds=2,
        )
        finished(config, tmp_path / method)
        log = RunFolder(tmp_path / method).metrics()[1:]
        counts = [c["active_layers_max"] for record in log for c in record["clients"]]
        if method == "droppeft":
            assert counts
            assert max(counts) <= 3
        else:
            assert not counts
            assert all(len(record["sat_out"]) == 3 for record in log)


def test_the_server_goes_back_to_its_best_weights_when_the_loss_rises(bases, rows, tmp_path):
    config = settings(
        bases["samara"], rows, method="fedlora", local__optimizer={"lr": 0.5}, server__rounds=3
    )
    config = config.model_copy(
        update={"server": config.server.model_copy(update={"rollback_rise": 0.0})}
    )
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()
    assert any(record["rolled_back"] for record in log[1:])
    best = min(log, key=lambda record: record["validation_loss"])
    result = json.loads((tmp_path / "run/results.json").read_text())
    assert result["best_round"] == best["step"]
    if log[-1]["rolled_back"]:
        assert result["test"]["last"] == result["test"]["best"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_dropout": {"rate": 0.5, "scale": "survival_at_eval"}},
            "layer_dropout.scale: survival_at_eval changes evaluation",
        ),
        ({"clients__devices": []}, "clients: devices: is empty"),
        ({"clients__test_fraction": 0.95}, "leave nothing to train on"),
        ({"metod": "fedlora"}, "metod: unknown key .did you mean 'method'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(bases, rows, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(bases["samara"], rows, **changes)


def test_settings_that_do_not_fit_the_model_are_refused(bases, rows, tmp_path):
    text = {"kind": "perplexity", "name": "text", "data": str(rows / "test.jsonl")}
    with pytest.raises(ConfigError, match=r"method: head_only needs task.kind labels"):
        settings(
            bases["samara"],
            rows,
            method="head_only",
            task=text,
            clients__partition={"kind": "iid"},
        )
    with pytest.raises(ConfigError, match=r"clients.partition: dirichlet spreads labels"):
        settings(bases["samara"], rows, task=text)
    config = settings(bases["samara"], rows, configurator__rates=[0.05])
    with pytest.raises(ConfigError, match=r"configurator.rates: arm 0.05-incremental"):
        federate(config, folder_of(tmp_path / "a"))
    config = settings(bases["bert"], rows, layer_dropout={"rate": 0.5, "scale": "inverse_keep"})
    with pytest.raises(ConfigError, match=r"layer_dropout.scale: inverse_keep needs layers"):
        federate(config, folder_of(tmp_path / "c"))
    config = settings(bases["samara"], rows, method="frozen_depth", trained_layers=9)
    with pytest.raises(ConfigError, match=r"trained_layers: 9 wanted, the model has 4 layers"):
        federate(config, folder_of(tmp_path / "b"))


def test_the_clock_is_measured_once_and_kept_for_when_the_run_goes_on(bases, rows, tmp_path):
    clock = {"kind": "calibrated", "repetitions": 1}
    first = finished(settings(bases["samara"], rows, clock=clock), tmp_path / "run")
    measured = json.loads((tmp_path / "run/clock.json").read_text())
    assert measured["basis"] == "measured"
    assert measured["bytes_per_layer"] > 0
    assert measured["bytes_fixed"] > 0
    again = finished(
        settings(bases["samara"], rows, clock=clock, server__rounds=3), tmp_path / "run"
    )
    assert first["modelled"]["clock"] == again["modelled"]["clock"] == measured


def test_the_command_runs_a_recipe(bases, rows, samara, tmp_path):
    config = settings(bases["samara"], rows).model_dump(mode="json")
    recipe = {"schema": 1, "name": "small", "federate": config}
    (tmp_path / "small.yaml").write_text(dump_yaml(recipe))
    done = samara("federate", "small.yaml", "method=fedlora", "server.rounds=1", "--out", "run")
    assert (done.returncode, "1/1 rounds" in done.stderr) == (0, True)
    assert json.loads((tmp_path / "run/results.json").read_text())["method"] == "fedlora"


def test_flower_carries_the_messages_to_the_same_result_bit_for_bit(
    bases, rows, tmp_path, monkeypatch
):
    """It also goes on with what another engine began, the clients' own layers included."""
    pytest.importorskip("flwr")
    config = settings(bases["samara"], rows, clients__number=4, server__rounds=3)
    federate(config, folder_of(tmp_path / "one"))
    run_round = InProcessDriver.run_round

    def signalled(driver):
        record = run_round(driver)
        signal.raise_signal(signal.SIGTERM)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "run_round", signalled)
        with pytest.raises(Stopped):
            federate(config, folder_of(tmp_path / "other"))
    federate(config.model_copy(update={"engine": "flower"}), folder_of(tmp_path / "other"))
    one, other = outcome(tmp_path / "one"), outcome(tmp_path / "other")
    engines = [found["results"].pop("engine") for found in (one, other)]
    assert engines == ["in_process", "flower"]
    assert one == other


def test_clients_of_flower_that_break_down_are_logged_and_the_rounds_complete(
    bases, rows, tmp_path
):
    pytest.importorskip("flwr")
    from samara.federated.flower import FlowerDriver

    data = Path(shutil.copytree(rows, tmp_path / "rows"))
    config = settings(bases["samara"], data, engine="flower", clients__number=2, server__rounds=1)
    job = Job(config, folder_of(tmp_path / "run"))
    driver = FlowerDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    (data / "train.jsonl").unlink()
    driver.run()
    record = RunFolder(tmp_path / "run").metrics()[-1]
    assert [c["verdict"] for c in record["clients"]] == ["error"] * 2
    assert all("train.jsonl" in c["reason"] for c in record["clients"])
    assert set(record["senders"].values()) == {0}
