"""Every parameter count of the OpenELM and CoLA tables, on real modules of the meta device."""

from __future__ import annotations

import pytest
import torch

from samara.model.config import ColaConfig, LayerwiseScaling, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM


def build(design: ModelConfig) -> SamaraForCausalLM:
    with torch.device("meta"):
        return SamaraForCausalLM(SamaraConfig.from_design(design))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# arXiv 2404.14619: layers, hidden, head_dim, then totals at 32000 and 32128 rows, non-embedding,
# first and last layer, RMSNorm modules, KV-cache elements per token.
OPENELM = {
    "270m": (16, 1280, 64, 271_527_168, 271_691_008, 230_567_168, 5_409_408, 23_759_488, 65, 8_064),
    "450m": (
        (20, 1536, 64, 457_179_136, 457_375_744, 408_027_136, 6_491_264, 34_212_992, 81, 11_648)
    ),
    "1.1b": (
        (28, 2048, 64, 1_079_891_456, 1_080_153_600, 1_014_355_456)
        + (11_538_560, 60_821_632, 113, 21_632)
    ),
    "3b": (
        (36, 3072, 128, 3_036_647_424, 3_037_040_640, 2_938_343_424)
        + (25_958_656, 136_845_568, 145, 41_984)
    ),
}


@pytest.mark.parametrize("row", OPENELM.values(), ids=OPENELM)
def test_openelm_sizes(row: tuple[int, ...]) -> None:
    layers, hidden, head_dim, at_32000, at_32128, body, first, last, norms, cache = row
    design = ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=head_dim,
        gqa_group_size=4,
        layerwise_scaling=LayerwiseScaling(),
        vocab_size=32000,
    )
    model = build(design)
    assert count(model) == at_32000
    assert count(model) - count(model.model.embed_tokens) == body
    assert count(model.model.layers[0]) == first
    assert count(model.model.layers[-1]) == last
    assert sum(type(module).__name__ == "RMSNorm" for module in model.modules()) == norms
    assert 2 * head_dim * sum(model.config.num_kv_heads) == cache
    assert count(build(design.model_copy(update={"vocab_size": 32128}))) == at_32128


# arXiv 2502.10940: hidden, FFN, layers, heads, rank, activation, dense and CoLA in millions.
COLA = {
    "60m": (512, 1376, 8, 8, 128, "both", 58.07, 42.77),
    "130m": (768, 2048, 12, 12, 256, "both", 134.11, 94.00),
    "350m": (1024, 2736, 24, 16, 256, "low_rank_only", 367.97, 185.22),
    "1b": (2048, 5461, 24, 32, 512, "low_rank_only", 1339.08, 609.31),
    "1b-aligned": (2048, 5472, 24, 32, 512, "low_rank_only", 1340.70, 609.72),
    "7b": (4096, 11008, 32, 32, 1024, "low_rank_only", 6738.42, 2820.94),
}


@pytest.mark.parametrize("row", COLA.values(), ids=COLA)
def test_cola_sizes(row: tuple[int, int, int, int, int, str, float, float]) -> None:
    hidden, ffn, layers, heads, rank, activation, dense_millions, cola_millions = row
    design = ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=hidden // heads,
        ffn_dim=ffn,
        qk_norm=False,
        tie_word_embeddings=False,
        vocab_size=32000,
    )
    dense = count(build(design))
    cola = ColaConfig.model_validate({"rank": rank, "activation": activation})
    low_rank = count(build(design.model_copy(update={"cola": cola})))
    rest = layers * 2 * hidden + hidden + 2 * 32000 * hidden
    assert dense == layers * (4 * hidden**2 + 3 * hidden * ffn) + rest
    assert low_rank == layers * (8 * hidden * rank + 3 * rank * (hidden + ffn)) + rest
    assert round(dense / 1e6, 2) == dense_millions
    assert round(low_rank / 1e6, 2) == cola_millions
