"""The search for the best design: its law, its limits, its families, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from samara.errors import ConfigError
from samara.measure import fit as fit_module
from samara.measure.budget import budget
from samara.measure.design import DesignInput, design_data
from samara.measure.devices import device_profile
from samara.measure.fit import Limits, families, fit, parse_limits, predicted_loss
from samara.measure.fit_table import fit_data, fit_text
from samara.model.config import LayerwiseScaling, ModelConfig

UNIFORM = ModelConfig(
    hidden_size=128, num_hidden_layers=4, head_dim=32, gqa_group_size=2, ffn_dim=384, vocab_size=500
)
LAYERWISE = ModelConfig(
    hidden_size=128,
    num_hidden_layers=4,
    head_dim=32,
    vocab_size=500,
    ffn_dim_divisor=32,
    layerwise_scaling=LayerwiseScaling(beta=(1.0, 4.0)),
)
COLA = ModelConfig.model_validate({**UNIFORM.model_dump(), "cola": {"rank": 32}})
FAMILIES = {
    "uniform, dense": UNIFORM,
    "layer-wise, dense": LAYERWISE,
    "uniform, CoLA": COLA,
}
LIMITS = {
    "params": (1e6, 3e6, 9e6),
    "flops": (1e12, 1e13, 1e14),
    "memory": (3e7, 6e7, 2e8),
    "hours": (0.001, 0.02, 0.3),
}


def recipe_input(model: ModelConfig, **changes) -> DesignInput:
    base = DesignInput(
        name="small",
        model=model.expand(),
        sequence_length=64,
        batch_size=32,
        micro_batch_size=8,
        tokens=10_000_000,
        device_profile="cpu-2core",
    )
    return replace(base, **changes)


def test_the_law_is_the_published_one():
    # Chinchilla itself: 70 B parameters, 1.4 T tokens (arXiv 2404.10102, equation 3).
    by_hand = 1.8172 + 482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658
    assert predicted_loss(parameters=70e9, tokens=1.4e12) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(1.973, abs=1e-3)


def test_a_flops_budget_is_spent_about_as_chinchilla_would():
    # About 20 tokens per parameter is the paper's own reading of its law.
    found = fit(
        recipe_input(UNIFORM.model_copy(update={"vocab_size": 32_000}), batch_size=512),
        UNIFORM.model_copy(update={"vocab_size": 32_000}),
        Limits(flops=6e18),
    )
    assert 12 < found.best.input.tokens / found.best.parameters < 35


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("limit", LIMITS)
def test_no_limit_is_exceeded_and_more_is_never_worse(name, limit):
    losses: dict[str, list[float]] = {}
    for amount in LIMITS[limit]:
        found = fit(recipe_input(FAMILIES[name]), FAMILIES[name], Limits(**{limit: amount}))
        assert found.best.family.name == name
        for one in found.candidates:
            data = design_data([one.input])
            spent = {
                "params": data["parameters"],
                "flops": data["training"]["flops"],
                "memory": data["memory"]["total"],
                "hours": data["estimate"]["seconds"] / 3600,
            }
            assert spent[limit] <= amount
            losses.setdefault(one.family.name, []).append(one.loss)
    for found_losses in losses.values():
        assert found_losses == sorted(found_losses, reverse=True)
    assert losses[name][0] > losses[name][-1]


def test_limits_combine():
    limits = Limits(params=2e6, memory=6e7, flops=2e13, hours=0.05)
    one = fit(recipe_input(LAYERWISE), LAYERWISE, limits).best
    data = design_data([one.input])
    assert data["parameters"] <= 2e6
    assert data["memory"]["total"] <= 6e7
    assert data["training"]["flops"] <= 2e13
    assert data["estimate"]["seconds"] <= 0.05 * 3600


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "limits", [Limits(flops=3e12), Limits(params=8e5), Limits(hours=0.01, memory=4e7)], ids=str
)
def test_what_the_search_leaves_out_could_not_win(name, limits, monkeypatch):
    monkeypatch.setattr(fit_module, "LARGEST_HIDDEN_SIZE", 512)
    model, base = FAMILIES[name], recipe_input(FAMILIES[name])
    search = fit_module._Search(
        base=base,
        model=model,
        limits=limits,
        profile=device_profile("cpu-2core"),
        utilization=0.4,
    )
    for family in families(model):
        every = [
            search.in_memory(one)
            for width, depths in search.shapes(family)
            for depth in depths
            if (one := search.candidate(family, width, depth)) is not None
        ]
        best = min((one for one in every if one is not None), key=lambda one: one.loss)
        assert search.best(family) == best


def test_the_same_question_has_the_same_answer():
    first, again = (fit(recipe_input(COLA), COLA, Limits(hours=0.1)) for _ in range(2))
    assert first == again


def test_without_flops_or_hours_the_recipe_says_how_many_tokens():
    one = fit(recipe_input(UNIFORM), UNIFORM, Limits(params=3e6)).best
    assert one.input.tokens == 10_000_000 // (32 * 64) * 32 * 64
    assert 0.8 * 3e6 < budget(one.input.model).parameters.total <= 3e6


def test_a_short_run_gets_smaller_batches():
    long = fit(recipe_input(UNIFORM), UNIFORM, Limits(flops=1e15)).best.input
    short = fit(recipe_input(UNIFORM), UNIFORM, Limits(flops=1e12)).best.input
    assert long.batch_size == 32
    assert short.batch_size < 32
    assert short.batch_size % short.micro_batch_size == 0


def test_less_memory_takes_smaller_micro_batches_before_smaller_models():
    # Memory is kept by fewer rows at a time: they change no result.
    found = fit(recipe_input(UNIFORM), UNIFORM, Limits(params=1e6, memory=3e7)).best
    assert found.input.micro_batch_size < 8
    assert found.shape == fit(recipe_input(UNIFORM), UNIFORM, Limits(params=1e6)).best.shape


def test_hours_also_keep_within_the_device(tmp_path):
    profile = tmp_path / "tiny.yaml"
    profile.write_text(
        "name: tiny\npeak_flops: {float32: 1e12, bfloat16: 1e15}\nmemory_bytes: 50000000\n"
        "watts: 10\nsource: made up\n"
    )
    found = fit(recipe_input(UNIFORM), UNIFORM, Limits(hours=1), device=str(profile))
    data = design_data([found.best.input])
    assert data["estimate"]["device_profile"] == "tiny"
    assert data["memory"]["total"] <= 50_000_000


def test_families_keep_the_recipes_ratios_and_take_the_published_ones():
    own, *others = families(COLA)
    assert own.name == "uniform, CoLA"
    assert own.rank == 32 / 128
    assert {one.name for one in others} == {
        "uniform, dense",
        "layer-wise, dense",
        "layer-wise, CoLA",
    }
    assert {one.beta for one in others if one.layerwise} == {(0.5, 4.0)}
    assert families(UNIFORM)[0].beta == (3.0, 3.0)
    grouped = UNIFORM.model_copy(update={"num_kv_heads": 1})
    assert {one.gqa_group_size for one in families(grouped)} == {4}


def test_the_recipes_own_shape_is_among_those_tried():
    (own, *_) = families(LAYERWISE)
    shape = own.shape(LAYERWISE, 128, 4)
    fixed = LAYERWISE.model_dump(exclude=set(shape))
    assert ModelConfig.model_validate({**fixed, **shape}).expand() == LAYERWISE.expand()


def test_a_dense_family_beside_cola_m_checkpoints_layers():
    found = fit(recipe_input(COLA, activation_checkpointing="cola_m"), COLA, Limits(params=2e6))
    modes = {c.family.name: c.input.activation_checkpointing for c in found.candidates}
    assert modes["uniform, CoLA"] == "cola_m"
    assert modes["uniform, dense"] == "layer"


def test_text_and_data_say_which_rule_chose():
    found = fit(recipe_input(UNIFORM), UNIFORM, Limits(hours=0.1))
    data = json.loads(json.dumps(fit_data(found)))
    assert data["limits"] == {"hours": 0.1}
    assert data["candidates"][0]["family"] == "uniform, dense"
    assert data["extrapolated"] is True
    text = fit_text(found)
    for said in (
        "arXiv 2203.15556",
        "arXiv 2404.10102",
        "extrapolated",
        "Best design for hours 0.1",
    ):
        assert said in text
    assert "*   uniform, dense" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_limits_are_read_with_their_units():
    assert parse_limits(["params=30M", "flops=8e15"]) == Limits(params=30e6, flops=8e15)
    assert parse_limits(["memory=8GB,hours=1.5"]) == Limits(memory=8e9, hours=1.5)
    assert parse_limits(["memory=8 GiB"]) == Limits(memory=8 * 2**30)
    assert parse_limits(["params=1.1B"]) == Limits(params=1.1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30M", "--fit 30M: is written key=value, as params=30M"),
        ("parms=30M", "--fit parms=30M: unknown limit 'parms' (did you mean 'params'?)"),
        ("params=many", "--fit params=many: 'many' is no number; write params=30M"),
        ("params=-3M", "--fit params=-3M: '-3M' is no number; write params=30M"),
        ("params=30GB", "--fit params=30GB: unknown unit 'GB' (known: k, M, B)"),
        ("memory=8", "--fit memory=8: has no unit (known: kB, MB, GB, TB, KiB, MiB, GiB, TiB)"),
        ("hours=8h", "--fit hours=8h: unknown unit 'h'; give a plain number"),
        ("hours=0", "--fit hours=0: must be more than 0"),
        ("hours=8,hours=9", "--fit hours=9: hours is given twice; keep one"),
    ],
)
def test_a_wrong_limit_is_one_clear_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse_limits([text])
    assert str(error.value) == message


def test_limits_that_nothing_keeps_say_what_the_smallest_takes():
    with pytest.raises(ConfigError) as error:
        fit(recipe_input(UNIFORM), UNIFORM, Limits(params=1000))
    assert str(error.value).startswith(
        "--fit: no design of the recipe's family keeps within params 1 k; its smallest has "
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_query_heads": (4, 4, 4, 4)},
            "model.num_query_heads: lists its layers, so --fit cannot change their number; "
            "give one number, or layerwise_scaling",
        ),
        (
            {"cola": {"rank": [8, 8, 8, 8]}},
            "model.cola.rank: lists its layers, so --fit cannot change their number; "
            "give one number",
        ),
    ],
)
def test_lists_by_layer_cannot_be_grown(changes, message):
    model = ModelConfig.model_validate({**UNIFORM.model_dump(), **changes})
    with pytest.raises(ConfigError) as error:
        fit(recipe_input(model), model, Limits(params=1e6))
    assert str(error.value) == message
