"""A dense uniform design without QK-norm is transformers' Llama: same names, logits, gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

VOCAB, HIDDEN, LAYERS, FFN = 61, 64, 3, 96


def make_pair(num_kv_heads: int, *, tied: bool) -> tuple[SamaraForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            intermediate_size=FFN,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-6,
        )
    )
    ours = SamaraForCausalLM(
        SamaraConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            head_dim=16,
            num_query_heads=[4] * LAYERS,
            num_kv_heads=[num_kv_heads] * LAYERS,
            ffn_dims=[FFN] * LAYERS,
            qk_norm=False,
            tie_word_embeddings=tied,
        )
    )
    ours.load_state_dict(llama.state_dict(), strict=True)
    return ours, llama


@pytest.mark.parametrize(("num_kv_heads", "tied"), [(4, True), (2, False), (1, False)])
def test_logits_loss_and_gradients(num_kv_heads: int, tied: bool) -> None:
    ours, llama = make_pair(num_kv_heads, tied=tied)
    ids = torch.randint(0, VOCAB, (2, 33), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    a, b = ours(ids, labels=labels), llama(ids, labels=labels)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-6)
    a.loss.backward()
    b.loss.backward()
    theirs = dict(llama.named_parameters())
    for name, mine in ours.named_parameters():
        torch.testing.assert_close(mine.grad, theirs[name].grad, rtol=0, atol=1e-6)


def test_loss_divided_by_items_in_batch() -> None:
    ours, llama = make_pair(2, tied=True)
    ids = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        ours(ids, labels=ids, num_items_in_batch=50).loss,
        llama(ids, labels=ids, num_items_in_batch=50).loss,
        rtol=0,
        atol=1e-6,
    )


def test_left_padded_rows_and_generation() -> None:
    ours, llama = make_pair(2, tied=False)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mine = ours.generate(ids, attention_mask=mask, **options)
    theirs = llama.generate(ids, attention_mask=mask, **options)
    assert torch.equal(mine, theirs)
