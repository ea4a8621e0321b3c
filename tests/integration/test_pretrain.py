from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samara.config import validate
from samara.data.config import PrepareConfig
from samara.data.prepare import PreparedCorpus, prepare
from samara.data.tokens import PackedSequences
from samara.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    ResourceError,
    SamaraError,
)
from samara.measure.loss import evaluate_loss
from samara.model.loading import load_model, save_model
from samara.runs import Compute, RunFolder, hash_weights, read_json
from samara.train import pretrain as pretrain_module
from samara.train.config import PretrainConfig
from samara.train.pretrain import pretrain

Settings = Callable[..., dict[str, Any]]

CPU = torch.device("cpu")


def run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    result = RunFolder(folder)
    pretrain(validate(PretrainConfig, settings), result)
    return result


def summary(result: RunFolder) -> dict[str, Any]:
    data: dict[str, Any] = read_json(result.path / "summary.json")
    return data


def training_records(result: RunFolder) -> list[dict[str, Any]]:
    return [record for record in result.metrics() if "loss" in record]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, small_corpus: PreparedCorpus
) -> dict[str, Any]:
    """Nothing yet: filled by the first test that needs the finished run."""
    return {"folder": tmp_path_factory.mktemp("finished") / "run"}


@pytest.fixture
def finished_run(finished: dict[str, Any], pretrain_settings: Settings) -> RunFolder:
    """A run of the plain settings to its end, made once."""
    if "run" not in finished:
        finished["run"] = run(finished["folder"], pretrain_settings())
    result: RunFolder = finished["run"]
    return result


def test_metrics_have_the_agreed_fields(finished_run: RunFolder) -> None:
    training = training_records(finished_run)
    validation = [r for r in finished_run.metrics() if "validation_loss" in r]

    assert [r["step"] for r in training] == [3, 6, 9, 12]
    assert [r["step"] for r in validation] == [6, 12]
    assert set(training[0]) == {
        *("step", "tokens", "flops", "loss", "lr", "grad_norm"),
        *("tokens_per_second", "mfu", "memory_bytes", "seconds"),
    }
    assert set(validation[0]) == {"step", "tokens", "flops", "validation_loss"}
    assert training[-1]["tokens"] == 12 * 8 * 32
    assert training[-1]["loss"] < training[0]["loss"]
    assert 0 < training[-1]["mfu"] < 1


def test_summary_has_the_agreed_fields(
    finished_run: RunFolder, small_corpus: PreparedCorpus
) -> None:
    found = summary(finished_run)
    last = training_records(finished_run)[-1]

    assert found["schema"] == 1
    assert found["steps"] == 12
    assert found["tokens"] == last["tokens"] == 3072
    assert found["flops"] == last["flops"] == 3072 * found["flops_per_token"]
    assert found["train_loss"] == last["loss"]
    assert found["validation_loss"] == found["validation_loss_last"]
    assert found["validation_loss_averaged"] is None
    assert found["tokens_per_second"] == pytest.approx(3072 / found["seconds"])
    assert found["energy_kwh"] == pytest.approx(20 * found["seconds"] / 3.6e6)
    assert found["cost"] == pytest.approx(0.3 * found["energy_kwh"])
    assert found["currency"] == "USD"
    assert found["device"] == "cpu"
    assert found["device_profile"] == "cpu-2core"
    assert found["corpus_hash"] == small_corpus.hash
    assert found["weights_hash"] == hash_weights(finished_run.path / "model")
    assert found["design"]["num_query_heads"] == [2, 2]
    assert found["design"]["vocab_size"] == 300
    assert found["embedding_parameters"] == 300 * 32
    assert found["peak_memory_bytes"] >= 0
    model = load_model(finished_run.path / "model")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_model_folder_holds_the_trained_weights(
    finished_run: RunFolder, small_corpus: PreparedCorpus
) -> None:
    model = load_model(finished_run.path / "model")
    validation = PackedSequences(small_corpus.tokens("validation"), sequence_length=32)

    result = evaluate_loss(model, validation, batch_size=3, device=CPU, precision="float32")

    assert result.loss == pytest.approx(summary(finished_run)["validation_loss"], rel=1e-5)
    assert result.loss < math.log(300)


