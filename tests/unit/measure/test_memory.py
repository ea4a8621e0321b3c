"""The memory estimate against the live bytes of a real training step, tensor by tensor."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samara.measure.budget import ActiveLayers, budget
from samara.measure.memory import training_memory
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing
from samara.train.layer_dropout import LayerDropout
from samara.train.layer_rates import LayerDropoutConfig

DENSE = {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 1024}
GROUPED = {**DENSE, "gqa_group_size": 2, "ffn_dim": 320}
LLAMA = {**DENSE, "qk_norm": False, "tie_word_embeddings": False}
COLA = {**LLAMA, "cola": {"rank": 32, "activation": "both"}}
LOW_RANK_ONLY = {**GROUPED, "cola": {"rank": 32}}
LAYER_WISE = {**DENSE, "gqa_group_size": 2, "layerwise_scaling": {}, "ffn_dim_divisor": 32}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage):
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return

        def gone(_):
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def live_peak(design, *, rows, length, precision, mode, micro_batches=1, z_loss=0.0):
    """Peak of two optimizer steps."""
    with LiveBytes() as live:
        torch.manual_seed(0)
        model = SamaraForCausalLM(SamaraConfig.from_design(design))
        set_activation_checkpointing(model, mode)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(0, design.vocab_size, (rows, length))
        positions = torch.arange(length).remainder(50).expand(rows, length).contiguous()
        for _ in range(2):
            for _ in range(micro_batches):
                context = contextlib.nullcontext()
                if precision == "bfloat16":
                    context = torch.autocast("cpu", dtype=torch.bfloat16)
                with context:
                    hidden = model.model(
                        input_ids=ids, position_ids=positions, use_cache=False
                    ).last_hidden_state
                    sums = linear_cross_entropy(hidden, model.lm_head.weight, ids, z_loss=z_loss)
                    del hidden
                loss = sums.loss_sum
                del sums
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


@pytest.mark.parametrize(
    ("fields", "rows", "length", "precision", "mode"),
    [
        (GROUPED, 4, 128, "float32", "none"),
        (GROUPED, 4, 128, "bfloat16", "none"),
        (LLAMA, 4, 128, "float32", "none"),
        (LLAMA, 1, 600, "bfloat16", "none"),
        (LLAMA, 4, 128, "float32", "layer"),
        (COLA, 4, 128, "float32", "none"),
        (COLA, 4, 128, "bfloat16", "none"),
        (COLA, 4, 128, "float32", "cola_m"),
        (LOW_RANK_ONLY, 4, 128, "bfloat16", "cola_m"),
        (LAYER_WISE, 4, 128, "float32", "none"),
        (LAYER_WISE, 1, 64, "float32", "none"),  # weights dominate
    ],
)
def test_the_estimate_is_the_peak_of_a_real_step(fields, rows, length, precision, mode):
    design = ModelConfig.model_validate(fields)
    options = {"precision": precision}
    measured = live_peak(design, rows=rows, length=length, mode=mode, **options)
    predicted = training_memory(
        design,
        micro_batch_size=rows,
        sequence_length=length,
        optimizer="adamw",
        activation_checkpointing=mode,
        **options,
    )
    assert predicted.total - predicted.kernels == pytest.approx(measured, rel=0.05)


def test_accumulation_takes_more_and_z_loss_nothing():
    design = ModelConfig.model_validate(GROUPED)
    shape = {"micro_batch_size": 4, "sequence_length": 128, "precision": "float32"}
    kinds = {"optimizer": "adamw", "activation_checkpointing": "none"}
    measured = live_peak(
        design,
        rows=4,
        length=128,
        precision="float32",
        mode="none",
        micro_batches=2,
        z_loss=1e-4,
    )
    predicted = training_memory(design, **shape, **kinds, accumulates=True)
    assert predicted.total == pytest.approx(measured, rel=0.05)
    assert predicted.total > training_memory(design, **shape, **kinds).total


def estimate(fields, **changes):
    options = {
        "micro_batch_size": 8,
        "sequence_length": 256,
        "precision": "bfloat16",
        "optimizer": "adamw",
        "activation_checkpointing": "none",
    }
    return training_memory(ModelConfig.model_validate(fields), **{**options, **changes})


def test_weights_gradients_and_moments_are_float32():
    parameters = budget(ModelConfig.model_validate(LLAMA)).parameters
    memory = estimate(LLAMA)
    assert memory.weights == memory.gradients == 4 * parameters.total
    assert memory.optimizer == 8 * parameters.total
    muon = estimate(LLAMA, optimizer="muon").optimizer
    assert muon == 8 * parameters.total - 4 * (parameters.attention + parameters.ffn)


def test_kernels_take_room_by_distinct_products_on_cpu_and_by_thread_on_cuda():
    assert estimate(LLAMA, precision="float32").kernels == 0
    # q, k, v, o share a shape; gate and up, down, and the head have theirs. Six of attention.
    assert estimate(LLAMA).kernels == 560_000 * (3 * 4 + 6)
    assert estimate({**LLAMA, "num_hidden_layers": 9}).kernels == estimate(LLAMA).kernels
    # d to r, r to d, r to f, f to r, and the head
    assert estimate(COLA).kernels == 560_000 * (3 * 5 + 6)
    assert estimate(COLA, sequence_length=600).kernels == 560_000 * 3 * 5  # a fused attention
    assert estimate(LAYER_WISE).kernels > 2 * estimate(LLAMA).kernels
    deep = {**LAYER_WISE, "num_hidden_layers": 400, "head_dim": 2, "ffn_dim_divisor": 1}
    assert estimate(deep).kernels == 560_000 * 1024
    for precision in ("float32", "bfloat16"):
        assert estimate(COLA, device="cuda", precision=precision).kernels == 2 * 32 * 2**20


def test_what_saves_memory_saves_memory():
    full = estimate(COLA)
    cola_m = estimate(COLA, activation_checkpointing="cola_m")
    layer = estimate(COLA, activation_checkpointing="layer")
    assert layer.activations < cola_m.activations < full.activations
    assert full.activations < estimate(COLA, precision="float32").activations
    assert full.total < estimate(COLA, micro_batch_size=16).total


def test_cola_m_keeps_two_streams_and_seven_pre_activations():
    """CoLA: 2d + 7r per token and layer; here the streams are float32, the rest bfloat16."""
    deep = {**COLA, "num_hidden_layers": 5}
    tokens, d, r = 8 * 256, 128, 32
    step = estimate(deep, activation_checkpointing="cola_m").activations
    step -= estimate(COLA, activation_checkpointing="cola_m").activations
    assert step == tokens * (2 * d * 4 + 7 * r * 2)


def test_the_peak_lies_between_the_parts_and_their_sum():
    memory = estimate(LLAMA)
    floor = memory.weights + memory.optimizer + memory.gradients
    assert floor <= memory.total
    assert memory.total <= floor + 1.5 * memory.activations + memory.kernels


def test_the_largest_design_is_quick_and_allocates_nothing():
    memory = estimate(
        {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128, "vocab_size": 32000}
    )
    assert memory.total > 80e9


def live_peak_with_dropped_layers(design, *, rows, length, mode, config, micro_batches):
    """The largest peak of some passes; every moment of the optimizer is there from the start."""
    with LiveBytes() as live:
        torch.manual_seed(0)
        model = SamaraForCausalLM(SamaraConfig.from_design(design)).train()
        set_activation_checkpointing(model, mode)
        dropout = LayerDropout(model, config, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            parameter.grad = None
        ids = torch.randint(0, design.vocab_size, (rows, length))
        positions = torch.arange(length).remainder(50).expand(rows, length).contiguous()
        for step in range(5):
            for batch in range(micro_batches):
                with dropout.hold(round=step, batch=batch):
                    hidden = model.model(input_ids=ids, position_ids=positions).last_hidden_state
                    loss = linear_cross_entropy(hidden, model.lm_head.weight, ids).loss_sum
                    del hidden
                    loss.backward()
                    del loss
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


@pytest.mark.parametrize(
    ("fields", "rows", "length", "mode", "micro_batches", "protected"),
    [
        (GROUPED, 4, 128, "none", 1, 0),
        (GROUPED, 4, 128, "none", 2, 0),
        (LLAMA, 4, 128, "layer", 1, 0),
        (COLA, 4, 128, "cola_m", 1, 0),
        (LAYER_WISE, 4, 128, "none", 1, 0),
        (LAYER_WISE, 4, 128, "none", 1, 1),
        (LAYER_WISE, 1, 64, "none", 1, 0),  # weights dominate
    ],
)
def test_a_budget_of_layers_is_a_promise_of_memory(
    fields, rows, length, mode, micro_batches, protected
):
    design = ModelConfig.model_validate({**fields, "num_hidden_layers": 6})
    config = LayerDropoutConfig(rate=0.5, shape="uniform", protect_first=protected)
    rates = config.rates(6)
    measured = live_peak_with_dropped_layers(
        design, rows=rows, length=length, mode=mode, config=config, micro_batches=micro_batches
    )
    shape = {
        "micro_batch_size": rows,
        "sequence_length": length,
        "precision": "float32",
        "optimizer": "adamw",
        "activation_checkpointing": mode,
        "accumulates": micro_batches > 1,
    }
    predicted = training_memory(
        design, **shape, active_layers=ActiveLayers(count=rates.budget, always=rates.always)
    ).total
    everything = training_memory(design, **shape).total

    # Of earlier micro-batches the gradients of all layers are counted, whichever ran in them.
    assert 0.95 * measured <= predicted <= (1.05 if micro_batches == 1 else 1.08) * measured
    assert predicted < everything


def test_the_worst_pass_holds_the_largest_layers():
    active = ActiveLayers(count=3, always=frozenset({0}))

    assert active.largest([1, 5, 2, 9, 4]) == {0, 1, 3}
    assert ActiveLayers(count=2).largest([3, 3, 3]) == {0, 1}
    design = ModelConfig.model_validate({**GROUPED, "num_hidden_layers": 4})
    shape = {"micro_batch_size": 4, "sequence_length": 128, "precision": "float32"}
    kinds = {"optimizer": "adamw", "activation_checkpointing": "none"}
    plain = training_memory(design, **shape, **kinds)
    kept = [
        training_memory(design, **shape, **kinds, active_layers=ActiveLayers(count=k)).activations
        for k in range(1, 5)
    ]
    assert kept[-1] == plain.activations
    assert kept[3] - kept[2] == kept[2] - kept[1] == kept[1] - kept[0] > 0
