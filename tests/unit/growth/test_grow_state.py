"""Growing whole models: decoder, encoder, transformers' Llama; what does not belong is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from samara.errors import CheckpointError
from samara.growth.grow_state import fresh_weights, grow
from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import deeper_design
from samara.growth.state import GrowthState
from samara.growth.stored import grown_model, stored_state
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.convert import write_model
from samara.model.interchange.formats import read_model
from samara.model.interchange.provenance import Making
from samara.model.loading import load_model, save_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import named_weights
from samara.train.config import AdamW
from samara.train.optim import Optimizer

DESIGN = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    head_dim=4,
    num_query_heads=4,
    num_kv_heads=2,
    ffn_dim=24,
    vocab_size=29,
).expand()
IDS = torch.arange(20)[None]


def changed(**update) -> ModelConfig:
    return ModelConfig.model_validate({**DESIGN.model_dump(), **update})


def operator(**fields) -> OperatorConfig:
    return OperatorConfig.model_validate({"moments": "reset", **fields})


def state(model_class=SamaraForCausalLM, attention="causal") -> tuple[GrowthState, torch.nn.Module]:
    torch.manual_seed(0)
    model = model_class(SamaraConfig.from_design(DESIGN, attention=attention)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    weights = {name: weight.detach() for name, weight in named_weights(model).items()}
    return GrowthState(design=DESIGN, weights=weights), model


def build(grown: GrowthState, model_class=SamaraForCausalLM, attention="causal"):
    model = model_class(SamaraConfig.from_design(grown.design, attention=attention)).double().eval()
    with torch.no_grad():
        for name, weight in named_weights(model).items():
            weight.copy_(grown.weights[name])
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@pytest.mark.parametrize("fields", [{"new_layers": "zero"}, {"depth": {"kind": "llama_pro"}}])
def test_an_encoder_grows_like_a_decoder(fields):
    source, model = state(SamaraForMaskedLM, "bidirectional")
    target = deeper_design(DESIGN, operator(**fields), num_hidden_layers=4)
    grown = grow(source, target=target, operator=operator(**fields), seed=0)
    larger = build(grown.state, SamaraForMaskedLM, "bidirectional")
    assert grown.exactness == "exact"
    assert torch.equal(logits(larger), logits(model))
    wider = grow(source, target=changed(hidden_size=32), operator=operator(), seed=0)
    larger = build(wider.state, SamaraForMaskedLM, "bidirectional")
    torch.testing.assert_close(logits(larger), logits(model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", ["duplicate", "zero_pad", "random"])
def test_a_larger_vocabulary_keeps_the_logits_of_the_old_tokens(width):
    source, model = state()
    grown = grow(source, target=changed(vocab_size=35), operator=operator(width=width), seed=0)
    larger = logits(build(grown.state))
    assert larger.shape[-1] == 35
    torch.testing.assert_close(larger[..., :29], logits(model), rtol=1e-12, atol=1e-12)
    fresh = fresh_weights(grown.state.design, 0)["model.embed_tokens.weight"]
    embedding = grown.state.weights["model.embed_tokens.weight"]
    torch.testing.assert_close(embedding[29:], fresh[29:].double())


def test_eps_must_follow_zero_padding():
    source, _ = state()
    source = dataclasses.replace(source, weights={n: w * 1e-3 for n, w in source.weights.items()})
    small, wide = build(source), operator(width="zero_pad")
    grown = grow(source, target=changed(hidden_size=20), operator=wide, seed=0).state
    torch.testing.assert_close(logits(build(grown)), logits(small), rtol=1e-10, atol=1e-16)
    kept = dataclasses.replace(grown, design=changed(hidden_size=20).expand())
    assert not torch.allclose(logits(build(kept)), logits(small), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_grows_in_the_dtype_it_has(dtype):
    source, _ = state()
    source = dataclasses.replace(
        source, weights={n: w.to(dtype) for n, w in source.weights.items()}
    )
    target = changed(
        hidden_size=32, num_hidden_layers=3, num_query_heads=8, num_kv_heads=4, ffn_dim=99
    )
    fields = {"depth": {"kind": "random_top"}, "noise": 0.1}
    grown = grow(source, target=target, operator=operator(**fields), seed=0)
    assert {weight.dtype for weight in grown.state.weights.values()} == {dtype}


def after_training(grown: GrowthState, *, steps: int = 4) -> SamaraForCausalLM:
    """Take a few steps of AdamW."""
    model = build(grown)
    optimizer = Optimizer(model, AdamW(lr=1e-2))
    optimizer.load_state_dict(grown.optimizer or {})
    optimizer.set_lr(1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("fields", "stay_equal"),
    [({}, True), ({"noise": 0.1}, False), ({"moments": "zero"}, False)],
)
def test_duplicates_stay_equal_unless_something_breaks_the_symmetry(fields, stay_equal):
    source, model = state()
    trained = Optimizer(model, AdamW(lr=1e-2))
    trained.set_lr(0.0)
    model(IDS, labels=IDS).loss.backward()
    trained.step()
    source = dataclasses.replace(source, optimizer=trained.state_dict(), betas=(0.9, 0.95))
    wanted = operator(**{"moments": "map", **fields})
    grown = grow(source, target=changed(ffn_dim=48), operator=wanted, seed=0)
    up = after_training(grown.state).model.layers[0].mlp.up_proj.weight.detach()
    gap = (up[:24] - up[24:]).abs().max().item()
    assert (gap < 1e-12) is stay_equal
    assert stay_equal or gap > 1e-4


def test_a_low_rank_layer_of_zero_output_keeps_a_and_learns_through_b():
    design = changed(cola={"rank": 4}).expand()
    source = GrowthState(design=design, weights=fresh_weights(design, 0))
    wanted = operator(depth={"kind": "llama_pro"})
    target = deeper_design(design, wanted, num_hidden_layers=4)
    model = build(grow(source, target=target, operator=wanted, seed=0).state)
    model(IDS, labels=IDS).loss.backward()
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
        assert linear.cola_a.any()
        assert not linear.cola_b.any()
        assert linear.cola_b.grad.any()


def test_fresh_layers_are_those_of_the_initialiser_and_the_global_generator_rests():
    source, _ = state()
    target = deeper_design(DESIGN, operator(), num_hidden_layers=3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    grown = grow(source, target=target, operator=operator(depth={"kind": "random_top"}), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    fresh = SamaraForCausalLM(SamaraConfig.from_design(target)).state_dict()
    for name, weight in grown.state.weights.items():
        if name.startswith("model.layers.2."):
            assert torch.equal(weight, fresh[name].double()), name


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), {}, "weights: lack model.norm.weight, unlike"),
        (lambda w: w.update({"score.weight": IDS}), {}, "weights: hold score.weight, unlike"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            {},
            r"model.norm.weight has shape \(3,\), the design asks for \(16,\)",
        ),
        (lambda w: None, {"moments": "map"}, "optimizer state: is missing, and moments: map needs"),
        (lambda w: None, {"moments": "copy"}, "or set moments: reset"),
    ],
)
def test_a_state_of_another_model_or_without_moments_is_refused(change, fields, message):
    source, _ = state()
    change(source.weights)
    with pytest.raises(CheckpointError, match=message):
        grow(source, target=changed(ffn_dim=25), operator=operator(**fields), seed=0)


@pytest.mark.parametrize(
    ("fields", "update", "exactness"),
    [
        ({"depth": {"kind": "llama_pro"}}, {"num_hidden_layers": 4}, "exact"),
        ({"noise": 0.1}, {"hidden_size": 96, "num_query_heads": 8, "num_kv_heads": 4}, "tolerance"),
        ({"width": "zero_pad"}, {"ffn_dim": 100}, "tolerance"),
    ],
)
def test_a_llama_of_transformers_grows_through_conversion(tmp_path, fields, update, exactness):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=29,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            max_position_embeddings=64,
        )
    ).eval()
    llama.save_pretrained(tmp_path / "small")
    source = read_model(tmp_path / "small")
    design = stored_state(source).design
    fields_of = design.model_dump()
    if "num_hidden_layers" in update:
        fields_of = deeper_design(design, operator(**fields), num_hidden_layers=4).model_dump()
    target = ModelConfig.model_validate({**fields_of, **update})
    grown = grow(stored_state(source), target=target, operator=operator(**fields), seed=0)
    assert grown.exactness == exactness
    larger = grown_model(grown.state, source=source)
    write_model(larger, tmp_path / "large", to="llama", max_shard_bytes=10**9, making=Making())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "large").eval()
    assert type(theirs) is LlamaForCausalLM
    if exactness == "exact":
        assert torch.equal(logits(theirs), logits(llama))
    else:
        torch.testing.assert_close(logits(theirs), logits(llama), rtol=1e-5, atol=1e-5)
    generated = theirs.generate(IDS[:, :5], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, llama.generate(IDS[:, :5], max_new_tokens=6, do_sample=False))


def test_a_grown_layerwise_model_saves_its_explicit_lists(tmp_path):
    small = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=4,
        gqa_group_size=2,
        ffn_dim_divisor=8,
        layerwise_scaling={"alpha": (0.5, 1.0), "beta": (0.5, 4.0)},
        vocab_size=29,
    )
    source = GrowthState(design=small.expand(), weights=fresh_weights(small.expand(), 0))
    target = small.model_copy(update={"num_hidden_layers": 4})
    grown = grow(source, target=target, operator=operator(depth={"kind": "fit"}), seed=0)
    assert str(grown.layer_map) == "[0, 0, 0, 1]"
    assert grown.state.design == target.expand()
    model = SamaraForCausalLM(SamaraConfig.from_design(grown.state.design))
    with torch.no_grad():
        for name, weight in named_weights(model).items():
            weight.copy_(grown.state.weights[name])
    save_model(model, tmp_path)
    assert load_model(tmp_path).config.to_design() == target.expand()