def test_model_folder_opens_with_transformers(finished_run: RunFolder) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import samara  # noqa: F401 - registers the architecture

    folder = finished_run.path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Return the", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)

    assert output.shape[1] == inputs["input_ids"].shape[1] + 4
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_lineage_names_the_data_and_the_compute(
    finished_run: RunFolder, small_corpus: PreparedCorpus
) -> None:
    lineage, found = finished_run.lineage(), summary(finished_run)

    assert lineage.parents == {"data": small_corpus.hash}
    assert lineage.spent.tokens == found["tokens"]
    assert lineage.spent.flops == found["flops"]
    assert lineage.spent.joules == pytest.approx(20 * found["seconds"])
    assert lineage.inherited == Compute()


def test_the_same_recipe_gives_the_same_weights(
    finished_run: RunFolder, pretrain_settings: Settings, tmp_path: Path
) -> None:
    again = run(tmp_path / "again", pretrain_settings())
    other = run(tmp_path / "other", pretrain_settings(seed=1))

    assert summary(again)["weights_hash"] == summary(finished_run)["weights_hash"]
    assert summary(other)["weights_hash"] != summary(finished_run)["weights_hash"]


def test_a_finished_run_is_finished_again_without_training(
    pretrain_settings: Settings, tmp_path: Path
) -> None:
    settings = pretrain_settings(checkpoint__average_last=2)
    first = run(tmp_path / "run", settings)
    before = summary(first), first.metrics()
    second = run(tmp_path / "run", settings)

    assert (summary(second), second.metrics()) == before


