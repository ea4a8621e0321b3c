"""Layer dropout on every family of models: one table of models, one list of properties."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samara.errors import ConfigError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.layer_dropout import LayerCosts, LayerDropout
from samara.train.layer_rates import LayerDropoutConfig
from samara.train.layer_stack import find_layers

LAYERS, WIDTH, VOCAB, ROWS, LENGTH = 4, 16, 61, 2, 12
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
DEBERTA = {
    **ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 32,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": WIDTH,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
TASK = {"num_labels": 3}


def hugging_face(kind: str, head: str, fields: dict[str, Any]) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**fields)
    config.pad_token_id = 1
    model: nn.Module = getattr(transformers, f"{kind}{head}")(config)
    return model


def samara(**fields: Any) -> nn.Module:
    design = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "head_dim": 8, "ffn_dim": 24}
    config = ModelConfig.model_validate({**design, "vocab_size": VOCAB, **fields})
    return SamaraForCausalLM(SamaraConfig.from_design(config))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bert": (
        lambda: hugging_face("Bert", "ForSequenceClassification", {**ENCODER, **TASK}),
        ("query", "value"),
    ),
    "roberta": (
        lambda: hugging_face("Roberta", "ForSequenceClassification", {**ENCODER, **TASK}),
        ("query", "value"),
    ),
    "distilbert": (
        lambda: hugging_face("DistilBert", "ForSequenceClassification", {**DISTILBERT, **TASK}),
        ("q_lin", "v_lin"),
    ),
    "deberta-v2": (
        lambda: hugging_face("DebertaV2", "ForSequenceClassification", {**DEBERTA, **TASK}),
        ("query_proj", "value_proj"),
    ),
    "gpt2": (lambda: hugging_face("GPT2", "LMHeadModel", GPT2), ("c_attn",)),
    "opt": (lambda: hugging_face("OPT", "ForCausalLM", OPT), ("q_proj", "v_proj")),
    "llama": (lambda: hugging_face("Llama", "ForCausalLM", LLAMA), ("q_proj", "v_proj")),
    "qwen2": (lambda: hugging_face("Qwen2", "ForCausalLM", LLAMA), ("q_proj", "v_proj")),
    "samara": (samara, ("q_proj", "v_proj")),
    "samara layer-wise": (
        lambda: samara(ffn_dim=[16, 24, 32, 40], num_query_heads=[1, 2, 2, 3], num_kv_heads=1),
        ("q_proj", "v_proj"),
    ),
    "samara cola": (lambda: samara(cola={"rank": 4}), ()),
}
WITH_LORA = [name for name, (_, targets) in FAMILIES.items() if targets]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, *, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    build, targets = FAMILIES[family]
    model = build()
    if lora:
        classifies = "classifier" in dict(model.named_modules())
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=2,
                target_modules=list(targets),
                init_lora_weights=False,
                task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
            ),
        )
    return model.train()


def loss_of(model: nn.Module, **options: Any) -> Tensor:
    """The loss of a fixed batch without a cache."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
    classifies = "classifier" in {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if not classifies:
        options = {"use_cache": False, **options}
    labels = ids[:, 0] % 3 if classifies else ids
    loss: Tensor = model(input_ids=ids, labels=labels, **options).loss
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def layers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    return find_layers(model).layers


def count_calls(layers: tuple[nn.Module, ...]) -> list[int]:
    """The layers whose attention or FFN is called, as they are."""
    calls: list[int] = []
    for number, layer in enumerate(layers):
        part = next(iter(layer.children()))
        part.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def saved_bytes(model: nn.Module, dropout: LayerDropout, batch: int) -> int:
    """Bytes that forward leaves for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with dropout.hold(batch=batch), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(seen.values())


@EVERY_FAMILY
def test_at_rate_zero_training_is_the_plain_one_bit_for_bit(family: str) -> None:
    plain, gated = make(family), make(family)
    keys = list(gated.state_dict())

    with LayerDropout(gated, LayerDropoutConfig(rate=0.0), seed=0) as dropout:
        assert list(gated.state_dict()) == keys
        assert [type(m).__name__ for m in gated.modules()] == [
            type(m).__name__ for m in plain.modules()
        ]
        with dropout.hold(batch=0) as gates:
            loss = loss_of(gated)
            loss.backward()
    expected = loss_of(plain)
    expected.backward()

    assert all(gates)
    assert torch.equal(loss, expected)
    assert same(gradients(gated), gradients(plain))
    assert [type(m) for m in gated.modules()] == [type(m) for m in plain.modules()]


@EVERY_FAMILY
def test_layers_left_out_are_not_called_and_get_no_gradient(family: str) -> None:
    model = make(family)
    layers = layers_of(model)
    calls = count_calls(layers)
    dropout = LayerDropout(model, LayerDropoutConfig(rate=0.5), seed=0)
    seen = set()
    for batch in range(6):
        model.zero_grad(set_to_none=True)
        calls.clear()
        with dropout.hold(batch=batch) as gates:
            loss_of(model).backward()
        active = [number for number, runs in enumerate(gates) if runs]
        seen.add(gates)

        assert len(active) == 2
        assert sorted(set(calls)) == active
        for runs, layer in zip(gates, layers, strict=True):
            assert all((p.grad is not None) == runs for p in layer.parameters())
    assert len(seen) > 1


@EVERY_FAMILY
def test_a_layer_left_out_hands_its_input_on(family: str) -> None:
    """The loss is that of a model without those layers."""
    gated, shortened = make(family), make(family)
    dropout = LayerDropout(gated, LayerDropoutConfig(rate=0.5), seed=0)
    batch = next(b for b in range(50) if dropout.gates(batch=b) == (True, True, False, False))
    with dropout.hold(batch=batch):
        loss = loss_of(gated)
    (layers,) = (
        module
        for module in shortened.modules()
        if isinstance(module, nn.ModuleList) and len(module) == LAYERS
    )
    del layers[2:]
    shortened.config.num_hidden_layers = 2  # type: ignore[union-attr]

    assert torch.equal(loss, loss_of(shortened))


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        *((name, False) for name in FAMILIES if name != "samara cola"),  # an operator of its own
        *((name, True) for name in WITH_LORA if name != "samara layer-wise"),  # unequal layers
    ],
)
def test_measured_costs_are_what_each_pass_computes(family: str, lora: bool) -> None:
    model = make(family, lora=lora)

    def run_pass() -> int:
        loss_of(model).backward()
        model.zero_grad(set_to_none=True)
        return ROWS * LENGTH

    with sdpa_kernel(SDPBackend.MATH):
        costs = LayerCosts.measured(model, run_pass, peak_flops=1e9)
        with LayerDropout(model, LayerDropoutConfig(rate=0.5), seed=0) as dropout:
            for batch in range(8):
                with dropout.hold(batch=batch) as gates, FlopCounterMode(display=False) as counter:
                    run_pass()
                expected = counter.get_total_flops() / (ROWS * LENGTH)
                assert costs(gates).flops_per_token == pytest.approx(expected, rel=1e-12)
    assert costs(gates).peak_flops == 1e9
    assert not layers_of(model)[0]._forward_pre_hooks


@EVERY_FAMILY
def test_evaluation_calls_all_layers(family: str) -> None:
    plain, gated = make(family).eval(), make(family).eval()
    dropout = LayerDropout(gated, LayerDropoutConfig(rate=0.5), seed=0)

    with torch.no_grad(), dropout.hold(batch=0):
        assert torch.equal(loss_of(gated), loss_of(plain))
    gated.train()
    assert torch.equal(loss_of(gated), loss_of(plain.train()))  # no pass holds gates


@EVERY_FAMILY
def test_bytes_kept_for_backward_are_proportional_to_the_active_layers(family: str) -> None:
    model = make(family)
    kept = []
    for rate in (0.0, 0.25, 0.5, 0.75):
        with LayerDropout(model, LayerDropoutConfig(rate=rate), seed=0) as dropout:
            kept.append(saved_bytes(model, dropout, batch=0))
    steps = [more - less for more, less in itertools.pairwise(kept)]

    assert min(steps) > 0
    if family != "samara layer-wise":  # whose layers differ
        assert max(steps) == pytest.approx(min(steps), rel=0.05)


@pytest.mark.parametrize("family", WITH_LORA)
def test_adapters_inside(family: str) -> None:
    model = make(family, lora=True)
    keys = list(model.state_dict())
    layers = layers_of(model)
    with LayerDropout(model, LayerDropoutConfig(rate=0.5), seed=0) as dropout:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with dropout.hold(batch=1) as gates:
            loss_of(model).backward()
        optimizer.step()
        assert list(model.state_dict()) == keys
    names = {id(p): name for name, p in model.named_parameters()}

    for runs, layer in zip(gates, layers, strict=True):
        adapters = [p for p in layer.parameters() if p.requires_grad]
        assert adapters
        for parameter in layer.parameters():
            moved = not torch.equal(parameter, before[names[id(parameter)]])
            assert moved == (runs and parameter.requires_grad)
    assert len(peft.get_peft_model_state_dict(model)) >= LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
@EVERY_FAMILY
def test_activation_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    plain, saving = make(family), make(family)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    found = []
    for model in (plain, saving):
        with LayerDropout(model, LayerDropoutConfig(rate=0.5), seed=3) as dropout:
            with dropout.hold(batch=2):
                loss = loss_of(model)
            loss.backward()  # after the gates: what is recomputed does not ask them
            found.append(gradients(model))

    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@EVERY_FAMILY
def test_a_layer_left_out_keeps_its_place_among_the_hidden_states(family: str) -> None:
    model = make(family)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
    options = {} if "classifier" in dict(model.named_modules()) else {"use_cache": False}
    dropout = LayerDropout(model, LayerDropoutConfig(rate=0.5, protect_last=1), seed=0)
    with dropout.hold(batch=0) as gates:
        states = model(input_ids=ids, output_hidden_states=True, **options).hidden_states

    assert len(states) == LAYERS + 1
    for number in range(LAYERS - 1):  # the last one may be normalised
        assert torch.equal(states[number], states[number + 1]) == (not gates[number])


@EVERY_FAMILY
def test_a_copy_is_a_plain_model_with_layers_of_its_own(family: str) -> None:
    model = make(family)
    dropout = LayerDropout(model, LayerDropoutConfig(rate=0.5), seed=0)
    with dropout.hold(batch=0):
        twin = copy.deepcopy(model)
        expected = loss_of(model.eval())
        with torch.no_grad():
            for layer in layers_of(model):
                for parameter in layer.parameters():
                    parameter.zero_()

        assert torch.equal(loss_of(twin.eval()), expected)
    LayerDropout(twin, LayerDropoutConfig(rate=0.5), seed=0)  # not attached yet


PRE_NORM = pytest.mark.parametrize(
    "family", ["gpt2", "opt", "llama", "qwen2", "samara", "samara layer-wise", "samara cola"]
)


def streams(model: nn.Module) -> list[Tensor]:
    """What reaches the first two layers."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hooks = [
        layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers_of(model)[:2]
    ]
    model(input_ids=torch.arange(2, 2 + LENGTH)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@PRE_NORM
def test_inverse_keep_scales_what_a_layer_adds(family: str) -> None:
    model = make(family).double()
    stream, plain = streams(model)
    config = LayerDropoutConfig(rate=0.25, shape="uniform", scale="inverse_keep")
    with LayerDropout(model, config, seed=0) as dropout:
        keep = dropout.rates.keep[0]
        batch = next(b for b in range(20) if dropout.gates(batch=b)[:2] == (True, True))
        with dropout.hold(batch=batch):
            _, scaled = streams(model)
        assert torch.equal(streams(model)[1], plain)

    assert keep == 0.75
    torch.testing.assert_close(scaled - stream, (plain - stream) / keep)


@PRE_NORM
def test_survival_at_eval_scales_in_evaluation_only(family: str) -> None:
    model = make(family).double().eval()
    stream, plain = streams(model)
    config = LayerDropoutConfig(rate=0.5, shape="uniform", scale="survival_at_eval")
    with LayerDropout(model, config, seed=0):
        _, scaled = streams(model)
        torch.testing.assert_close(scaled - stream, (plain - stream) * 0.5)
        model.train()
        assert torch.equal(streams(model)[1], plain)
    assert torch.equal(streams(model.eval())[1], plain)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_post_norm_models_are_not_scaled(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"scale: inverse_keep needs .* those of {family} norm"):
        LayerDropout(make(family), LayerDropoutConfig(rate=0.5, scale="inverse_keep"), seed=0)
