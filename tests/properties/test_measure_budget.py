"""The closed forms hold for any mix of widths, heads, ranks and tying."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samara.measure.budget import budget
from samara.model.config import PROJECTIONS, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

RANKS = st.one_of(
    st.integers(1, 24), st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(0, 24))
)


@st.composite
def designs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 3))
    kv_heads = [draw(st.integers(1, 3)) for _ in range(layers)]
    fields = {
        "hidden_size": draw(st.integers(8, 40)),
        "num_hidden_layers": layers,
        "head_dim": draw(st.sampled_from([2, 4, 8])),
        "num_kv_heads": kv_heads,
        "num_query_heads": [heads * draw(st.integers(1, 3)) for heads in kv_heads],
        "ffn_dim": [draw(st.integers(1, 60)) for _ in range(layers)],
        "vocab_size": draw(st.integers(2, 50)),
        "qk_norm": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        fields["cola"] = {"rank": [draw(RANKS) for _ in range(layers)]}
    return ModelConfig.model_validate(fields)


@settings(max_examples=25, deadline=None)
@given(design=designs(), length=st.integers(1, 20))
def test_parameters_and_flops_are_those_of_the_model(design, length):
    model = SamaraForCausalLM(SamaraConfig.from_design(design))
    ids = torch.zeros(2, length, dtype=torch.int64)
    result = budget(design)
    assert result.parameters.total == sum(p.numel() for p in model.parameters())
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        model(input_ids=ids, use_cache=False)
    assert 2 * length * result.flops_per_token(length).forward == counter.get_total_flops()


@settings(max_examples=25, deadline=None)
@given(design=designs(), length=st.integers(1, 200))
def test_figures_are_consistent(design, length):
    result = budget(design)
    parameters, flops = result.parameters, result.flops_per_token(length)
    assert parameters.total == parameters.embedding + parameters.non_embedding
    layers = sum(layer.parameters for layer in result.layers)
    assert parameters.non_embedding == layers + design.hidden_size
    assert result.flops_per_token(length, "causal").training <= flops.training
    assert result.recompute_flops_per_token(length, "layer") < flops.forward
    assert result.recompute_flops_per_token(length, "cola_m") <= result.recompute_flops_per_token(
        length, "layer"
    )
