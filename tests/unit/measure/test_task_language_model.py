"""The one way to ask a model: token boundaries, padding, truncation, windows, stop texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from samara.data.tokenizer import train_tokenizer
from samara.errors import ConfigError, DataError
from samara.measure import language_model
from samara.measure.language_model import LanguageModel, cut_at
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

LENGTH = 40
CONTEXTS = ("", "the cat sat", "a dog ran over the hill and back", "the ", "cat\n", " ", "1 2 3")
CONTINUATIONS = (" on", "mat. the cat", " again", "cat", "dog", " 12", " x y z")
TEXTS = (
    "the cat sat on the mat. " * 6,
    "a dog ran over the hill and back again",
    "12 34 x y z\n\n",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, folder, vocab_size=290)
    return AutoTokenizer.from_pretrained(folder)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def samara() -> SamaraForCausalLM:
    """Widths and ranks that differ by layer."""
    design = ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_query_heads": [2, 4],
            "num_kv_heads": [1, 2],
            "ffn_dim": [32, 48],
            "cola": {"rank": [8, 0]},
            "vocab_size": 290,
            "max_position_embeddings": LENGTH,
        }
    )
    return SamaraForCausalLM(SamaraConfig.from_design(design))


@pytest.fixture(scope="module", params=[llama, samara], ids=["llama", "samara"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    made = request.param()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3.0)  # far from uniform, so that a mistake shows
    return made


@pytest.fixture
def asked(model, tokenizer) -> LanguageModel:
    return LanguageModel(model, tokenizer, batch_size=3)


def by_hand(asked: LanguageModel, context: list[int], continuation: list[int]) -> float:
    """Summed log-probability from the logits of one unpadded row."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        log_p = asked.model(input_ids=ids).logits.log_softmax(-1)[0]
    first = len(context)
    return sum(float(log_p[first + n - 1, token]) for n, token in enumerate(continuation))


def ids_of(asked: LanguageModel, text: str) -> list[int]:
    return asked.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- how likely -------------------------------------------------------------------------------


def test_a_continuation_s_score_is_the_sum_over_its_tokens(asked):
    (score,) = asked.loglikelihood(["the cat sat"], [" on the mat"])
    bos = asked.tokenizer.bos_token_id
    whole, head = ids_of(asked, "the cat sat on the mat"), ids_of(asked, "the cat sat")
    assert whole[: len(head)] == head
    tail = whole[len(head) :]
    assert score.loglikelihood == pytest.approx(by_hand(asked, [bos, *head], tail), abs=1e-5)
    assert score.num_tokens == len(tail)
    assert not score.is_truncated


def test_an_empty_context_is_the_start_mark(asked):
    (score,) = asked.loglikelihood([""], ["the cat"])
    bos = asked.tokenizer.bos_token_id
    expected = by_hand(asked, [bos], ids_of(asked, "the cat"))
    assert score.loglikelihood == pytest.approx(expected, abs=1e-5)


def test_white_space_that_ends_a_context_belongs_to_the_continuation(asked):
    one, other = asked.loglikelihood(["the cat ", "the cat"], ["sat", " sat"])
    assert one == other


def test_a_merge_across_the_boundary_leaves_the_continuation_its_own_tokens(asked):
    assert len(ids_of(asked, "the")) < len(ids_of(asked, "th")) + len(ids_of(asked, "e"))
    (pair,) = asked.encode_pairs(["th"], ["e"])
    assert list(pair.continuation) == ids_of(asked, "e")
    assert list(pair.context) == [asked.tokenizer.bos_token_id, *ids_of(asked, "th")]


def test_a_text_that_spells_the_start_mark_gets_no_second_one(asked):
    mark = asked.tokenizer.bos_token_id
    (ids,) = asked.encode([f"{asked.tokenizer.bos_token}the"])
    assert ids.count(mark) == 1


def test_scores_do_not_depend_on_the_batch(model, tokenizer):
    one = LanguageModel(model, tokenizer, batch_size=1).loglikelihood(CONTEXTS, CONTINUATIONS)
    for batch_size in (2, 16):
        asked = LanguageModel(model, tokenizer, batch_size=batch_size)
        many = asked.loglikelihood(CONTEXTS, CONTINUATIONS)
        for single, batched in zip(one, many, strict=True):
            assert batched.loglikelihood == pytest.approx(single.loglikelihood, abs=1e-4)
            assert batched.is_greedy == single.is_greedy


