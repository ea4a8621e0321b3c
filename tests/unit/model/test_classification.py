"""Classification on either trunk: what is pooled, padding, losses, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from samara.model.classification import SamaraForSequenceClassification
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM

PAD = 0
KINDS = ["causal", "bidirectional"]


def make_config(attention: str, **fields: Any) -> SamaraConfig:
    torch.manual_seed(0)
    return SamaraConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        head_dim=8,
        ffn_dims=[16, 24],
        attention=attention,
        **fields,
    )


def make(attention: str, **fields: Any) -> SamaraForSequenceClassification:
    return SamaraForSequenceClassification(make_config(attention, **fields)).double().eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 19, (batch, length), generator=torch.Generator().manual_seed(1))


def test_causal_judges_the_last_token_and_bidirectional_the_mean() -> None:
    ids = tokens(2, 6)
    for attention in KINDS:
        model = make(attention, num_labels=3)
        hidden = model.model(ids).last_hidden_state
        pooled = hidden[:, -1] if attention == "causal" else hidden.mean(dim=1)
        torch.testing.assert_close(model(ids).logits, pooled @ model.score.weight.T)


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", [True, False])
def test_padding_changes_nothing(attention: str, side: str, given: bool) -> None:
    """Whether the mask is given, or follows from the padding token; one inside is text."""
    model = make(attention, num_labels=3, pad_token_id=PAD)
    rows = [tokens(1, 7)[0], tokens(1, 4)[0]]
    rows[1][2] = PAD
    ids, mask = torch.full((2, 7), PAD), torch.zeros(2, 7, dtype=torch.int64)
    for row, text in enumerate(rows):
        span = slice(7 - len(text), 7) if side == "left" else slice(0, len(text))
        ids[row, span], mask[row, span] = text, 1
    logits = model(ids, attention_mask=mask if given else None).logits
    for row, text in enumerate(rows):
        alone = model(text[None], attention_mask=torch.ones(1, len(text), dtype=torch.int64))
        torch.testing.assert_close(logits[row], alone.logits[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", KINDS)
def test_losses_are_those_of_hugging_face(attention: str) -> None:
    ids = tokens(4, 5)
    one, three = make(attention, num_labels=1), make(attention, num_labels=3)
    numbers, classes = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0, 2, 1, 1])
    flags = torch.tensor([[1.0, 0.0, 1.0]] * 4)
    scores = three(ids).logits

    torch.testing.assert_close(
        one(ids, labels=numbers).loss,
        functional.mse_loss(one(ids).logits[:, 0], numbers.double()),
    )
    torch.testing.assert_close(
        three(ids, labels=classes).loss, functional.cross_entropy(scores, classes)
    )
    torch.testing.assert_close(
        three(ids, labels=flags).loss,
        functional.binary_cross_entropy_with_logits(scores, flags.double()),
    )
    three.config.problem_type = "regression"
    torch.testing.assert_close(
        three(ids, labels=flags).loss, functional.mse_loss(scores, flags.double())
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", KINDS)
def test_takes_over_a_language_models_trunk(attention: str, tied: bool, tmp_path: Path) -> None:
    language_model = SamaraForCausalLM if attention == "causal" else SamaraForMaskedLM
    source = language_model(make_config(attention, tie_word_embeddings=tied))
    save_model(source, tmp_path / "pretrained")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "pretrained", num_labels=4
    )
    assert type(model) is SamaraForSequenceClassification
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    ids = tokens(2, 5)
    assert torch.equal(
        model.model(ids).last_hidden_state, source.eval().model(ids).last_hidden_state
    )
    save_model(model, tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert again.config.num_labels == 4
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("attention", KINDS)
def test_learns(attention: str) -> None:
    """Whether a token is in the text: at 16 rows a step, in 60 steps."""
    model = SamaraForSequenceClassification(make_config(attention, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(60):
        ids = torch.randint(1, 19, (16, 8), generator=generator)
        ids[::2] = torch.where(ids[::2] == 7, 8, ids[::2])
        ids[1::2, 3] = 7
        loss = model(ids, labels=torch.arange(16) % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_returns_a_tuple_and_a_missing_padding_token_means_no_padding() -> None:
    model = make("causal", num_labels=2)
    ids = tokens(2, 4)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    embedded = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
