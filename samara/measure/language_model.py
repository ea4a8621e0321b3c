"""One way to ask any causal language model: how likely is this text, and how does it go on?

Three requests, the same as the lm-evaluation-harness's, so that its tasks and ours see one model:
:meth:`LanguageModel.loglikelihood`, :meth:`~LanguageModel.loglikelihood_rolling` and
:meth:`~LanguageModel.generate_until`. Token boundaries are drawn as the harness draws them: the
white space that ends a context belongs to the continuation, context and continuation are encoded
together, and what the context alone does not cover is the continuation. Where that leaves the
continuation without a token of its own (a merge across the boundary), it is encoded by itself; the
harness stops there.

Requests are sorted by length and padded: on the right to be scored, where causality hides the
padding from every real position, so that no mask is needed; on the left, with a mask, to be
generated from. Equal inputs are run once: the four letters of a multiple-choice question cost one
pass. Results come in the order of the requests and depend on the batch size by rounding only.

Shapes: b batch, t positions, k positions whose logits are kept, v vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from samara.errors import ConfigError, DataError

Progress = Callable[[int], None]

LOGIT_ELEMENTS = 2**27
"""Logits of one batch: 512 MiB in float32. A batch is cut smaller where it would need more."""

BLOCK, TEXT_BLOCK = 4096, 64
"""Requests (texts) encoded and sorted together: bounds the memory of a large task."""

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
DEFAULT_LENGTH = 2048
UNSET_LENGTH = 10**9
"""A tokenizer that knows no limit reports more than this."""


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """How likely a continuation is after its context.

    Attributes:
        loglikelihood: Summed log-probability of its tokens, in nats.
        is_greedy: Whether each of its tokens is the likeliest.
        num_tokens: Tokens summed over.
        is_truncated: Whether the context lost its beginning to fit into the model.
    """

    loglikelihood: float
    is_greedy: bool
    num_tokens: int
    is_truncated: bool


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """How likely a whole text is: summed log-probability in nats, and tokens summed over."""

    loglikelihood: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Text that the model wrote, without the stop text, and whether its prompt was truncated."""

    text: str
    is_truncated: bool


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """Token ids of a context (at least one) and of its continuation (at least one)."""

    context: Sequence[int]
    continuation: Sequence[int]


def _ignore(done: int) -> None:
    """Progress that nobody watches."""


def _shifted(on_progress: Progress, before: int) -> Progress:
    """Progress of one block among several."""
    return lambda done: on_progress(before + done)


