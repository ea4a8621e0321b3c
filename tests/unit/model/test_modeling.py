"""The model as Hugging Face sees it: caches, padding, packing, generation, outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from samara.errors import ConfigError
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing

VOCAB = 31


def make_model(**fields: Any) -> SamaraForCausalLM:
    torch.manual_seed(0)
    design: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "num_query_heads": [2, 4, 6],
        "num_kv_heads": [1, 2, 2],
        "ffn_dims": [16, 24, 40],
        "ranks": [6, 0, {"q_proj": 4, "gate_proj": 5}],
    }
    return SamaraForCausalLM(SamaraConfig(**(design | fields))).double().eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 5], [5, 1, 1, 2], [3, 3, 3]])
def test_chunked_prefill_and_decode_equal_the_uncached_forward(chunks: list[int]) -> None:
    model, ids = make_model(), tokens(2, 9)
    expected = model(ids).logits
    cache, outputs, start = None, [], 0
    for size in chunks:
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("give_positions", [False, True])
def test_padded_batch_equals_rows_alone(side: str, give_positions: bool) -> None:
    model = make_model()
    rows = [tokens(1, length, seed=length)[0] for length in (4, 9, 7)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    spans = []
    for row, content in enumerate(rows):
        start = 9 - len(content) if side == "left" else 0
        span = slice(start, start + len(content))
        ids[row, span], mask[row, span] = content, 1
        spans.append(span)
    options = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if give_positions else {}
    logits = model(ids, attention_mask=mask, **options).logits
    assert torch.isfinite(logits).all()
    for row, content in enumerate(rows):
        alone = model(content[None]).logits[0]
        torch.testing.assert_close(logits[row, spans[row]], alone, rtol=1e-10, atol=1e-10)


def test_packed_row_equals_documents_alone_in_value_and_gradient() -> None:
    packed_model, model = make_model(), make_model()
    lengths, ids = (4, 1, 6), tokens(1, 11)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = packed_model(ids, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    probe = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2)).double()
    (packed * probe).sum().backward()
    (alone * probe).sum().backward()
    for mine, theirs in zip(packed_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-10)


def test_one_document_is_a_plain_causal_row() -> None:
    model, ids = make_model(), tokens(2, 6)
    by_positions = model(ids, position_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(by_positions, model(ids).logits)


def test_relative_positions_only() -> None:
    """RoPE: a row shifted as a whole gives the same logits."""
    model, ids = make_model(), tokens(1, 6)
    shifted = model(ids, position_ids=torch.arange(100, 106)[None]).logits
    torch.testing.assert_close(shifted, model(ids).logits, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_greedy_generation_with_a_cache_equals_without(implementation: str | None) -> None:
    model = make_model()
    ids, mask = tokens(3, 5), torch.ones(3, 5, dtype=torch.long)
    mask[0, :3] = mask[1, :1] = 0
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    expected = ids
    for _ in range(7):
        row = mask.new_ones(3, expected.shape[1] - 5)
        logits = model(expected, attention_mask=torch.cat((mask, row), dim=1)).logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
    if implementation is not None:
        options |= {"cache_implementation": implementation, "disable_compile": True}
    generated = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(generated, expected)
    uncached = model.generate(
        ids, attention_mask=mask, use_cache=False, max_new_tokens=7, do_sample=False, pad_token_id=0
    )
    assert torch.equal(uncached, expected)


def test_sampling_and_beams() -> None:
    model, ids = make_model(), tokens(2, 4)
    torch.manual_seed(5)
    first = model.generate(ids, max_new_tokens=5, do_sample=True, pad_token_id=0)
    torch.manual_seed(5)
    assert torch.equal(first, model.generate(ids, max_new_tokens=5, do_sample=True, pad_token_id=0))
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (2, 9)


def test_generation_stops_at_the_end_token() -> None:
    model, ids = make_model(), tokens(1, 4)
    end = model(ids).logits[0, -1].argmax().item()
    assert model.generate(ids, max_new_tokens=5, eos_token_id=end, pad_token_id=0).shape == (1, 5)


def test_ready_masks() -> None:
    model, ids = make_model(), tokens(2, 5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~causal, float("-inf"))
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected)
    torch.testing.assert_close(model(ids, attention_mask=added).logits, expected)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(keep: int | Tensor) -> None:
    model, ids = make_model(), tokens(2, 5)
    logits = model(ids).logits
    expected = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


def test_embeddings_in_place_of_tokens() -> None:
    model, ids = make_model(), tokens(2, 5)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


@pytest.mark.parametrize("given", [{}, {"input_ids": tokens(1, 2), "inputs_embeds": tokens(1, 2)}])
def test_input_must_be_given_once(given: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="give exactly one of input_ids and inputs_embeds"):
        make_model()(**given)


def test_hidden_states_and_tuple() -> None:
    model, ids = make_model(), tokens(2, 5)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    logits, *rest = model(ids, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert rest == []


def test_labels_are_shifted_and_averaged_over_what_counts() -> None:
    model, ids = make_model(), tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels)
    log_p = out.logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, nll[counted].mean())
    halved = model(ids, labels=labels, num_items_in_batch=2 * counted.sum()).loss
    torch.testing.assert_close(halved, out.loss / 2)
    assert torch.isfinite(model.bfloat16()(ids, labels=labels).loss)


def test_no_cache_unless_asked() -> None:
    model, ids = make_model(), tokens(1, 3)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


def test_checkpointing_is_off_while_a_cache_is_filled() -> None:
    model, ids = make_model(), tokens(1, 6)
    expected = model(ids).logits
    set_activation_checkpointing(model, "cola_m")
    out = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(torch.cat((out.logits, rest), dim=1), expected)


def test_tied_and_untied_heads() -> None:
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    difference = untied.num_parameters() - tied.num_parameters()
    assert difference == VOCAB * 32


def test_resized_vocabulary() -> None:
    model = make_model()
    model.resize_token_embeddings(VOCAB + 4)
    assert model.config.vocab_size == VOCAB + 4
    assert model(tokens(1, 3)).logits.shape == (1, 3, VOCAB + 4)
