"""Attaching, compiling, refusing: what holds for any model is tested on one."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AlbertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from samara.data.rows import Batch
from samara.errors import ConfigError
from samara.measure.budget import budget
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing
from samara.train.checkpoint import TrainingState, named_weights
from samara.train.config import AdamW, Muon
from samara.train.layer_dropout import Gates, LayerCosts, LayerDropout, dropping_layers
from samara.train.layer_rates import LayerDropoutConfig
from samara.train.loop import Costs, Hooks, train
from samara.train.objective import CausalLM
from samara.train.optim import Optimizer
from samara.train.parallel import compile_model, uncompiled

MakeModel = Callable[..., SamaraForCausalLM]
MakeBatches = Callable[..., list[list[Batch]]]

HALF = LayerDropoutConfig(rate=0.5)
COSTS = LayerCosts(
    rest=Costs(flops_per_token=1, useful_flops_per_token=1, peak_flops=1e9),
    layers=tuple(
        Costs(flops_per_token=10.0**n, useful_flops_per_token=10.0**n / 2) for n in range(1, 5)
    ),
)


@pytest.fixture
def deep(make_model: MakeModel) -> MakeModel:
    """A function that makes a model of four layers."""
    return lambda **fields: make_model(num_hidden_layers=4, **fields)


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            **fields,
        )
    )


def trained(
    model: PreTrainedModel,
    steps: list[list[Batch]],
    config: LayerDropoutConfig | None,
    *,
    optimizer: AdamW | Muon | None = None,
    records: list[dict[str, Any]] | None = None,
    precision: Any = "float32",
) -> tuple[dict[str, Tensor], TrainingState]:
    """Weights and state after training through the loop."""
    state = TrainingState()
    with dropping_layers(model, config, seed=0, costs=COSTS) as around_pass:
        train(
            model,
            objective=CausalLM(),
            optimizer=Optimizer(model, optimizer or AdamW(lr=0.01)),
            learning_rate=lambda _: 0.01,
            batches=steps,
            state=state,
            num_steps=len(steps),
            precision=precision,
            clip_grad_norm=1.0,
            costs=Costs(flops_per_token=11111.0, useful_flops_per_token=5556.0, peak_flops=1e9),
            hooks=Hooks(around_pass=around_pass, log=None if records is None else records.append),
        )
    return {n: t.detach().clone() for n, t in named_weights(model).items()}, state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- in the loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.01), Muon(lr=0.01)])
def test_rate_zero_trains_as_without_it(
    deep: MakeModel, make_batches: MakeBatches, optimizer: AdamW | Muon
) -> None:
    steps = make_batches(3, micro_batches=2)
    plain, state = trained(deep(), steps, None, optimizer=optimizer)
    gated, other = trained(deep(), steps, LayerDropoutConfig(rate=0.0), optimizer=optimizer)

    assert same(plain, gated)
    assert other.flops == state.flops == 3 * 2 * 4 * 12 * 11111
    assert other.useful_flops == state.useful_flops


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.01, weight_decay=0.5), Muon(lr=0.01)])
def test_a_step_leaves_layers_without_gradient_alone(
    deep: MakeModel, make_batches: MakeBatches, optimizer: AdamW | Muon
) -> None:
    model = deep()
    before = {n: t.detach().clone() for n, t in named_weights(model).items()}
    with LayerDropout(model, HALF, seed=0) as dropout:
        gates = dropout.gates(round=0, batch=0)
    after, _ = trained(model, make_batches(1), HALF, optimizer=optimizer)

    assert sum(gates) == 2
    for name, weight in after.items():
        layer = name.removeprefix("model.layers.").partition(".")[0]
        moved = not torch.equal(weight, before[name])
        assert moved == (gates[int(layer)] if layer.isdigit() else True), name


def test_flops_are_those_of_the_layers_that_ran(deep: MakeModel, make_batches: MakeBatches) -> None:
    records: list[dict[str, Any]] = []
    model, steps = deep(), make_batches(5, micro_batches=2)
    with LayerDropout(model, HALF, seed=0) as dropout:
        gates = [dropout.gates(round=step, batch=n) for step in range(5) for n in range(2)]
    _, state = trained(model, steps, HALF, records=records)
    per_token = [1 + sum(10 ** (layer + 1) for layer in range(4) if one[layer]) for one in gates]

    assert state.flops == 4 * 12 * sum(per_token)
    assert state.useful_flops == 4 * 12 * sum((cost - 1) / 2 + 1 for cost in per_token)
    assert [r["flops"] for r in records] == [
        4 * 12 * sum(per_token[: 2 * step]) for step in range(1, 6)
    ]
    assert records[-1]["mfu"] * 1e9 * (records[-1]["seconds"] - records[-2]["seconds"]) == (
        pytest.approx(4 * 12 * sum((cost - 1) / 2 + 1 for cost in per_token[-2:]))
    )


def test_the_budget_counts_what_torch_counts(deep: MakeModel, make_batches: MakeBatches) -> None:
    model = deep(ffn_dim=[24, 32, 40, 48])
    (batch,) = make_batches(1)[0]
    costs = budget(model.config.to_design())
    layer_costs = LayerCosts.of(costs, sequence_length=12, masked=False, peak_flops=None)
    with LayerDropout(model, HALF, seed=0) as dropout:
        model.train()
        for number in range(4):
            with (
                dropout.hold(batch=number) as gates,
                sdpa_kernel(SDPBackend.MATH),
                FlopCounterMode(display=False) as counter,
                torch.no_grad(),
            ):
                model(input_ids=batch["input_ids"], use_cache=False)
            forward = layer_costs(gates).flops_per_token / 3
            assert counter.get_total_flops() == forward * batch["input_ids"].numel()
    everything = costs.flops_per_token(12)
    assert layer_costs((1, 1, 1, 1)).flops_per_token == everything.training
    causal = costs.flops_per_token(12, "causal").training
    assert layer_costs((1, 1, 1, 1)).useful_flops_per_token == causal
    full = LayerCosts.of(costs, sequence_length=12, masked=True, peak_flops=None)
    assert full((1, 1, 1, 1)).useful_flops_per_token == everything.training


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "rank"), [("layer", None), ("cola_m", 4)])
def test_samaras_checkpointing_changes_no_bit(
    deep: MakeModel, make_batches: MakeBatches, mode: Any, rank: int | None, precision: str
) -> None:
    steps = make_batches(3, micro_batches=2)
    plain, saving = deep(rank=rank), deep(rank=rank)
    set_activation_checkpointing(saving, mode)
    config = LayerDropoutConfig(rate=0.5, scale="inverse_keep")
    expected, _ = trained(plain, steps, config, precision=precision)
    found, _ = trained(saving, steps, config, precision=precision)

    assert same(found, expected)


def test_training_lowers_the_loss_of_the_whole_model(
    deep: MakeModel, make_batches: MakeBatches
) -> None:
    model, steps = deep(), make_batches(1) * 60
    (batch,) = steps[0]
    with torch.no_grad():
        before = float(CausalLM()(model.eval(), batch).loss)
    trained(model, steps, HALF)
    with torch.no_grad():
        after = float(CausalLM()(model.eval(), batch).loss)

    assert after < 0.7 * before


# --- compiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled_first", [True, False])
def test_gates_add_no_graph(
    deep: MakeModel, make_batches: MakeBatches, compiled_first: bool
) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    plain, model = deep(), deep()
    (batch,) = make_batches(1)[0]
    config = LayerDropoutConfig(rate=0.5, scale="inverse_keep")
    if compiled_first:
        compile_model(model, backend=backend)
    dropout = LayerDropout(model, config, seed=0)
    if not compiled_first:
        compile_model(model, backend=backend)
    reference = LayerDropout(plain, config, seed=0)
    seen: set[Gates] = set()
    for number in range(8):
        with dropout.hold(batch=number) as gates, reference.hold(batch=number):
            seen.add(gates)
            expected, found = CausalLM()(plain.train(), batch), CausalLM()(model.train(), batch)
        found.loss.backward()
        torch.testing.assert_close(found.loss, expected.loss)

    assert len(seen) > 3
    assert len(graphs) <= 2
    calls = len(graphs)
    dropout.detach()
    with uncompiled(model), torch.no_grad():
        CausalLM()(model.eval(), batch)
    assert len(graphs) == calls


# --- attached and detached ----------------------------------------------------------------------


def test_it_leaves_no_trace(make_batches: MakeBatches) -> None:
    model = llama()
    classes, attributes = (
        [type(m) for m in model.modules()],
        [set(m.__dict__) for m in model.modules()],
    )
    modes = [m.training for m in model.modules()]
    model.model.layers[1].mlp.eval()
    random = torch.get_rng_state()

    with LayerDropout(model, HALF, seed=0) as dropout, dropout.hold(batch=0):
        assert [type(m) for m in model.modules()] != classes
    dropout.detach()

    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.model.layers[1].mlp.training
    model.model.layers[1].mlp.train()
    assert [m.training for m in model.modules()] == [True] * len(modes)


def test_gates_end_with_their_pass(deep: MakeModel, make_batches: MakeBatches) -> None:
    model = deep().train()
    (batch,) = make_batches(1)[0]
    expected = CausalLM()(model, batch).loss
    dropout = LayerDropout(model, HALF, seed=0)
    with contextlib.suppress(ZeroDivisionError), dropout.hold(batch=0):
        assert not torch.equal(CausalLM()(model, batch).loss, expected)
        raise ZeroDivisionError

    assert torch.equal(CausalLM()(model, batch).loss, expected)


def test_a_pickle_is_a_plain_model(deep: MakeModel) -> None:
    model = deep()
    LayerDropout(model, HALF, seed=0)
    again = pickle.loads(pickle.dumps(model))

    assert [type(m).__mro__ for m in again.modules()] == [type(m).__mro__ for m in deep().modules()]
    assert same(named_weights(again), named_weights(model))


def test_a_forward_of_ones_own_comes_back(deep: MakeModel, make_batches: MakeBatches) -> None:
    """Other tools replace a layer's forward too."""
    model = deep().train()
    (batch,) = make_batches(1)[0]
    calls = []
    for number, layer in enumerate(model.model.layers):
        own = layer.forward

        def forward(*args: Any, own: Any = own, number: int = number) -> Any:
            calls.append(number)
            return own(*args)

        layer.forward = forward
    with LayerDropout(model, HALF, seed=0) as dropout:
        calls.clear()
        for turn in range(3):
            with dropout.hold(batch=turn) as gates:
                CausalLM()(model, batch)
            assert calls == [number for number, runs in enumerate(gates) if runs]
            calls.clear()


