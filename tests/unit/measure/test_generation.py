"""Writing: batches equal single prompts, the stream is the text, one line for each mistake."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from samara.data.chat_template import CHAT_TEMPLATE
from samara.data.tokenizer import train_tokenizer
from samara.errors import ConfigError, DataError, ResourceError
from samara.measure.generation import GenerationSettings, RowNoise, generate_texts
from samara.measure.language_model import LanguageModel
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

VOCAB, CONTEXT = 280, 64
PROMPTS = ("The elm", "A seed of the elm has wings, né?", "", "elm")
GREEDY = {"temperature": 0.0, "max_new_tokens": 20}
DRAWN = {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "max_new_tokens": 20, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["The seed of the elm has a wing. né 中文"] * 3, folder, vocab_size=VOCAB)
    return folder


@pytest.fixture(scope="module")
def language_model(folder: Path) -> LanguageModel:
    """Widths and ranks that differ by layer, far from uniform scores."""
    torch.manual_seed(1)
    design = ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_query_heads": [2, 4],
            "num_kv_heads": [1, 2],
            "ffn_dim": [32, 48],
            "cola": {"rank": [8, 0]},
            "vocab_size": VOCAB,
            "max_position_embeddings": CONTEXT,
        }
    )
    model = SamaraForCausalLM(SamaraConfig.from_design(design))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return LanguageModel(model, AutoTokenizer.from_pretrained(folder))


def write(
    language_model, prompts=PROMPTS, *, chat=False, draft=None, on_text=None, **settings
) -> list[str]:
    watcher = {} if on_text is None else {"on_text": on_text}
    return generate_texts(
        language_model, prompts, GenerationSettings(**settings), chat=chat, draft=draft, **watcher
    )


@pytest.mark.parametrize(
    "settings",
    [GREEDY, {**GREEDY, "repetition_penalty": 1.7}, DRAWN],
    ids=["greedy", "pen", "draw"],
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_writes_what_single_prompts_write(language_model, settings, cache):
    batch = write(language_model, cache=cache, **settings)
    assert batch == [write(language_model, [prompt], **settings)[0] for prompt in PROMPTS]
    assert len(set(batch)) == len(PROMPTS)


def test_greedy_ids_of_a_batch_are_those_of_single_prompts(language_model):
    encoded = [ids or [0] for ids in language_model.encode(PROMPTS)]
    batch = language_model.generate_ids(encoded, max_new_tokens=20)
    assert batch == [language_model.generate_ids([x], max_new_tokens=20)[0] for x in encoded]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_stream_is_the_texts_in_order(language_model, batch_size):
    heard: list[tuple[int, str]] = []
    small = LanguageModel(language_model.model, language_model.tokenizer, batch_size=batch_size)
    texts = write(small, on_text=lambda *piece: heard.append(piece), **DRAWN)
    assert [index for index, piece in heard if not piece] == [0, 1, 2, 3]
    assert [index for index, _ in heard] == sorted(index for index, _ in heard)
    assert len(heard) > len(PROMPTS) * 3
    for index, text in enumerate(texts):
        assert "".join(piece for number, piece in heard if number == index) == text


def test_the_stream_never_shows_half_a_character(language_model):
    class Scripted(LanguageModel):
        """Writes a text given beforehand."""

        def generate_ids(self, prompts, *, max_new_tokens, options=None):
            (ids,) = self.encode([" né 中文 𝄞."])
            streamer = options["streamer"]
            streamer.put(torch.tensor(prompts))
            for token in (*ids, self.tokenizer.eos_token_id, 5, 6):
                streamer.put(torch.tensor([token]))
            streamer.end()
            return [ids]

    pieces: list[str] = []
    scripted = Scripted(language_model.model, language_model.tokenizer)
    texts = write(scripted, ["elm"], on_text=lambda _, piece: pieces.append(piece), **GREEDY)
    assert texts == [" né 中文 𝄞."]
    assert "".join(pieces) == texts[0]
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_a_text_ends_before_the_end_mark(language_model):
    (ids,) = language_model.encode(["The elm"])
    written = language_model.generate_ids([ids], max_new_tokens=20)[0]
    end = written[3]

    class Ending(LanguageModel):
        """A model one of whose tokens is an end mark."""

        end_ids = (end,)

    expected = language_model.tokenizer.decode(written[: written.index(end)])
    ending = Ending(language_model.model, language_model.tokenizer)
    for prompts in (["The elm"], list(PROMPTS)):
        assert write(ending, prompts, **GREEDY)[0] == expected


def test_seeds_and_settings_decide(language_model):
    assert write(language_model, **DRAWN) == write(language_model, **DRAWN)
    assert write(language_model, **DRAWN) != write(language_model, **{**DRAWN, "seed": 4})
    greedy = write(language_model, **GREEDY)
    assert write(language_model, **{**DRAWN, "top_k": 1}) == greedy
    assert write(language_model, **{**DRAWN, "top_p": 0.0}) == greedy
    assert write(language_model, **{**GREEDY, "repetition_penalty": 1.7}) != greedy


def test_draws_follow_the_softmax(language_model):
    """The likeliest token after one prompt, over 2000 seeds: within 5 standard deviations."""
    (ids,) = language_model.encode(["The elm"])
    with torch.no_grad():
        logits = language_model.model(input_ids=torch.tensor([ids])).logits[0, -1]
    p = logits.softmax(-1)
    noise = RowNoise(range(2000))
    drawn = noise(torch.tensor([ids]), logits.expand(2000, -1)).argmax(-1)
    q = float(p.max())
    count = int((drawn == p.argmax()).sum())
    assert 0.02 < q < 0.98
    assert abs(count - 2000 * q) < 5 * (2000 * q * (1 - q)) ** 0.5


def test_chat_goes_through_the_template(folder, language_model):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    chatty = LanguageModel(language_model.model, tokenizer)
    rendered = "<|bos|><|user|>\nThe elm<|eos|>\n<|assistant|>\n"
    expected = write(language_model, [rendered], **GREEDY)
    assert write(chatty, ["The elm"], chat=True, **GREEDY) == expected
    assert expected != write(language_model, ["The elm"], **GREEDY)


def test_chat_without_a_template_is_refused(language_model):
    with pytest.raises(ConfigError, match="chat: the model's tokenizer has no chat template"):
        write(language_model, chat=True)


def test_a_prompt_longer_than_the_context_is_refused(language_model):
    with pytest.raises(DataError, match=r"prompt '.*elm.*'…: has \d+ tokens and 20 are to follow;"):
        write(language_model, ["The", "elm zebra " * 40], **GREEDY)


def test_a_prompt_that_leaves_too_little_room_is_told_how_much(language_model):
    (ids,) = language_model.encode(["The elm"])
    room = CONTEXT - len(ids)
    with pytest.raises(DataError, match=f"shorten the prompt, or max_new_tokens to {room}$"):
        write(language_model, ["The elm"], temperature=0.0, max_new_tokens=room + 1)
    assert write(language_model, ["The elm"], temperature=0.0, max_new_tokens=room)


def test_more_tokens_than_the_context_are_refused(language_model):
    with pytest.raises(ConfigError, match="max_new_tokens: 64 leaves no room for a prompt"):
        write(language_model, max_new_tokens=64)


def test_compiling_without_a_compiler_is_refused(language_model, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match="compile: needs a C\\+\\+ compiler, and no-such"):
        write(language_model, compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_step_writes_the_same(language_model):
    assert write(language_model, compile=True, **GREEDY) == write(language_model, **GREEDY)


# --- guessing ahead ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft(folder: Path) -> LanguageModel:
    """Another, smaller model: nearly always wrong."""
    torch.manual_seed(5)
    design = ModelConfig(
        hidden_size=16,
        num_hidden_layers=1,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = SamaraConfig.from_design(design, eos_token_id=tokenizer.eos_token_id)
    return LanguageModel(SamaraForCausalLM(config), tokenizer)


@pytest.mark.parametrize("how", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_guesses_change_no_text(language_model, draft, how):
    """Drawn texts are the same too: a place has its random numbers, whoever asks for them."""
    plain = write(language_model, **how)
    assert write(language_model, prompt_lookup=3, **how) == plain
    assert write(language_model, draft=draft, **how) == plain
    assert write(language_model, draft=language_model, **how) == plain


def test_right_guesses_save_passes(language_model, draft):
    calls = []
    hook = language_model.model.register_forward_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(language_model)
    twin.model._forward_hooks.clear()
    counts = []
    for guessing in (None, twin, draft):
        calls.clear()
        write(language_model, ["The elm"], draft=guessing, **DRAWN)
        counts.append(len(calls))
    hook.remove()
    alone, right, wrong = counts
    assert right < alone / 2
    assert right < wrong <= alone


def test_guessed_text_is_streamed_as_it_is(language_model, draft):
    pieces = []
    texts = generate_texts(
        language_model,
        PROMPTS,
        GenerationSettings(**DRAWN),
        draft=draft,
        on_text=lambda index, piece: pieces.append((index, piece)),
    )
    for index, text in enumerate(texts):
        assert "".join(piece for number, piece in pieces if number == index) == text


def test_what_does_not_go_with_guesses_is_refused(language_model, draft, tmp_path):
    with pytest.raises(ConfigError, match="draft: guesses in place of prompt_lookup; give one"):
        write(language_model, draft=draft, prompt_lookup=2)
    with pytest.raises(ConfigError, match=r"draft: wrong guesses are cut off the cache, .* static"):
        write(language_model, draft=draft, cache="static")
    with pytest.raises(ConfigError, match=r"prompt_lookup: wrong guesses .* leave compile out"):
        write(language_model, prompt_lookup=2, compile=True)
    train_tokenizer(["other words"] * 3, tmp_path / "other", vocab_size=262)
    other = LanguageModel(draft.model, AutoTokenizer.from_pretrained(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"draft: its tokenizer \(262 entries\) is not the model"):
        write(language_model, draft=other)
    short = LanguageModel(draft.model, draft.tokenizer, max_length=22)
    with pytest.raises(DataError, match=r"20 are to follow; the draft's context holds 22: shorten"):
        write(language_model, draft=short, **GREEDY)
    with pytest.raises(ConfigError, match="no room for a prompt in the draft's context of 22"):
        write(language_model, draft=short, max_new_tokens=25)
