"""The bidirectional model and the prefix LM as Hugging Face sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from samara.errors import CheckpointError, ConfigError
from samara.model.configuration import SamaraConfig
from samara.model.loading import load_model, save_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM, SamaraModel, set_activation_checkpointing

VOCAB = 19


def make_config(attention: str, **fields: Any) -> SamaraConfig:
    torch.manual_seed(0)
    return SamaraConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        head_dim=8,
        num_query_heads=[2, 4],
        num_kv_heads=[1, 2],
        ffn_dims=[16, 24],
        attention=attention,
        **fields,
    )


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def test_every_position_depends_on_every_other_of_its_document_only() -> None:
    model = SamaraForMaskedLM(make_config("bidirectional")).double()
    embedded = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    logits = model(inputs_embeds=embedded, position_ids=positions).logits
    for place in range(6):
        (grad,) = torch.autograd.grad(logits[0, place].square().sum(), embedded, retain_graph=True)
        reached = (grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert reached == ([0, 1, 2, 3] if place < 4 else [4, 5])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(side: str) -> None:
    model = SamaraForMaskedLM(make_config("bidirectional")).double().eval()
    ids = tokens(1, 7)
    padded, mask = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    padded[0], mask[0] = ids[0], 1
    span = slice(3, 7) if side == "left" else slice(0, 4)
    padded[1, span], mask[1, span] = ids[0, :4], 1
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], model(ids).logits[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[1, span], model(ids[:, :4]).logits[0], rtol=1e-10, atol=1e-10)


def test_labels_are_not_shifted() -> None:
    model = SamaraForMaskedLM(make_config("bidirectional")).double()
    ids, labels = tokens(2, 6), tokens(2, 6).flip(1)
    labels[:, ::2] = -100
    out = model(ids, labels=labels)
    expected = cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=3).loss, expected * 2)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for mode in ("none", "layer"):
        model = SamaraForMaskedLM(make_config("bidirectional"))
        set_activation_checkpointing(model, mode)
        model(tokens(2, 5), labels=tokens(2, 5)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_round_trip_through_auto_and_through_our_own_loader(tmp_path: Path) -> None:
    model = SamaraForMaskedLM(make_config("bidirectional")).eval()
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention"] == "bidirectional"
    expected = model(tokens(1, 5)).logits
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is SamaraForMaskedLM
    assert torch.equal(loaded(tokens(1, 5)).logits, expected)
    ours = load_model(tmp_path, model_class=SamaraForMaskedLM)
    assert torch.equal(ours(tokens(1, 5)).logits, expected)


def test_the_wrong_head_is_refused(tmp_path: Path) -> None:
    save_model(SamaraForMaskedLM(make_config("bidirectional")), tmp_path / "masked")
    save_model(SamaraForCausalLM(make_config("causal")), tmp_path / "causal")
    with pytest.raises(ConfigError, match="cannot be bidirectional; load this one with AutoModelF"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    with pytest.raises(ConfigError, match="a masked language model cannot be causal"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "causal")
    with pytest.raises(CheckpointError, match=r"config.json: attention: .*cannot be bidirectional"):
        load_model(tmp_path / "masked")
    with pytest.raises(ConfigError, match=r"attention: unknown value 'sideways' \(known: bidir"):
        make_config("sideways")


def test_what_excludes_looking_both_ways_is_refused() -> None:
    model = SamaraModel(make_config("bidirectional"))
    with pytest.raises(ConfigError, match="use_cache: a bidirectional model has no cache"):
        model(tokens(1, 4), use_cache=True)
    with pytest.raises(ConfigError, match="prefix_length: needs causal attention"):
        model(tokens(1, 4), prefix_length=torch.tensor([2]))
    ready = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match="prefix_length: a ready attention_mask already"):
        SamaraModel(make_config("causal"))(
            tokens(1, 4), attention_mask=ready, prefix_length=torch.tensor([2])
        )


# --- prefix LM --------------------------------------------------------------------------------


def test_a_prefix_of_one_is_the_causal_model() -> None:
    model = SamaraForCausalLM(make_config("causal")).double()
    ids = tokens(2, 6)
    expected = model(ids).logits
    for length in (0, 1):
        logits = model(ids, prefix_length=torch.full((2,), length)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_generation_reads_the_prompt_both_ways() -> None:
    """The cache holds the prompt as the prefix; each new token equals the uncached forward."""
    model = SamaraForCausalLM(make_config("causal")).double().eval()
    prompt, prefix = tokens(2, 5), torch.tensor([5, 3])
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        prefix_length=prefix,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    expected = prompt
    for _ in range(6):
        logits = model(expected, prefix_length=prefix).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)
    causal = model(prompt).logits
    assert (model(prompt, prefix_length=prefix).logits - causal).abs().max() > 1e-3