def test_without_settings_there_is_no_hook(deep: MakeModel) -> None:
    model = deep()
    with dropping_layers(model, None, seed=0, costs=COSTS) as around_pass:
        assert around_pass is None
        assert type(model.model.layers[0]).__mro__[1] is nn.Module


def test_a_node_draws_gates_of_its_own(deep: MakeModel) -> None:
    model = deep()
    drawn = []
    for node in (0, 1):
        with LayerDropout(model, HALF, seed=0, node=node) as dropout:
            drawn.append([dropout.gates(round=2, batch=batch) for batch in range(20)])

    assert drawn[0] != drawn[1]


# --- refused ------------------------------------------------------------------------------------


def test_a_cache_is_refused_while_gates_are_held(deep: MakeModel) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    message = "use_cache: a model that drops layers cannot fill a cache; call it with use_cache="
    for model in (llama(), deep()):
        model.train()
        with LayerDropout(model, HALF, seed=0) as dropout:
            with dropout.hold(batch=0), pytest.raises(ConfigError, match=message):
                model(input_ids=ids, use_cache=True)
            model(input_ids=ids, use_cache=True)
            with dropout.hold(batch=0):
                model.eval()
                text = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)
                slow = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(text, slow)


def test_attaching_twice_is_refused(deep: MakeModel) -> None:
    model = deep()
    dropout = LayerDropout(model, HALF, seed=0)
    with pytest.raises(ConfigError, match="is attached to this model already; detach it first"):
        LayerDropout(model, HALF, seed=0)
    dropout.detach()
    LayerDropout(model, HALF, seed=0).detach()