class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: The model; put into evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Rows at a time.
        max_length: Tokens the model can attend to.
        prefix_token_id: What stands before a text without a context: the start mark, else the end
            mark.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: Any causal language model of ``transformers``, on its device.
            tokenizer: Its tokenizer.
            batch_size: Rows at a time.
            max_length: Left out: as the model's configuration says.

        Raises:
            ConfigError: If the tokenizer has neither a start nor an end mark.
        """
        self.model = model
        self.model.train(False)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or context_length(model, tokenizer)
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        prefix = next((mark for mark in marks if mark is not None), None)
        if prefix is None:
            raise ConfigError(
                "tokenizer: names neither bos_token nor eos_token, so the first token of a text "
                "has nothing to follow; name one of them in tokenizer_config.json"
            )
        self.prefix_token_id: int = prefix
        # A prompt starts the way the tokenizer starts a text; whatever it appends is left out.
        self._starts_marked = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._can_keep_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    # --- text to tokens ----------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that start a prompt: with the start mark if the tokenizer gives it."""
        distinct = list(dict.fromkeys(texts))  # the choices of a question share their context
        encoded = [list(ids) for ids in self._encode_plain(distinct)]
        if self._starts_marked:
            mark = self.tokenizer.bos_token_id
            encoded = [ids if ids[:1] == [mark] else [mark, *ids] for ids in encoded]
        by_text = dict(zip(distinct, encoded, strict=True))
        return [by_text[text] for text in texts]

    def encode_pairs(
        self, contexts: Sequence[str], continuations: Sequence[str]
    ) -> list[EncodedPair]:
        """Token ids of contexts and continuations; an empty context is the start mark.

        Raises:
            DataError: If a continuation is empty.
        """
        moved = [
            _move_white_space(context, continuation)
            for context, continuation in zip(contexts, continuations, strict=True)
        ]
        wholes = self.encode([context + continuation for context, continuation in moved])
        heads = self.encode([context for context, _ in moved])
        alone = self._encode_plain([continuation for _, continuation in moved])
        return [
            self._pair(context, whole, head, list(own))
            for (context, _), whole, head, own in zip(moved, wholes, heads, alone, strict=True)
        ]

    def _pair(self, context: str, whole: list[int], head: list[int], own: list[int]) -> EncodedPair:
        if not own:
            raise DataError(f"a continuation of {context[-40:]!r} is empty: nothing to score")
        if context:
            head = head or [self.prefix_token_id]  # of characters the tokenizer drops
            return EncodedPair(context=head, continuation=whole[len(head) :] or own)
        if own[0] == self.prefix_token_id and len(own) > 1:
            return EncodedPair(context=own[:1], continuation=own[1:])
        return EncodedPair(context=[self.prefix_token_id], continuation=own)

    def _encode_plain(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        if not texts:
            return []
        ids: Sequence[Sequence[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, verbose=False
        )["input_ids"]
        return ids

    # --- how likely --------------------------------------------------------------------------

    def loglikelihood(
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        *,
        on_progress: Progress = _ignore,
    ) -> list[ContinuationScore]:
        """Score each continuation after its context.

        A context too long for the model loses its beginning; the score says so.

        Args:
            contexts: What comes before; may be empty.
            continuations: What is scored, one for each context; not empty.
            on_progress: Called with the number of requests done.

        Raises:
            DataError: If a continuation is empty, or by itself longer than the model's context.
        """
        scores: list[ContinuationScore] = []
        for start in range(0, len(contexts), BLOCK):
            block = slice(start, start + BLOCK)
            pairs = self.encode_pairs(contexts[block], continuations[block])
            scores += self.score_pairs(pairs, on_progress=_shifted(on_progress, start))
        return scores

    def loglikelihood_rolling(
        self, texts: Sequence[str], *, on_progress: Progress = _ignore
    ) -> list[TextScore]:
        """Score whole texts, of any length, each token once; the first follows the start mark.

        A text longer than the model's context is cut into windows as the harness cuts it: each but
        the last predicts a full window from the one token before it, the last one is moved back so
        that it is full too.

        Args:
            texts: What is scored; an empty one scores 0.
            on_progress: Called with the number of texts done.
        """
        results: list[TextScore] = []
        for start in range(0, len(texts), TEXT_BLOCK):
            encoded = self._encode_plain(texts[start : start + TEXT_BLOCK])
            windows = [
                list(_windows(list(ids), self.prefix_token_id, self.max_length)) for ids in encoded
            ]
            scores = iter(self.score_pairs([pair for own in windows for pair in own]))
            for own in windows:
                parts = [next(scores) for _ in own]
                results.append(
                    TextScore(
                        loglikelihood=sum(part.loglikelihood for part in parts),
                        num_tokens=sum(part.num_tokens for part in parts),
                    )
                )
            on_progress(len(results))
        return results

    @torch.no_grad()
    def score_pairs(
        self, pairs: Sequence[EncodedPair], *, on_progress: Progress = _ignore
    ) -> list[ContinuationScore]:
        """:meth:`loglikelihood` of token ids."""
        requests: dict[tuple[int, ...], list[int]] = {}  # model input -> who asks for it
        for index, pair in enumerate(pairs):
            requests.setdefault(self._model_input(pair), []).append(index)
        scores: dict[int, ContinuationScore] = {}
        starts = {
            row: len(row) - max(len(pairs[index].continuation) for index in indices)
            for row, indices in requests.items()
        }
        for rows in self._batches(starts):
            first = min(starts[row] for row in rows)
            logits_bkv = self._logits(rows, first=first)
            for row, logits_kv in zip(rows, logits_bkv, strict=True):
                log_p_kv = _log_softmax(logits_kv[starts[row] - first : len(row) - first])
                for index in requests[row]:
                    scores[index] = self._score(pairs[index], log_p_kv)
            on_progress(len(scores))
        return [scores[index] for index in range(len(pairs))]

    def _model_input(self, pair: EncodedPair) -> tuple[int, ...]:
        """What the model reads: all tokens but the last, the newest ``max_length`` of them."""
        if len(pair.continuation) > self.max_length:
            shown = self.tokenizer.decode(list(pair.continuation[:12]))
            raise DataError(
                f"the continuation {shown!r}… has {len(pair.continuation)} tokens, the model's "
                f"context holds {self.max_length}, so it cannot be scored; shorten it"
            )
        tokens = (*pair.context, *pair.continuation)
        return tokens[-(self.max_length + 1) : -1]

    def _score(self, pair: EncodedPair, log_p_kv: Tensor) -> ContinuationScore:
        length = len(pair.continuation)
        log_p_kv = log_p_kv[-length:]
        targets_k = torch.tensor(pair.continuation, device=log_p_kv.device)
        chosen_k = log_p_kv.gather(1, targets_k[:, None])[:, 0]
        return ContinuationScore(
            loglikelihood=float(chosen_k.sum(dtype=torch.float64)),
            is_greedy=bool((log_p_kv.argmax(dim=-1) == targets_k).all()),
            num_tokens=length,
            is_truncated=len(pair.context) + length > self.max_length + 1,
        )

    def _batches(self, starts: Mapping[tuple[int, ...], int]) -> Iterator[list[tuple[int, ...]]]:
        """Rows by falling length (the costliest first), cut by number and by size of the logits."""
        vocab_size = self.model.config.get_text_config().vocab_size
        batch: list[tuple[int, ...]] = []
        first = 0
        for row in sorted(starts, key=lambda row: (-len(row), row)):
            new_first = min(first, starts[row]) if batch else starts[row]
            longest = len(batch[0]) if batch else len(row)
            elements = (len(batch) + 1) * (longest - new_first) * vocab_size
            if batch and (len(batch) == self.batch_size or elements > LOGIT_ELEMENTS):
                yield batch
                batch, new_first = [], starts[row]
            batch.append(row)
            first = new_first
        if batch:
            yield batch

    def _logits(self, rows: Sequence[tuple[int, ...]], *, first: int) -> Tensor:
        """Logits (b, k, v) of the positions from ``first`` on; rows are padded on the right."""
        length = max(len(row) for row in rows)
        padded = [[*row, *([self.prefix_token_id] * (length - len(row)))] for row in rows]
        input_ids = torch.tensor(padded, device=self.device)
        kept = torch.arange(first, length, device=self.device)
        options = {"logits_to_keep": kept} if self._can_keep_logits else {}
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **options).logits
        return logits if self._can_keep_logits else logits[:, first:]

    # --- how it goes on ----------------------------------------------------------------------

    def generate_until(
        self,
        contexts: Sequence[str],
        *,
        stop: Sequence[str] = (),
        max_new_tokens: int,
        options: Mapping[str, Any] | None = None,
        on_progress: Progress = _ignore,
    ) -> list[Generation]:
        """Let the model go on after each context, greedily, up to a stop text or its end mark.

        A context that leaves no room for the new tokens loses its beginning; the result says so.

        Args:
            contexts: The prompts.
            stop: Texts that end the answer; they are not part of it.
            max_new_tokens: The most tokens to write.
            options: More options for ``model.generate``, as ``do_sample``.
            on_progress: Called with the number of requests done.

        Raises:
            ConfigError: If ``max_new_tokens`` leaves no room for a prompt.
        """
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's "
                f"context of {self.max_length} tokens; make it smaller"
            )
        encoded = [ids or [self.prefix_token_id] for ids in self.encode(contexts)]
        order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index))
        texts: dict[int, str] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            prompts = [encoded[index][-room:] for index in batch]
            written = self._generate(prompts, stop, max_new_tokens, options or {})
            texts |= dict(zip(batch, written, strict=True))
            on_progress(len(texts))
        return [
            Generation(text=texts[index], is_truncated=len(ids) > room)
            for index, ids in enumerate(encoded)
        ]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        max_new_tokens: int,
        options: Mapping[str, Any],
    ) -> list[str]:
        if stop:
            length = max(len(prompt) for prompt in prompts)
            criteria = StoppingCriteriaList([_StopText(self.tokenizer, stop, length)])
            options = {"stopping_criteria": criteria, **options}
        written = self.generate_ids(prompts, max_new_tokens=max_new_tokens, options=options)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [cut_at(text, stop) for text in texts]

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        options: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """The tokens after each prompt, before the end mark; greedy unless the options say else.

        Args:
            prompts: Token ids, at least one each; they run as one batch.
            max_new_tokens: The most tokens to write.
            options: More options for ``model.generate``.
        """
        length = max(len(prompt) for prompt in prompts)
        padding = [length - len(prompt) for prompt in prompts]
        # Padding is masked. A row's own token adds none that a repetition penalty would see.
        rows = [
            [prompt[0]] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)
        ]
        mask = [[0] * pad + [1] * (length - pad) for pad in padding]
        own_settings = self.model.generation_config
        end_ids = self.end_ids
        # The model's own taste (temperature, penalties …) is no part of a measurement.
        self.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=end_ids or None, pad_token_id=self.prefix_token_id
        )
        try:
            output = self.model.generate(  # type: ignore[operator] # typed as a Tensor
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                **{"max_new_tokens": max_new_tokens, "do_sample": False, **(options or {})},
            )
        finally:
            self.model.generation_config = own_settings
        return [_until(ids, end_ids) for ids in output[:, length:].tolist()]

    @property
    def end_ids(self) -> list[int]:
        """The end marks of the model and of the tokenizer."""
        named = self.model.generation_config.eos_token_id
        ends = set(named if isinstance(named, list) else [named]) | {self.tokenizer.eos_token_id}
        return sorted(end for end in ends if end is not None)


