"""Every way to decode gives the plain model's greedy tokens: caches, compilation, drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

VOCAB, NEW = 23, 24
DESIGNS: dict[str, dict[str, Any]] = {
    "layer-wise": {},
    "cola": {"ranks": [8, 12, 8], "cola_activation": "both"},
    "mixed": {"ranks": [0, {"q_proj": 6, "down_proj": 8}, 12]},
}


def make_model(design: str, *, seed: int = 0, **changes: Any) -> SamaraForCausalLM:
    """Key-value heads 1, 2, 4 in three layers; weights far enough from uniform scores."""
    torch.manual_seed(seed)
    config = SamaraConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_query_heads": [2, 4, 4],
            "num_kv_heads": [1, 2, 4],
            "ffn_dims": [16, 24, 40],
            "max_position_embeddings": 64,
            **DESIGNS[design],
            **changes,
        }
    )
    model = SamaraForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.7)
    return model


def rows() -> tuple[Tensor, Tensor]:
    """Three prompts of 3, 6 and 8 tokens, padded on the left."""
    ids = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :5] = mask[1, :2] = 0
    return ids, mask


def uncached(model: SamaraForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """The argmax of the whole text, anew for every token."""
    with torch.no_grad():
        for _ in range(NEW):
            following = model(ids, attention_mask=mask).logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, following), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return ids


def greedy(model: SamaraForCausalLM, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    result: Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return result


@pytest.mark.parametrize("design", DESIGNS)
def test_both_caches_give_the_uncached_tokens(design: str) -> None:
    model, (ids, mask) = make_model(design), rows()
    expected = uncached(model, ids, mask)
    assert torch.equal(greedy(model, ids, mask), expected)
    static = greedy(model, ids, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("design", DESIGNS)
def test_left_padding_changes_no_row(design: str) -> None:
    model, (ids, mask) = make_model(design), rows()
    batch = greedy(model, ids, mask)
    for row, kept in zip(ids, mask.bool(), strict=True):
        alone = greedy(model, row[kept][None], mask.new_ones(1, int(kept.sum())))
        index = int((ids == row).all(1).nonzero()[0])
        assert torch.equal(batch[index, 8:], alone[0, int(kept.sum()) :])


@pytest.mark.parametrize("design", DESIGNS)
def test_a_static_cache_holds_each_layer_s_own_heads(design: str) -> None:
    model, (ids, mask) = make_model(design), rows()
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [
        (3, heads, 20, 8) for heads in (1, 2, 4)
    ]


@pytest.mark.parametrize("design", DESIGNS)
def test_the_compiled_step_is_one_graph_with_the_same_tokens(design: str) -> None:
    """Traced by dynamo and AOT autograd; no C++ compiler is needed for that."""
    torch.compiler.reset()
    counters.clear()
    model, (ids, mask) = make_model(design), rows()
    config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    config._compile_all_devices = True
    compiled = greedy(model, ids, mask, cache_implementation="static", compile_config=config)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, uncached(model, ids, mask))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("num_tokens", [2, 6])
def test_prompt_lookup_gives_the_plain_tokens(design: str, num_tokens: int) -> None:
    model = make_model(design)
    ids = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4]])
    mask = torch.ones_like(ids)
    looked_up = greedy(model, ids, mask, prompt_lookup_num_tokens=num_tokens)
    assert torch.equal(looked_up, uncached(model, ids, mask))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("draft", ["another", "itself"])
def test_a_draft_model_gives_the_plain_tokens(design: str, draft: str) -> None:
    """One draft is nearly always wrong, one always right."""
    model = make_model(design)
    assistant = make_model(design)
    if draft == "another":
        assistant = make_model(
            "layer-wise",
            seed=9,
            num_hidden_layers=1,
            num_query_heads=[2],
            num_kv_heads=[2],
            ffn_dims=[16],
        )
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    mask = torch.ones_like(ids)
    drafted = greedy(model, ids, mask, assistant_model=assistant)
    num_calls = len(calls)
    assert torch.equal(drafted, uncached(model, ids, mask))
    if draft == "itself":
        assert num_calls < NEW / 2  # drafts were taken, several tokens at a time