def test_a_model_that_drops_layers_itself_is_refused() -> None:
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
            word_embed_proj_dim=16,
            layerdrop=0.1,
        )
    )
    with pytest.raises(ConfigError, match=r"drops layers itself \(layerdrop 0.1\); set layerdrop"):
        LayerDropout(model, HALF, seed=0)


def test_opt_350m_is_post_norm() -> None:
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        )
    )
    LayerDropout(model, HALF, seed=0).detach()
    with pytest.raises(ConfigError, match="those of opt normalise it"):
        LayerDropout(model, LayerDropoutConfig(rate=0.5, scale="inverse_keep"), seed=0)


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "layer_dropout: Linear holds no model of transformers"),
        (
            lambda: T5Model(
                T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=2, num_heads=2)
            ),
            "layer_dropout: T5Model has an encoder and a decoder, and one stack of layers is",
        ),
        (
            lambda: ViTModel(ViTConfig(**TINY, image_size=16, patch_size=8)),
            "layer_dropout: ViTModel takes pixel_values, and a model of text is needed",
        ),
        (
            lambda: AlbertModel(AlbertConfig(vocab_size=61, embedding_size=8, **TINY)),
            "layer_dropout: AlbertModel should have one list of its 2 layers; found: none",
        ),
    ],
)
def test_models_without_one_stack_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerDropout(make(), HALF, seed=0)


class Twice(nn.Module):
    """Runs a layer twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.layer(*args, **kwargs)
        return self.layer(*args, **kwargs)


class Wider(nn.Module):
    """Doubles the sequence."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return torch.cat([hidden_states, hidden_states], dim=1)


def test_layers_that_cannot_be_left_out_are_refused() -> None:
    model = llama()
    layer = model.model.layers[0]
    model.model.layers[1] = layer
    with pytest.raises(ConfigError, match="does not call each of its layers once, from the first"):
        LayerDropout(model, HALF, seed=0)
    model.model.layers[1] = Wider()
    with pytest.raises(ConfigError, match="has layers that do not turn hidden states into others"):
        LayerDropout(model, HALF, seed=0)
    assert not layer._forward_hooks
    assert model.training


def test_a_pass_without_a_gradient_is_refused() -> None:
    model = llama().requires_grad_(False)
    model.model.layers[2].requires_grad_()
    with pytest.raises(
        ConfigError,
        match=r"nothing is trained in layers 0, 1, 3 and outside of the layers, so a pass through",
    ):
        LayerDropout(model, HALF, seed=0)
    LayerDropout(model, LayerDropoutConfig(rate=0.25, protect_last=2), seed=0).detach()
    model.lm_head.requires_grad_()
    LayerDropout(model, HALF, seed=0).detach()
