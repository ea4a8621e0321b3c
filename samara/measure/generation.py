"""Let a model write: several prompts at once, streamed, greedy or drawn, any cache.

A prompt's text does not depend on the prompts beside it. Rows are padded on the left and masked,
and each row draws from random numbers of its own, made from the seed, the prompt and the number of
the token: a token is the argmax of score - log(e), e exponential, which draws from the softmax of
the scores (the Gumbel trick). So drawing is a matter of the scores, and ``transformers`` only ever
takes the likeliest.

Tokens may be guessed ahead and checked by the model in one pass, several at a time: by a smaller
model (speculative decoding, arXiv 2211.17192) or by looking up what followed the same words earlier
in the text. The text is the one that the model writes alone; where it is drawn too, since a draft
draws from the same random numbers at the same place.

Shapes: b batch, v vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from samara.errors import ConfigError, DataError, ResourceError
from samara.measure.language_model import LanguageModel

OnText = Callable[[int, str], None]
"""Called with the number of a prompt and the next piece of its text: prompt after prompt, first
with an empty piece as the prompt's turn comes."""

WINDOW = 16
"""Tokens decoded before a new one, so that it comes out as it does within its text."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to write.

    Attributes:
        max_new_tokens: The most tokens per prompt; the end mark ends a text earlier.
        temperature: Scores are divided by it; 0: always the likeliest token, the rest is ignored
            but the repetition penalty.
        top_p: Draw from the likeliest tokens that have this much probability together.
        top_k: Draw from this many of the likeliest tokens; 0: from all.
        repetition_penalty: Makes tokens that are in the text already less likely; 1: does not
            (CTRL, arXiv 1909.05858, section 4.1).
        seed: Decides the draws.
        cache: ``dynamic`` grows with the text; ``static`` is allocated whole, at once.
        compile: Compile the step of one token; uses a static cache. The first step takes long.
        prompt_lookup: Guess this many tokens at a time by looking them up in the text; 0: none.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    cache: Literal["dynamic", "static"] = "dynamic"
    compile: bool = False
    prompt_lookup: int = 0


def _ignore(index: int, piece: str) -> None:
    """Text that nobody watches."""


def generate_texts(
    language_model: LanguageModel,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    chat: bool = False,
    draft: LanguageModel | None = None,
    on_text: OnText = _ignore,
) -> list[str]:
    """Return what the model writes after each prompt, up to its end mark.

    Args:
        language_model: The model with its tokenizer; its ``batch_size`` prompts run at a time.
        prompts: Where to go on from; an empty one is the start mark.
        settings: How to write.
        chat: A prompt is what a user says; the answer is written by the tokenizer's chat template.
        draft: A smaller model of the same tokenizer that guesses tokens ahead.
        on_text: Gets the text while it is written.

    Raises:
        ConfigError: If ``max_new_tokens`` leaves no room for a prompt, the tokenizer has no chat
            template and one is asked for, or the settings or the model do not go with the draft.
        DataError: If a prompt does not fit into the model's context.
        ResourceError: If compilation is asked for and this machine has no compiler.
    """
    options = _cache_options(settings, language_model.device)
    guessing = _guessing_options(language_model, settings, draft)
    encoded = _encode(language_model, prompts, chat=chat)
    _check_room(language_model, encoded, settings.max_new_tokens)
    if draft is not None:
        _check_room(draft, encoded, settings.max_new_tokens, whose="the draft's")
    texts: list[str] = []
    # Rows would be right about different numbers of guesses.
    batch_size = 1 if guessing else language_model.batch_size
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        streamer = _Streamer(
            language_model.tokenizer,
            encoded[batch],
            end_ids=language_model.end_ids,
            on_text=on_text,
            first=start,
        )
        language_model.generate_ids(
            encoded[batch],
            max_new_tokens=settings.max_new_tokens,
            options={
                "logits_processor": _processors(settings, prompts[batch]),
                "streamer": streamer,
                **options,
                **guessing,
            },
        )
        texts += streamer.texts
    return texts


def _encode(
    language_model: LanguageModel, prompts: Sequence[str], *, chat: bool
) -> list[list[int]]:
    texts = list(prompts)
    if chat:
        tokenizer: Any = language_model.tokenizer
        if tokenizer.chat_template is None:
            raise ConfigError(
                "chat: the model's tokenizer has no chat template; leave chat out, or take a model "
                "that was taught to answer"
            )
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts
        ]
    return [ids or [language_model.prefix_token_id] for ids in language_model.encode(texts)]


def _check_room(
    language_model: LanguageModel,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    whose: str = "the model's",
) -> None:
    context = language_model.max_length
    room = context - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens: {max_new_tokens} leaves no room for a prompt in {whose} "
            f"context of {context} tokens; make it smaller"
        )
    for ids in encoded:
        if len(ids) > room:
            shown = language_model.tokenizer.decode(list(ids[:8]), skip_special_tokens=True)
            mend = "" if len(ids) >= context else f", or max_new_tokens to {context - len(ids)}"
            raise DataError(
                f"prompt {shown!r}…: has {len(ids)} tokens and {max_new_tokens} are to follow; "
                f"{whose} context holds {context}: shorten the prompt{mend}"
            )


def _cache_options(settings: GenerationSettings, device: torch.device) -> dict[str, Any]:
    """What ``model.generate`` wants to be told of cache and compilation."""
    if settings.compile:
        _require_compiler(device)
        # CUDA graphs: a step of a small model is far shorter than the launch of its kernels.
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        config = CompileConfig(fullgraph=True, mode=mode)
        # Unasked, transformers compiles on accelerators only.
        config._compile_all_devices = True  # type: ignore[assignment]
        return {"cache_implementation": "static", "compile_config": config}
    if settings.cache == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    return {}


def _guessing_options(
    language_model: LanguageModel, settings: GenerationSettings, draft: LanguageModel | None
) -> dict[str, Any]:
    """What ``model.generate`` wants to be told of tokens guessed ahead; empty without any."""
    if draft is None and not settings.prompt_lookup:
        return {}
    name = "prompt_lookup" if draft is None else "draft"
    if draft is not None and settings.prompt_lookup:
        raise ConfigError("draft: guesses in place of prompt_lookup; give one of them")
    if settings.compile or settings.cache == "static":
        raise ConfigError(
            f"{name}: wrong guesses are cut off the cache, which a static one does not allow; take "
            "the dynamic cache, and leave compile out"
        )
    if draft is None:
        return {"prompt_lookup_num_tokens": settings.prompt_lookup}
    own, theirs = language_model.tokenizer, draft.tokenizer
    if own.get_vocab() != theirs.get_vocab():
        raise ConfigError(
            f"draft: its tokenizer ({len(theirs)} entries) is not the model's ({len(own)}); take a "
            "draft that was trained on the same tokens"
        )
    return {"assistant_model": draft.model}


def _require_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ResourceError(
            f"compile: needs a C++ compiler, and {compiler} is not there; install one, or leave "
            "compile out"
        )


def _processors(settings: GenerationSettings, prompts: Sequence[str]) -> LogitsProcessorList:
    """What happens to the scores, in order."""
    steps: list[Any] = []
    if settings.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature > 0:
        steps.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            steps.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            steps.append(TopPLogitsWarper(settings.top_p))
        steps.append(RowNoise([_prompt_seed(settings.seed, prompt) for prompt in prompts]))
    return LogitsProcessorList(steps)


class RowNoise(LogitsProcessor):
    """Gumbel noise on the scores, the same for equal seeds at the same place of the text.

    It knows its place from the length of what it is given, so a guess that was wrong takes no
    random numbers away from the tokens that come in its stead.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.generator = torch.Generator()
        self.prompt_length: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        number = input_ids.shape[1] - self.prompt_length
        drawn_bv = torch.stack([self._draw(seed, number, scores.shape[-1]) for seed in self.seeds])
        return scores - drawn_bv.to(scores.device).log()

    def _draw(self, seed: int, number: int, vocab_size: int) -> Tensor:
        self.generator.manual_seed(_seed(f"{seed}\0{number}"))
        return torch.empty(vocab_size).exponential_(generator=self.generator)