class _StopText(StoppingCriteria):
    """Ends each row once its new text holds one of the stop texts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_length = prompt_length
        # A token is at least a byte. What a longer token hides is found when the text is cut.
        self.window = max(len(text.encode()) for text in stop) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        del scores, unused
        newest = input_ids[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [text.index(end) for end in stop if end in text]
    return text[: min(ends)] if ends else text


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first end mark."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _move_white_space(context: str, continuation: str) -> tuple[str, str]:
    """Give the white space that ends the context to the continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _windows(ids: list[int], prefix: int, size: int) -> Iterator[EncodedPair]:
    """Cut a text so that each token is predicted once, from as full a context as may be."""
    done = min(size, len(ids))
    if done:
        yield EncodedPair(context=[prefix], continuation=ids[:done])
    while done < len(ids):
        stop = min(done + size, len(ids))
        yield EncodedPair(context=ids[stop - size - 1 : done], continuation=ids[done:stop])
        done = stop


def _log_softmax(logits_kv: Tensor) -> Tensor:
    exact = logits_kv.dtype if logits_kv.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_kv, dim=-1, dtype=exact)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a model can attend to: as its configuration says, else its tokenizer."""
    fields = model.config.get_text_config().to_dict()
    for key in LENGTH_KEYS:
        if fields.get(key):
            return int(fields[key])
    known = tokenizer.model_max_length < UNSET_LENGTH
    return int(tokenizer.model_max_length) if known else DEFAULT_LENGTH
