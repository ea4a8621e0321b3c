"""The published tables, from the shipped recipes: OpenELM's sizes and CoLA's, number by number.

``openelm_sizes.json`` holds OpenELM's (arXiv 2404.14619): heads, KV heads, FFN width and parameters
of each layer, and the totals at 32,000 (released) and 32,128 (trained) vocabulary rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from samara.measure.budget import budget
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.recipe import load_recipe
from samara.train.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
OPENELM = json.loads((Path(__file__).parent / "openelm_sizes.json").read_text())

# CoLA (arXiv 2502.10940), parameters in millions: dense, CoLA; then d, d_ff, layers, rank.
COLA = {
    "60m": ("58.07", "42.77", 512, 1376, 8, 128),
    "130m": ("134.11", "94.00", 768, 2048, 12, 256),
    "350m": ("367.97", "185.22", 1024, 2736, 24, 256),
    "1b": ("1339.08", "609.31", 2048, 5461, 24, 512),
    "7b": ("6738.42", "2820.94", 4096, 11008, 32, 1024),
}
KINDS = {"openelm": OPENELM, "llama": COLA, "cola": COLA}


def pretrain_config(name: str, *overrides: str) -> PretrainConfig:
    (stage,) = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides).stages
    config = stage.config({})
    assert isinstance(config, PretrainConfig)
    return config


def design(name: str, *overrides: str) -> ModelConfig:
    model = pretrain_config(name, *overrides).model
    assert model is not None
    return model


@pytest.mark.parametrize("size", OPENELM)
def test_openelm_widths_and_parameters_of_every_layer(size):
    published, layers = OPENELM[size], budget(design(f"openelm-{size}")).layers
    assert [layer.num_query_heads for layer in layers] == published["query_heads"]
    assert [layer.num_kv_heads for layer in layers] == published["kv_heads"]
    assert [layer.ffn_dim for layer in layers] == published["ffn_dims"]
    assert [layer.parameters for layer in layers] == published["layer_parameters"]
    assert all(layer.rank is None for layer in layers)


@pytest.mark.parametrize("size", OPENELM)
def test_openelm_totals(size):
    published, released = OPENELM[size], budget(design(f"openelm-{size}"))
    trained = budget(design(f"openelm-{size}", "model.vocab_size=32128"))
    assert released.parameters.total == published["total"]
    assert released.parameters.embedding == published["embedding"]
    assert released.parameters.non_embedding == published["non_embedding"]
    assert released.parameters.attention == published["attention"]
    assert released.parameters.ffn == published["ffn"]
    assert released.parameters.norms == published["norms"]
    assert trained.parameters.total == published["total_32128"]
    assert trained.parameters.embedding == published["embedding_32128"]


@pytest.mark.parametrize("size", OPENELM)
def test_openelm_kv_cache(size):
    elements = OPENELM[size]["kv_cache_elements"]
    result = budget(design(f"openelm-{size}"))
    assert sum(layer.kv_cache_elements for layer in result.layers) == elements
    assert result.kv_cache_bytes_per_token() == 2 * elements
    assert result.kv_cache_bytes_per_token(bytes_per_element=4) == 4 * elements


@pytest.mark.parametrize("size", COLA)
def test_cola_and_dense_parameters(size):
    dense_m, cola_m, d, ffn, layers, rank = COLA[size]
    dense = budget(design(f"llama-{size}")).parameters
    cola = budget(design(f"cola-{size}")).parameters
    vocabulary = 2 * 32000 * d
    assert dense.total == layers * (4 * d**2 + 3 * d * ffn + 2 * d) + d + vocabulary
    assert cola.total == layers * (8 * d * rank + 3 * rank * (d + ffn) + 2 * d) + d + vocabulary
    assert f"{dense.total / 1e6:.2f}" == dense_m
    assert f"{cola.total / 1e6:.2f}" == cola_m


@pytest.mark.parametrize("size", COLA)
def test_cola_flops_formulas(size):
    """Per layer and sequence, forward and backward: 24nd² + 12n²d + 18nd·f, 48ndr + …"""
    _, _, d, ffn, _, r = COLA[size]
    n = 256
    dense = budget(design(f"llama-{size}")).layers[0]
    cola = budget(design(f"cola-{size}")).layers[0]
    dense_flops = 24 * n * d**2 + 12 * n**2 * d + 18 * n * d * ffn
    cola_flops = 48 * n * d * r + 12 * n**2 * d + 18 * n * r * (d + ffn)
    assert n * dense.flops_per_token(n).training == dense_flops
    assert n * cola.flops_per_token(n).training == cola_flops


# The note's ceilings at n = 256, causal attention at half count: layer products, whole step.
CEILINGS = {"60m": (0.395, 0.642), "130m": (0.528, 0.641), "350m": (0.396, 0.465)}
CEILINGS |= {"1b": (0.396, 0.433), "7b": (0.395, 0.410)}


@pytest.mark.parametrize("size", CEILINGS)
def test_cola_share_of_the_dense_flops(size):
    dense, cola = budget(design(f"llama-{size}")), budget(design(f"cola-{size}"))
    layer, step = CEILINGS[size]
    weights = [b.layers[0].parameters - b.layers[0].norm_parameters for b in (cola, dense)]
    whole = [b.flops_per_token(256, "causal").training for b in (cola, dense)]
    assert weights[0] / weights[1] == pytest.approx(layer, abs=6e-4)
    assert whole[0] / whole[1] == pytest.approx(step, abs=1e-3)


def test_cola_m_recomputes_the_second_factors_and_attention():
    """2nr(3d + 2f) + 4n²d per layer; 1B at n = 256: 13.3 % of the whole step."""
    result = budget(design("cola-1b"))
    d, ffn, r, n = 2048, 5461, 512, 256
    again = result.layers[0].recompute_flops_per_token(n, "cola_m")
    assert again == 2 * r * (3 * d + 2 * ffn) + 4 * n * d
    causal_step = result.flops_per_token(n, "causal").training
    causal_again = 24 * (2 * r * (3 * d + 2 * ffn) + 2 * (n + 1) * d)
    assert causal_again / causal_step == pytest.approx(0.133, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "lr", "final", "checkpointing"),
    [
        ("270m", 5.3e-3, 5.3e-4, "none"),
        ("450m", 3.9e-3, 3.9e-4, "layer"),
        ("1_1b", 2.4e-3, 2.4e-4, "layer"),
        ("3b", 1.2e-3, 1.2e-4, "layer"),
    ],
)
def test_openelm_hyper_parameters(size, lr, final, checkpointing):
    config = pretrain_config(f"openelm-{size}")
    optimizer, schedule, training = config.optimizer, config.schedule, config.training
    assert optimizer.kind == "adamw"
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (lr, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.decay) == (0.1, "matrices")
    assert schedule.kind == "cosine"
    assert (schedule.warmup_steps, schedule.initial_lr) == (5000, 1e-6)
    assert schedule.final_fraction * lr == pytest.approx(final)
    assert (training.max_steps, training.batch_size) == (350_000, 2048)
    assert (training.clip_grad_norm, training.z_loss) == (1.0, 1e-4)
    assert training.activation_checkpointing == checkpointing
    assert config.data.sequence_length == 2048
    assert (config.checkpoint.every_steps, config.checkpoint.average_last) == (5000, 5)


@pytest.mark.parametrize(
    ("size", "lr", "dense_lr", "steps", "warmup", "micro", "activation"),
    [
        ("60m", 6e-3, 1e-3, 10_000, 2_000, 256, "both"),
        ("130m", 3e-3, 1e-3, 20_000, 2_000, 256, "both"),
        ("350m", 3e-3, 1e-3, 60_000, 6_000, 64, "low_rank_only"),
        ("1b", 2e-3, 5e-4, 100_000, 10_000, 32, "low_rank_only"),
        ("7b", 1e-3, 3e-4, 150_000, 15_000, 16, "low_rank_only"),
    ],
)
def test_cola_hyper_parameters(size, lr, dense_lr, steps, warmup, micro, activation):
    cola, dense = pretrain_config(f"cola-{size}"), pretrain_config(f"llama-{size}")
    assert (cola.optimizer.lr, dense.optimizer.lr) == (lr, dense_lr)
    for config in (cola, dense):
        optimizer, training = config.optimizer, config.training
        assert optimizer.kind == "adamw"
        assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.01)
        assert optimizer.decay == "all"
        assert (config.schedule.warmup_steps, config.schedule.final_fraction) == (warmup, 0.1)
        assert (training.max_steps, training.batch_size) == (steps, 512)
        assert (training.micro_batch_size, training.clip_grad_norm) == (micro, 0.5)
        assert (config.data.sequence_length, config.seed) == (256, 42)
        assert config.model is not None
        assert not config.model.tie_word_embeddings
        assert not config.model.qk_norm
        assert config.model.vocab_size == 32000
    assert cola.model is not None
    assert cola.model.cola is not None
    assert cola.model.cola.activation == activation
    assert dense.model == cola.model.model_copy(update={"cola": None})


RECIPES = [f"{k}-{s}" for k, sizes in KINDS.items() for s in sizes]


@pytest.mark.parametrize("name", RECIPES)
def test_the_real_model_has_these_parameters(name):
    """Every shipped size, on the meta device: nothing is allocated."""
    model_design = design(name)
    with torch.device("meta"):
        model = SamaraForCausalLM(SamaraConfig.from_design(model_design))
    assert sum(p.numel() for p in model.parameters()) == budget(model_design).parameters.total