def test_settings_left_out_do_less(pretrain_settings: Settings, tmp_path: Path) -> None:
    settings = pretrain_settings(
        checkpoint=None,
        training__evaluate_every_steps=None,
        training__micro_batch_size=None,
        training__clip_grad_norm=None,
    )
    result = run(tmp_path / "run", settings)

    assert [r["step"] for r in result.metrics() if "validation_loss" in r] == [12]
    assert [p.name for p in (result.path / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"kind": "muon", "lr": 0.02}},
        {"schedule": {"kind": "wsd", "warmup_steps": 2, "shape": "sqrt"}},
        {"training__precision": "bfloat16"},
        {"training__activation_checkpointing": "layer"},
        {"training__z_loss": 1e-4},
        {"model__cola": {"rank": 8}, "training__activation_checkpointing": "cola_m"},
        {
            "model__ffn_dim": None,
            "model__ffn_dim_divisor": 16,
            "model__layerwise_scaling": {"alpha": [0.5, 1.0], "beta": [0.5, 2.0]},
        },
        {"data__document_boundaries": False, "data__num_workers": 1},
    ],
    ids=["muon", "wsd", "bfloat16", "layer", "z_loss", "cola_m", "layerwise", "workers"],
)
def test_each_setting_trains(
    pretrain_settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    result = run(tmp_path / "run", pretrain_settings(**changes))

    losses = [record["loss"] for record in training_records(result)]
    assert losses[-1] < losses[0] < 1.2 * math.log(300)


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_sinks_follow_the_run(
    pretrain_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written: list[dict[str, Any]] = []
    closed: list[bool] = []

    class Collector:
        def __init__(self, run: RunFolder, *, start_step: int) -> None:
            assert start_step == 0

        def write(self, record: dict[str, Any]) -> None:
            written.append(record)

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(
        "samara.train.sinks.TensorBoard" if name == "tensorboard" else "samara.train.sinks.Trackio",
        Collector,
    )

    result = run(tmp_path / "run", pretrain_settings(logging__sinks=[name]))

    assert json.loads(json.dumps(written)) == result.metrics()
    assert closed == [True]


# --- averaging --------------------------------------------------------------------------------


def test_the_final_model_is_the_mean_of_the_last_checkpoints(
    pretrain_settings: Settings, tmp_path: Path, small_corpus: PreparedCorpus
) -> None:
    result = run(
        tmp_path / "run", pretrain_settings(checkpoint__average_last=3, checkpoint__keep_last=1)
    )
    members = [
        load_file(result.path / "averages" / f"step-{step:08d}" / "model.safetensors")
        for step in (4, 8, 12)
    ]
    final = load_file(result.path / "model" / "model.safetensors")
    last = load_file(result.path / "checkpoints" / "step-00000012" / "model.safetensors")

    for name, weight in final.items():
        mean = torch.stack([member[name].double() for member in members]).sum(0) / 3
        torch.testing.assert_close(weight, mean.float(), rtol=0, atol=1e-7)
        assert torch.equal(last[name], members[-1][name])
    found = summary(result)
    assert found["averaged_steps"] == [4, 8, 12]
    assert found["validation_loss"] == found["validation_loss_averaged"]
    assert found["validation_loss_last"] != found["validation_loss_averaged"]
    validation = [r for r in result.metrics() if "validation_loss" in r]
    assert found["validation_loss_last"] == validation[-1]["validation_loss"]


# --- going on from another model --------------------------------------------------------------


def without_model(settings: dict[str, Any], init_from: Path) -> dict[str, Any]:
    del settings["model"]
    return {**settings, "init_from": str(init_from)}


@pytest.mark.parametrize("inside", ["", "model"])
def test_init_from_goes_on_and_inherits(
    finished_run: RunFolder,
    pretrain_settings: Settings,
    small_corpus: PreparedCorpus,
    tmp_path: Path,
    inside: str,
) -> None:
    settings = pretrain_settings(seed=5, optimizer__lr=1e-4)

    result = run(tmp_path / "run", without_model(settings, finished_run.path / inside))

    parent = summary(finished_run)
    assert result.lineage().parents == {
        "data": small_corpus.hash,
        "init_from": parent["weights_hash"],
    }
    assert result.lineage().inherited == finished_run.lineage().total
    assert result.lineage().total.tokens == 2 * parent["tokens"]
    first = training_records(result)[0]["loss"]
    assert first < training_records(finished_run)[0]["loss"] - 0.5
    assert summary(result)["validation_loss"] < parent["validation_loss"]


def test_init_from_another_tokenizer_is_refused(
    finished_run: RunFolder,
    pretrain_settings: Settings,
    small_corpus: PreparedCorpus,
    tmp_path: Path,
) -> None:
    text = next(small_corpus.folder.parent.glob("*.jsonl"))
    config = {
        "source": {"kind": "files", "paths": [str(text)]},
        "cleaning": {"english_only": False, "near_duplicate_threshold": None},
        "split": {"validation_fraction": 0.2},
        "tokenizer": {"kind": "train", "vocab_size": 280},
    }
    corpus = prepare(validate(PrepareConfig, config), tmp_path / "other")
    settings = pretrain_settings(data__corpus=str(corpus.folder))

    with pytest.raises(ConfigError, match=r"init_from: the tokenizer of .*kind: load, path: "):
        run(tmp_path / "run", without_model(settings, finished_run.path))


def test_init_from_too_short_a_context_is_refused(
    finished_run: RunFolder, pretrain_settings: Settings, tmp_path: Path
) -> None:
    settings = pretrain_settings(data__sequence_length=65, model__max_position_embeddings=128)

    with pytest.raises(ConfigError, match=r"data.sequence_length: 65 exceeds the 64 positions"):
        run(tmp_path / "run", without_model(settings, finished_run.path))


def test_init_from_nothing_is_refused(pretrain_settings: Settings, tmp_path: Path) -> None:
    settings = without_model(pretrain_settings(), tmp_path / "none")

    with pytest.raises(CheckpointError, match=r"none/config.json: no such file"):
        run(tmp_path / "run", settings)


def test_init_from_another_library_is_refused(pretrain_settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(CheckpointError, match=r"init_from: .*llama holds no Samara model"):
        run(tmp_path / "run", without_model(pretrain_settings(), folder))


# --- what goes wrong --------------------------------------------------------------------------


def test_vocabulary_smaller_than_the_tokenizer_is_refused(
    pretrain_settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"model.vocab_size: 290 is less than the tokenizer's 300"
    ):
        run(tmp_path / "run", pretrain_settings(model__vocab_size=290))


def test_too_much_memory_is_refused_before_step_one(
    pretrain_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samara.train.memory.available_memory", lambda _: 1000)

    with pytest.raises(ResourceError, match=r"training needs about .* lower training.micro_batch"):
        run(tmp_path / "run", pretrain_settings())

    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_memory_that_runs_out_is_said(
    pretrain_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("samara.train.objective.CausalLM.__call__", run_out)

    with pytest.raises(ResourceError, match=r"step 1: cpu ran out of memory; .*batch_size \(4\)"):
        run(tmp_path / "run", pretrain_settings())


def test_checkpoint_of_another_corpus_is_refused(
    pretrain_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path / "run", pretrain_settings())
    open_corpus = pretrain_module.open_corpus

    def other_corpus(*arguments: Any, **keywords: Any) -> PreparedCorpus:
        corpus = open_corpus(*arguments, **keywords)
        corpus.hash = "another"
        return corpus

    monkeypatch.setattr(pretrain_module, "open_corpus", other_corpus)
    with pytest.raises(CheckpointError, match=r"belongs to a run of something else \(corpus"):
        run(result.path, pretrain_settings())


def test_checkpoint_of_another_architecture_is_refused(
    pretrain_settings: Settings, tmp_path: Path
) -> None:
    result = run(tmp_path / "run", pretrain_settings())
    before = hash_weights(result.path / "model")

    with pytest.raises(CheckpointError, match="is of another architecture"):
        run(result.path, pretrain_settings(model__ffn_dim=64))

    assert hash_weights(result.path / "model") == before


def test_poisoned_weight_stops_and_leaves_the_checkpoint(
    finished_run: RunFolder, pretrain_settings: Settings, tmp_path: Path
) -> None:
    model = load_model(finished_run.path / "model")
    poisoned = tmp_path / "poisoned"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    save_model(model, poisoned)
    for file in (finished_run.path / "model").glob("tokenizer*"):
        (poisoned / file.name).write_bytes(file.read_bytes())

    with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is nan .*no checkpoint was"):
        run(tmp_path / "run", without_model(pretrain_settings(), poisoned))

    records = RunFolder(tmp_path / "run").metrics()
    assert [(r["step"], r["loss"]) for r in records] == [(1, None)]
    assert not (tmp_path / "run" / "model").exists()


def test_loss_that_bursts_leaves_the_last_checkpoint(
    pretrain_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = pretrain_module.learning_rate
    monkeypatch.setattr(
        pretrain_module,
        "learning_rate",
        lambda *args, step, **kwargs: 1e30 if step == 8 else rates(*args, step=step, **kwargs),
    )

    with pytest.raises(NonFiniteLossError, match=r"step 10: .*checkpoints/step-00000008"):
        run(tmp_path / "run", pretrain_settings())

    monkeypatch.undo()
    resumed = run(tmp_path / "run", pretrain_settings())
    straight = run(tmp_path / "straight", pretrain_settings())
    assert summary(resumed)["weights_hash"] == summary(straight)["weights_hash"]


def test_damaged_checkpoint_falls_back_and_still_ends_the_same(
    finished_run: RunFolder,
    pretrain_settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    result = run(tmp_path / "run", pretrain_settings())
    file = result.path / "checkpoints" / "step-00000012" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))

    with caplog.at_level(logging.WARNING):
        again = run(result.path, pretrain_settings())

    assert "was altered" in caplog.text
    assert summary(again)["weights_hash"] == summary(finished_run)["weights_hash"]


def test_every_error_is_one_line(pretrain_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SamaraError) as caught:
        run(tmp_path / "run", pretrain_settings(data__corpus=str(tmp_path / "missing")))

    assert "\n" not in str(caught.value)
    assert "missing" in str(caught.value)


def test_a_device_profile_without_the_precision_is_refused(
    pretrain_settings: Settings, tmp_path: Path
) -> None:
    profile = tmp_path / "box.yaml"
    profile.write_text(
        "name: box\npeak_flops: {bfloat16: 1e10}\nmemory_bytes: 1000\nwatts: 5\nsource: assumed\n"
    )
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "small", pretrain_settings(logging__device_profile=str(profile)))
    assert str(caught.value) == (
        "device profile 'box': has no peak_flops for float32, in which small is trained; add it, "
        "or train in bfloat16"
    )
