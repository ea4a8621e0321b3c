"""The design verb's data and text, from the shipped recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samara.errors import ConfigError
from samara.measure.budget import ActiveLayers, budget
from samara.measure.design import DesignInput, _percent, design_data, design_text, duration
from samara.measure.memory import training_memory
from samara.model.config import ModelConfig
from samara.recipe import load_recipe
from samara.train.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
OPENELM = json.loads((Path(__file__).parent / "openelm_sizes.json").read_text())
SMALL = ModelConfig(hidden_size=64, num_hidden_layers=3, head_dim=16, vocab_size=100)


def recipe_input(name: str) -> DesignInput:
    (stage,) = load_recipe(ROOT / "recipes" / f"{name}.yaml").stages
    config = stage.config({})
    assert isinstance(config, PretrainConfig)
    assert config.model is not None
    training, length = config.training, config.data.sequence_length
    return DesignInput(
        name=name,
        model=config.model,
        sequence_length=length,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        tokens=training.num_steps(length) * training.batch_size * length,
        precision=training.precision,
        optimizer=config.optimizer.kind,
        activation_checkpointing=training.activation_checkpointing,
        device_profile="h100-sxm",
    )


def small_input(**changes) -> DesignInput:
    fields = {
        "name": "small",
        "model": SMALL,
        "sequence_length": 32,
        "batch_size": 8,
        "micro_batch_size": 4,
        "tokens": 10_000,
        "device_profile": "cpu-2core",
    }
    return DesignInput(**{**fields, **changes})


@pytest.mark.parametrize("size", OPENELM)
def test_one_design_has_its_figures_at_the_top(size):
    data = json.loads(json.dumps(design_data([recipe_input(f"openelm-{size}")])))
    published = OPENELM[size]
    assert data["parameters"] == published["total"]
    assert data["embedding_parameters"] == published["embedding"]
    assert data["non_embedding_parameters"] == published["non_embedding"]
    assert [layer["num_query_heads"] for layer in data["layers"]] == published["query_heads"]
    assert [layer["num_kv_heads"] for layer in data["layers"]] == published["kv_heads"]
    assert [layer["ffn_dim"] for layer in data["layers"]] == published["ffn_dims"]
    assert [layer["parameters"] for layer in data["layers"]] == published["layer_parameters"]
    assert [layer["rank"] for layer in data["layers"]] == [None] * len(data["layers"])
    assert data["training"]["tokens"] == 350_000 * 2048 * 2048


def test_flops_per_token_are_those_of_training():
    data = design_data([small_input()])
    flops = budget(SMALL).flops_per_token(32)
    assert data["flops_per_token"] == flops.training
    assert data["forward_flops_per_token"] == flops.forward
    assert data["backward_flops_per_token"] == flops.backward
    assert data["training"]["flops"] == 10_000 * flops.training
    head = budget(SMALL).head_flops.training
    assert sum(layer["flops_per_token"] for layer in data["layers"]) + head == flops.training


def test_several_designs_stand_side_by_side():
    data = design_data([recipe_input("llama-60m"), recipe_input("cola-60m")])
    names = [design["name"] for design in data["designs"]]
    assert names == ["llama-60m", "cola-60m"]
    assert {layer["rank"] for layer in data["designs"][1]["layers"]} == {128}


def test_memory_is_that_of_the_recipe():
    data = design_data([small_input(activation_checkpointing="layer")])
    memory = training_memory(
        SMALL,
        micro_batch_size=4,
        sequence_length=32,
        precision="bfloat16",
        optimizer="adamw",
        activation_checkpointing="layer",
        accumulates=True,
    )
    assert data["memory"]["total"] == memory.total
    assert data["memory"]["optimizer"] == 8 * data["parameters"]


def test_time_energy_and_money_by_hand():
    data = design_data([small_input(precision="float32")], utilization=0.5)
    estimate = data["estimate"]
    speed = 0.5 * 1.95e11 / budget(SMALL).flops_per_token(32, "causal").training
    assert estimate["tokens_per_second"] == pytest.approx(speed)
    assert estimate["seconds"] == pytest.approx(10_000 / speed)
    assert estimate["energy_kwh"] == pytest.approx(20 * 10_000 / speed / 3.6e6)
    assert estimate["cost"] == pytest.approx(estimate["energy_kwh"] * 0.30)
    assert estimate["assumed_utilization"] == 0.5
    assert estimate["source"].startswith("measured:")


def test_recomputation_takes_time():
    plain = design_data([small_input()])
    checkpointed = design_data([small_input(activation_checkpointing="layer")])
    assert checkpointed["flops_per_token"] == plain["flops_per_token"]
    assert checkpointed["recompute_flops_per_token"] > 0
    assert checkpointed["estimate"]["seconds"] > plain["estimate"]["seconds"]


def test_the_device_can_be_named():
    data = design_data([small_input()], device="h200-sxm")
    assert data["estimate"]["device_profile"] == "h200-sxm"
    with pytest.raises(ConfigError, match="did you mean 'h200-sxm'"):
        design_data([small_input()], device="h200-smx")


def test_the_text_shows_every_layer_and_says_what_is_assumed():
    text = design_text(design_data([recipe_input("openelm-270m")]))
    assert "271,527,168" in text
    assert "23,759,488" in text
    assert "one h100-sxm at 40% of its peak (assumed)" in text
    assert "data sheet" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_text_gathers_equal_layers_and_compares():
    text = design_text(design_data([recipe_input("llama-7b"), recipe_input("cola-7b")]))
    assert "0-31" in text
    assert "6,738,415,616" in text
    assert "2,820,935,680" in text
    assert "1024" in text


def test_ranks_by_projection_are_named():
    model = SMALL.model_validate(
        {**SMALL.model_dump(), "cola": {"rank": ({"q_proj": 8, "k_proj": 0}, 12, {"up_proj": 4})}}
    )
    text = design_text(design_data([small_input(model=model)]))
    assert "q 8" in text
    assert "up 4" in text


def row_of(label: str, *inputs: DesignInput) -> str:
    text = design_text(design_data(list(inputs)))
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line


def test_later_designs_carry_their_difference_from_the_first():
    inputs = [small_input(), small_input(name="twice", tokens=20_000), small_input()]
    line = row_of("token budget", *inputs)
    assert line.split() == ["token", "budget", "10", "k", "20", "k", "(+100%)", "10", "k", "(±0%)"]
    assert "%" not in row_of("recomputed", *inputs)  # of nothing there is no percentage
    assert "%" not in row_of("token budget", small_input())


def test_money_of_two_currencies_is_not_compared(tmp_path):
    profile = tmp_path / "box.yaml"
    profile.write_text(
        "name: box\npeak_flops: {float32: 1e12, bfloat16: 2e12}\nmemory_bytes: 16000000000\n"
        "watts: 100\nprice_per_hour: 1.0\ncurrency: EUR\nsource: measured\n"
    )
    inputs = small_input(), small_input(device_profile=str(profile))
    assert row_of("estimated cost", *inputs).endswith("EUR")
    assert row_of("estimated time", *inputs).endswith("%)")
    assert row_of("estimated cost", small_input(), small_input()).endswith("(±0%)")


@pytest.mark.parametrize(
    ("change", "text"),
    [(-0.38, "-38%"), (0.024, "+2.4%"), (0.0001, "±0%"), (9.5, "x10.5"), (0.996, "+100%")],
)
def test_differences_in_words(change, text):
    assert _percent(change) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (600, "10 min"), (28_800, "8 hours"), (259_200, "3 days"), (1.6e8, "1,852 days")],
)
def test_times_in_words(seconds, text):
    assert duration(seconds) == text


def test_dropped_layers_save_work_time_and_memory():
    plain = design_data([small_input()])
    gated = small_input(layer_keep=(1.0, 0.5, 0.5), active_layers=ActiveLayers(count=2))
    data = design_data([gated])
    layer = data["layers"][0]["flops_per_token"]

    assert data["flops_per_token"] == plain["flops_per_token"]
    assert data["training"]["flops"] == plain["training"]["flops"] - 10_000 * layer
    assert (plain["training"]["mean_active_layers"], data["training"]["mean_active_layers"]) == (
        3,
        2.0,
    )
    assert data["memory"]["total"] < plain["memory"]["total"]
    assert data["estimate"]["seconds"] < plain["estimate"]["seconds"]
    assert "layers in a pass of training" in design_text(design_data([small_input(), gated]))


def test_what_dropped_layers_would_have_recomputed_is_saved_too():
    plain, gated = (
        design_data([small_input(activation_checkpointing="layer", layer_keep=keep)])
        for keep in (None, (0.0, 0.0, 0.0))
    )
    head = budget(SMALL).head_flops.training
    work = plain["causal_flops_per_token"]
    recomputed = budget(SMALL).recompute_flops_per_token(32, "layer", "causal")

    assert gated["estimate"]["seconds"] / plain["estimate"]["seconds"] == pytest.approx(
        head / (work + recomputed)
    )
