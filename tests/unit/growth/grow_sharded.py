"""One of two processes that train a sharded model, grow it, and go on; run by test_sharded.py."""

from __future__ import annotations

import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from samara.growth import sharded
from samara.growth.grow_state import grow
from samara.growth.operator_config import OperatorConfig
from samara.growth.state import GrowthState
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

SMALL = ModelConfig(
    hidden_size=8, num_hidden_layers=2, head_dim=4, ffn_dim=10, cola={"rank": 3}, vocab_size=11
).expand()
LARGE = ModelConfig(
    hidden_size=16, num_hidden_layers=4, head_dim=4, ffn_dim=13, cola={"rank": 5}, vocab_size=11
).expand()
OPERATOR = OperatorConfig.model_validate({"depth": {"kind": "llama_pro"}})


def build(design: ModelConfig) -> tuple[SamaraForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = SamaraForCausalLM(SamaraConfig.from_design(design)).double()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)


def train(model: SamaraForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def main(rank: int, rendezvous: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    ids = torch.arange(12).view(2, 6)[rank : rank + 1] % 11
    small, small_optimizer = build(SMALL)
    for _ in range(2):
        train(small, small_optimizer, ids)
    full = sharded.gather(small, small_optimizer)
    grown = full
    if rank == 0:
        state = GrowthState(
            design=SMALL, weights=full.weights, optimizer=full.optimizer, betas=(0.9, 0.999)
        )
        larger = grow(state, target=LARGE, operator=OPERATOR, seed=0).state
        assert larger.optimizer is not None
        grown = sharded.FullState(weights=larger.weights, optimizer=larger.optimizer)
    large, large_optimizer = build(LARGE)
    sharded.scatter(grown, large, large_optimizer)
    assert large.lm_head.weight is large.model.embed_tokens.weight
    assert large_optimizer.param_groups[0]["lr"] == 3e-3
    back = sharded.gather(large, large_optimizer)
    if rank == 0:
        assert back.weights.keys() == grown.weights.keys()
        assert all(torch.equal(back.weights[name], w) for name, w in grown.weights.items())
        assert all(torch.equal(back.optimizer[key], m) for key, m in grown.optimizer.items())
        for key in back.optimizer.keys() - grown.optimizer.keys():
            assert not back.optimizer[key].any(), key
    else:
        assert not back.weights
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-10, atol=1e-10)
    before = large(ids, labels=ids).loss.item()
    for _ in range(3):
        train(large, large_optimizer, ids)
    assert large(ids, labels=ids).loss.item() < before
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
