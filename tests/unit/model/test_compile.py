"""torch.compile takes the model whole: one graph, the same gradients. One small, slow test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing


@pytest.mark.parametrize("mode", ["none", "cola_m"])
def test_one_graph_with_the_same_gradients(mode: Any) -> None:
    """Traced and differentiated by dynamo and AOT autograd; no C++ compiler is needed for that."""
    torch.manual_seed(0)
    config = SamaraConfig(
        vocab_size=19,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        num_query_heads=[2, 4],
        num_kv_heads=[1, 2],
        ffn_dims=[16, 24],
        ranks=[8, 8],
    )
    model = SamaraForCausalLM(config)
    ids = torch.randint(0, 19, (2, 12))
    positions = torch.arange(12)[None] % 5
    probe = torch.randn(2, 12, 32)
    model.model(ids, position_ids=positions).last_hidden_state.backward(probe)
    expected = {name: p.grad for name, p in model.model.named_parameters()}
    model.zero_grad()
    set_activation_checkpointing(model, mode)
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    compiled(ids, position_ids=positions).last_hidden_state.backward(probe)
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
