"""Settings of verb ``grow`` and the stages they lead to."""

from __future__ import annotations

from typing import Any

import pytest

from samara.config import validate
from samara.errors import ConfigError
from samara.growth.config import GrowConfig
from samara.growth.stages import plan_stages
from samara.model.config import ModelConfig

MODEL = {"hidden_size": 32, "num_hidden_layers": 4, "head_dim": 16, "ffn_dim": 48}
STACK, TOP = {"depth": {"kind": "stack"}}, {"depth": {"kind": "random_top"}}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "source": "run",
        "model": MODEL,
        "candidates": [STACK, TOP],
        "race": {"kind": "paired", "cap": 0.5},
        "data": {"corpus": "corpus", "sequence_length": 32},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "training": {"max_steps": 1200, "batch_size": 8},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"race": None},
            "grow: race: is required to choose among 2 candidates and their proposals, as {kind: "
            "fixed, k: 500} or {kind: paired, cap: 0.25}",
        ),
        ({"race": {"kind": "paired"}}, "grow.race.cap: is required and not given"),
        ({"race": {"kind": "halving"}}, "grow.race.cap: is required and not given"),
        ({"race": {"kind": "pared", "cap": 1}}, "grow.race.kind: unknown value 'pared' (did you"),
        (
            {"candidates": [STACK, TOP, STACK]},
            "grow: candidates.2: is the same as candidates.0 (stack); remove one",
        ),
        ({"candidates": []}, "grow.candidates: "),
        (
            {"data": {"corpus": "c", "sequence_length": 4096}},
            "grow: data.sequence_length 4096 exceeds model.max_position_embeddings 2048",
        ),
        ({"metric": "los"}, "grow.metric: unknown value 'los' (did you mean 'loss'?)"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ConfigError) as caught:
        validate(GrowConfig, settings(**changes), path="grow")
    assert str(caught.value).startswith(message)


def test_one_candidate_needs_no_race():
    assert validate(GrowConfig, settings(candidates=[STACK], race=None)).race is None


def test_resolved_settings_resolve_to_themselves():
    config = validate(GrowConfig, settings(stages={"models": [{**MODEL, "num_hidden_layers": 3}]}))
    resolved = config.resolved()
    assert resolved.model.num_query_heads == (2, 2, 2, 2)
    assert resolved.targets[0].ffn_dim == (48, 48, 48)
    again = validate(GrowConfig, resolved.model_dump(mode="json"))
    assert again.resolved() == resolved


SOURCE = ModelConfig.model_validate({**MODEL, "num_hidden_layers": 2, "vocab_size": 300}).expand()


def test_stages_follow_each_other_with_prop_alpha_lengths():
    stages = {"models": [{**MODEL, "num_hidden_layers": 3}], "alpha": 2.0, "rewarmup_steps": 70}
    first, second = plan_stages(validate(GrowConfig, settings(stages=stages)), SOURCE)
    assert (first.first_step, first.last_step, second.last_step) == (0, 240, 1200)
    assert second.source == first.target
    assert (first.is_last, second.is_last) == (False, True)
    assert (first.rewarmup_steps, second.rewarmup_steps) == (0, 70)
    # Warm-up is 2 % of 1,200 steps; below it and 1 / (1 - .95), 50 is the least.
    assert (first.first_rung, second.first_rung) == (50, 70)
    assert first.target.vocab_size == 300


def test_a_candidate_that_fits_some_stages_is_left_out_of_the_others():
    middle = {"depth": {"kind": "middle"}}
    pool = [STACK, {**middle, "new_layers": "zero"}]
    stages = {"models": [{**MODEL, "num_hidden_layers": 3}]}
    first, second = plan_stages(
        validate(GrowConfig, settings(candidates=pool, stages=stages, model=MODEL)), SOURCE
    )
    assert set(first.candidates) == {"stack", "middle.zero"}
    assert set(second.candidates) == {"stack", "middle.zero"}
    wide = {**MODEL, "num_hidden_layers": 7}
    first, second = plan_stages(
        validate(GrowConfig, settings(candidates=pool, stages=stages, model=wide)), SOURCE
    )
    assert set(second.candidates) == {"stack"}
    assert "whole blocks" in second.left_out["middle.zero"]


def test_muon_and_adamw_give_the_memory_of_their_second_moments():
    adamw = settings(optimizer={"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.99]})
    assert plan_stages(validate(GrowConfig, adamw), SOURCE)[0].first_rung == 100
    muon = settings(optimizer={"kind": "muon", "lr": 1e-3, "adamw_betas": [0.9, 0.98]})
    assert plan_stages(validate(GrowConfig, muon), SOURCE)[0].first_rung == 50