def _prompt_seed(seed: int, prompt: str) -> int:
    return _seed(f"{seed}\0{prompt}")


def _seed(text: str) -> int:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits and a sign


class _Row:
    """The text of one prompt as it grows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], end_ids: Sequence[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.window = list(prompt[-WINDOW:])
        self.num_shown = len(self._decode())
        self.text = ""
        self.pending = ""
        self.is_finished = False

    def add(self, token: int) -> None:
        """Take the next token; what follows the end mark is padding."""
        if self.is_finished:
            return
        if token in self.end_ids:
            self.finish()
            return
        self.window.append(token)
        if not self._decode().endswith("\ufffd"):  # else a character lacks bytes
            self._show()
            self.window = self.window[-WINDOW:]
            self.num_shown = len(self._decode())

    def finish(self) -> None:
        if not self.is_finished:
            self._show()
            self.is_finished = True

    def _show(self) -> None:
        piece = self._decode()[self.num_shown :]
        self.text += piece
        self.pending += piece

    def _decode(self) -> str:
        decoded = self.tokenizer.decode(
            self.window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(decoded, str)
        return decoded


class _Streamer(BaseStreamer):
    """Takes the tokens of all rows step by step and passes text on row after row.

    The first unfinished row is passed on as it grows; the rows behind it wait.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        *,
        end_ids: Sequence[int],
        on_text: OnText,
        first: int,
    ) -> None:
        self.rows = [_Row(tokenizer, prompt, end_ids) for prompt in prompts]
        self.on_text = on_text
        self.first = first
        self.current = -1

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self.rows]

    def put(self, value: Tensor) -> None:
        """Take the prompts (b, t) first, then a token of each row (b,) or some of one (1, n)."""
        if self.current < 0:
            self._open_next()
            return
        for row, tokens in zip(self.rows, value.view(len(self.rows), -1).tolist(), strict=True):
            for token in tokens:
                row.add(token)
        self._pass_on()

    def end(self) -> None:
        """All rows have their last token."""
        for row in self.rows:
            row.finish()
        self._pass_on()

    def _open_next(self) -> None:
        self.current += 1
        if self.current < len(self.rows):
            self.on_text(self.first + self.current, "")

    def _pass_on(self) -> None:
        while self.current < len(self.rows):
            row = self.rows[self.current]
            if row.pending:
                piece, row.pending = row.pending, ""
                self.on_text(self.first + self.current, piece)
            if not row.is_finished:
                return
            self._open_next()
