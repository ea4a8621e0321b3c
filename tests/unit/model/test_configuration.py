"""SamaraConfig: round trips, numbers for generic tools, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from samara.errors import ConfigError
from samara.model.config import ColaConfig, LayerwiseScaling, ModelConfig, NormalInitializer
from samara.model.configuration import SamaraConfig

DESIGNS = [
    ModelConfig(hidden_size=128, num_hidden_layers=2, vocab_size=50),
    ModelConfig(
        hidden_size=512,
        num_hidden_layers=3,
        gqa_group_size=4,
        layerwise_scaling=LayerwiseScaling(),
        vocab_size=50,
        cola=ColaConfig(rank=(8, 0, {"q_proj": 4}), activation="both"),
        qk_norm=False,
        tie_word_embeddings=False,
        initializer=NormalInitializer(std=0.01),
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=77,
    ),
]


@pytest.mark.parametrize("design", DESIGNS)
def test_design_round_trip(design: ModelConfig, tmp_path: Path) -> None:
    config = SamaraConfig.from_design(design, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0)
    assert config.to_design() == design.expand()
    config.save_pretrained(tmp_path)
    for loaded in (SamaraConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, SamaraConfig)
        assert loaded.to_design() == design.expand()
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, [2, 3], 0)


def test_saved_file_spells_out_every_field(tmp_path: Path) -> None:
    SamaraConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "samara"
    assert saved["num_query_heads"] == [12] * 12
    assert saved["ffn_dims"] == [2048] * 12
    for field in ("vocab_size", "hidden_size", "qk_norm", "rope_theta", "initializer", "ranks"):
        assert field in saved


def test_numbers_for_generic_tools_are_the_largest() -> None:
    config = SamaraConfig(
        num_hidden_layers=2, num_query_heads=[2, 6], num_kv_heads=[1, 3], ffn_dims=[9, 7]
    )
    assert config.num_attention_heads == 6
    assert config.num_key_value_heads == 3
    assert config.intermediate_size == 9


def test_lists_follow_from_the_numbers() -> None:
    config = SamaraConfig(
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=10
    )
    assert config.num_query_heads == [6, 6]
    assert config.num_kv_heads == [2, 2]
    assert config.ffn_dims == [10, 10]


def test_layer_ranks() -> None:
    config = SamaraConfig(num_hidden_layers=3, ranks=[4, 0, {"up_proj": 2}])
    assert set(config.layer_ranks(0).values()) == {4}
    assert set(config.layer_ranks(1).values()) == {0}
    assert config.layer_ranks(2)["up_proj"] == 2
    assert config.layer_ranks(2)["q_proj"] == 0
    assert config.has_low_rank
    assert not SamaraConfig(num_hidden_layers=1).has_low_rank
    assert not SamaraConfig(num_hidden_layers=1, ranks=[0]).has_low_rank


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_query_heads": [12] * 11}, "config: num_query_heads lists 11 layers"),
        ({"num_kv_heads": [5] * 12}, "config: layer 0 has 12 query heads, not divisible into 5"),
        ({"ranks": [4]}, "config: cola.rank lists 1 layers, num_hidden_layers is 12"),
        ({"hidden_size": "wide"}, "config.hidden_size: "),
        ({"initializer": "xavier"}, "initializer: unknown value 'xavier' (known: normal, openelm)"),
        (
            {"num_query_heads": [12] * 12, "num_attention_heads": 6},
            "num_attention_heads: 6 disagrees with the largest of the per-layer list, 12",
        ),
        (
            {"ffn_dims": [12] * 12, "intermediate_size": 6},
            "intermediate_size: 6 disagrees with the largest of the per-layer list, 12",
        ),
    ],
)
def test_messages(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamaraConfig(**fields)
    assert message in str(error.value)


def test_from_design_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is required"):
        SamaraConfig.from_design(ModelConfig(hidden_size=128, num_hidden_layers=1))
