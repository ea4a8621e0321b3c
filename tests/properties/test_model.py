"""Whatever the design: it saves and loads, caches, packs, and checkpoints without a difference."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.model.config import PROJECTIONS
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing

VOCAB = 13
checked = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def configs(draw: st.DrawFn) -> SamaraConfig:
    """Any mix: dense, low-rank or both; uniform or not; MHA, GQA, MQA; tied or not."""
    num_layers = draw(st.integers(1, 3))
    kv_heads = draw(st.lists(st.integers(1, 3), min_size=num_layers, max_size=num_layers))
    groups = draw(st.lists(st.integers(1, 3), min_size=num_layers, max_size=num_layers))
    rank = st.integers(0, 5)
    per_projection = st.dictionaries(st.sampled_from(PROJECTIONS), rank)
    ranks: Any = draw(
        st.none() | st.lists(rank | per_projection, min_size=num_layers, max_size=num_layers)
    )
    return SamaraConfig(
        vocab_size=VOCAB,
        hidden_size=draw(st.sampled_from([8, 12, 20])),
        num_hidden_layers=num_layers,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        num_query_heads=[kv * group for kv, group in zip(kv_heads, groups, strict=True)],
        num_kv_heads=kv_heads,
        ffn_dims=draw(st.lists(st.integers(1, 9), min_size=num_layers, max_size=num_layers)),
        ranks=ranks,
        cola_activation=draw(st.sampled_from(["low_rank_only", "both"])),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        initializer=draw(st.sampled_from(["openelm", "normal"])),
    )


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def build(config: SamaraConfig) -> SamaraForCausalLM:
    torch.manual_seed(0)
    return SamaraForCausalLM(config).double().eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@checked
@given(configs())
def test_saves_and_loads_bit_for_bit(config: SamaraConfig) -> None:
    model = build(config)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        loaded = load_model(Path(folder))
    assert loaded.config.to_design() == config.to_design()
    saved, state = model.state_dict(), loaded.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    torch.testing.assert_close(loaded(tokens(5)).logits, model(tokens(5)).logits)


@checked
@given(configs(), lengths)
def test_cached_equals_uncached(config: SamaraConfig, chunks: list[int]) -> None:
    model, ids = build(config), tokens(sum(chunks))
    cache, outputs = None, []
    for part in ids.split(chunks, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(ids).logits, rtol=1e-9, atol=1e-9)


@checked
@given(configs(), lengths)
def test_packed_equals_separate(config: SamaraConfig, documents: list[int]) -> None:
    model, ids = build(config), tokens(sum(documents))
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    separate = [model(part).logits for part in ids.split(documents, dim=1)]
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=1e-9, atol=1e-9)


@checked
@given(configs(), st.booleans())
def test_checkpointing_is_bit_equal(config: SamaraConfig, autocast: bool) -> None:
    modes = ("none", "layer", "cola_m") if config.has_low_rank else ("none", "layer")
    results = []
    for mode in modes:
        model = build(config).float()
        set_activation_checkpointing(model, mode)
        ids = tokens(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(ids[:, :-1], position_ids=torch.arange(6)[None] % 4)
            result = linear_cross_entropy(
                hidden.last_hidden_state, model.lm_head.weight, ids[:, 1:], z_loss=0.1
            )
        result.loss_sum.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([result.nll_sum.detach(), *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