def test_a_small_limit_on_logits_changes_nothing(asked, monkeypatch):
    before = asked.loglikelihood(CONTEXTS, CONTINUATIONS)
    monkeypatch.setattr(language_model, "LOGIT_ELEMENTS", 1)
    monkeypatch.setattr(language_model, "BLOCK", 2)
    after = asked.loglikelihood(CONTEXTS, CONTINUATIONS)
    assert [s.loglikelihood for s in after] == pytest.approx(
        [s.loglikelihood for s in before], abs=1e-4
    )


def test_equal_inputs_are_run_once(asked):
    rows = []
    hook = asked.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].shape[0])
    )
    done = []
    try:
        scores = asked.loglikelihood(["1 2 3"] * 4, ["7", "8", "9", "="], on_progress=done.append)
    finally:
        hook.remove()
    assert sum(rows) == 1
    assert done == [4]
    assert len({score.loglikelihood for score in scores}) == 4


def test_is_greedy_says_whether_the_model_would_write_it(asked):
    (ids,) = asked.encode(["the cat"])
    with torch.no_grad():
        best = int(asked.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    pairs = [
        language_model.EncodedPair(context=ids, continuation=[token])
        for token in (best, (best + 1) % 290)
    ]
    assert [score.is_greedy for score in asked.score_pairs(pairs)] == [True, False]


def test_a_long_context_loses_its_beginning_and_the_score_says_so(asked):
    context = "x " * LENGTH
    (score,) = asked.loglikelihood([context.strip()], [" a dog"])
    (pair,) = asked.encode_pairs([context.strip()], [" a dog"])
    kept = list(pair.context)[-(LENGTH + 1 - len(pair.continuation)) :]
    assert score.is_truncated
    assert score.loglikelihood == pytest.approx(
        by_hand(asked, kept, list(pair.continuation)), abs=1e-4
    )


def test_a_model_that_always_gives_all_logits_scores_the_same(tokenizer):
    class AllLogits(LlamaForCausalLM):
        def forward(self, input_ids, use_cache=None):
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    torch.manual_seed(1)
    plain = llama()
    every = AllLogits(plain.config)
    every.load_state_dict(plain.state_dict())
    one = LanguageModel(plain, tokenizer).loglikelihood(CONTEXTS, CONTINUATIONS)
    other = LanguageModel(every, tokenizer).loglikelihood(CONTEXTS, CONTINUATIONS)
    assert [s.loglikelihood for s in other] == pytest.approx(
        [s.loglikelihood for s in one], abs=1e-5
    )


# --- whole texts ------------------------------------------------------------------------------


def test_a_short_text_is_one_window(asked):
    (score,) = asked.loglikelihood_rolling(["the cat sat on"])
    bos, ids = asked.tokenizer.bos_token_id, ids_of(asked, "the cat sat on")
    assert score.loglikelihood == pytest.approx(by_hand(asked, [bos], ids), abs=1e-5)
    assert score.num_tokens == len(ids)


def test_a_long_text_is_cut_into_windows_that_score_each_token_once(asked):
    text = "x y z 12 " * 20
    ids = ids_of(asked, text)
    assert len(ids) > 2 * LENGTH
    bos, size = asked.tokenizer.bos_token_id, LENGTH
    expected = by_hand(asked, [bos], ids[:size])
    done = size
    while done < len(ids):
        stop = min(done + size, len(ids))
        expected += by_hand(asked, ids[stop - size - 1 : done], ids[done:stop])
        done = stop
    (score,) = asked.loglikelihood_rolling([text])
    assert score.loglikelihood == pytest.approx(expected, abs=1e-3)
    assert score.num_tokens == len(ids)


def test_an_empty_text_scores_nothing(asked):
    empty, full = asked.loglikelihood_rolling(["", "a"])
    assert (empty.loglikelihood, empty.num_tokens) == (0.0, 0)
    assert full.num_tokens > 0


# --- how it goes on ---------------------------------------------------------------------------


def test_batched_generation_is_generation_one_by_one(model, tokenizer):
    one = LanguageModel(model, tokenizer, batch_size=1)
    many = LanguageModel(model, tokenizer, batch_size=8)
    for stop in ((), ("e", "\n")):
        alone = one.generate_until(CONTEXTS, stop=stop, max_new_tokens=8)
        together = many.generate_until(CONTEXTS, stop=stop, max_new_tokens=8)
        assert alone == together
        assert not any(end in answer.text for answer in together for end in stop)


def test_generation_is_the_likeliest_tokens(asked):
    (answer,) = asked.generate_until(["the cat"], max_new_tokens=5)
    ids = asked.encode(["the cat"])[0]
    start = len(ids)
    for _ in range(5):
        with torch.no_grad():
            best = int(asked.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == asked.tokenizer.eos_token_id:
            break
        ids = [*ids, best]
    assert answer.text == asked.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_generation_ends_at_the_stop_text(asked):
    (free,) = asked.generate_until(["the cat"], max_new_tokens=6)
    assert len(free.text) > 3
    stop = free.text[2:4]
    (cut,) = asked.generate_until(["the cat"], stop=("nowhere", stop), max_new_tokens=6)
    assert cut.text == free.text[: free.text.index(stop)]


def test_the_model_s_own_sampling_settings_are_ignored_and_kept(asked):
    plain = asked.generate_until(["the cat"], max_new_tokens=6)
    before = asked.model.generation_config
    asked.model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=2
    )
    try:
        assert asked.generate_until(["the cat"], max_new_tokens=6) == plain
        assert asked.model.generation_config is own
    finally:
        asked.model.generation_config = before


def test_generation_ends_at_every_end_mark_of_the_model(asked):
    ids = asked.encode(["the cat"])[0]
    with torch.no_grad():
        first = int(asked.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    before = asked.model.generation_config
    asked.model.generation_config = GenerationConfig(eos_token_id=[first, 2])
    try:
        (ended,) = asked.generate_until(["the cat"], max_new_tokens=4)
    finally:
        asked.model.generation_config = before
    assert ended.text == ""


def test_a_prompt_too_long_to_be_answered_loses_its_beginning(asked):
    long = "x y " * LENGTH
    short = asked.tokenizer.decode(asked.encode([long])[0][-(LENGTH - 4) :])
    answer, same, fits = asked.generate_until([long, short, "the"], max_new_tokens=4)
    assert (answer.is_truncated, fits.is_truncated) == (True, False)
    assert asked.encode([short])[0][1:] == asked.encode([long])[0][-(LENGTH - 4) :]
    assert same.is_truncated  # its start mark no longer fits
    assert answer.text == same.text


@pytest.mark.parametrize(
    ("text", "stop", "cut"),
    [
        ("a b\nc", ("\n",), "a b"),
        ("abc", ("c", "b"), "a"),
        ("abc", (), "abc"),
        ("ab", ("x",), "ab"),
    ],
)
def test_cut_at_takes_the_first_stop_text(text, stop, cut):
    assert cut_at(text, stop) == cut


# --- what cannot be asked ---------------------------------------------------------------------


def test_an_empty_continuation_is_refused(asked):
    with pytest.raises(DataError, match="a continuation of 'the cat' is empty: nothing to score"):
        asked.loglikelihood(["the cat"], [""])


def test_a_continuation_longer_than_the_context_is_refused(asked):
    with pytest.raises(DataError, match=r"tokens, the model's context holds 40, so it cannot be"):
        asked.loglikelihood(["the"], [" x" * 80])


def test_an_answer_longer_than_the_context_is_refused(asked):
    with pytest.raises(ConfigError, match="max_new_tokens: 40 leaves no room for a prompt in the"):
        asked.generate_until(["the"], max_new_tokens=LENGTH)


def test_a_tokenizer_without_marks_is_refused(model, tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="names neither bos_token nor eos_token"):
        LanguageModel(model, bare)


def test_the_context_length_is_the_configuration_s_else_the_tokenizer_s(tokenizer):
    assert LanguageModel(llama(), tokenizer).max_length == LENGTH
    assert LanguageModel(llama(), tokenizer, max_length=7).max_length == 7
