"""Instruction tuning's rows: conversations as tokens, with a loss on the answers only.

A conversation is rendered by the tokenizer's chat template and tokenised as one text, exactly as
``apply_chat_template`` does for inference. What the assistant says, end mark included, is found in
the text by rendering the turns one by one; only the tokens in there are targets.

Rows hold whole conversations, kept apart like packed documents. One that is too long for a row is
shortened where it costs least (:func:`shorten`); at least one target always remains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from samara.data.chat_records import Conversation, Message
from samara.data.chat_template import TAGS, TEMPLATE_FILE
from samara.data.rows import Batch, Rows
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX, IntArray
from samara.errors import DataError

ENCODE_CONVERSATIONS = 512
"""Conversations tokenised at once."""


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """A conversation as tokens, up to the end of its last answer.

    Attributes:
        tokens: (n,) ids.
        is_answer: (n,) True on what the assistant says, end mark included; on the last token too.
    """

    tokens: IntArray
    is_answer: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


class ChatEncoder:
    """Conversations to tokens, by a tokenizer folder with a chat template."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            DataError: If it is no tokenizer folder, or has no chat template.
        """
        from transformers import PreTrainedTokenizerFast

        TextTokenizer.load(folder)  # for its errors
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{folder}: the tokenizer has no chat template ({TEMPLATE_FILE}); make a copy with "
                "samara.data.chat_template.save_with_chat_template"
            )
        added = self._tokenizer.added_tokens_decoder.values()
        self._marks = (*TAGS, *(token.content for token in added if token.special))
        pads = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        self.pad_token_id: int = next((pad for pad in pads if pad is not None), 0)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, marks spelled out.

        A mark or role tag that a content spells is broken up by a space, so that no record can
        end a turn or begin one.

        Raises:
            DataError: If the template refuses the conversation.
        """
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": self._without_marks(m.content)} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
        """Tokens of conversations, each ending with an answer.

        Raises:
            DataError: If the chat template refuses one, changes earlier turns when one is added, or
                leaves no token of an answer.
        """
        texts, spans = [], []
        for conversation in conversations:
            try:
                texts.append(self.render(conversation.messages))
                spans.append(self._answer_spans(conversation.messages, texts[-1]))
            except DataError as error:
                raise DataError(f"{conversation.origin}: {error}") from error
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        results = []
        for i, conversation in enumerate(conversations):
            starts = np.array([start for start, _ in encoded["offset_mapping"][i]], dtype=np.int64)
            is_answer = np.zeros(len(starts), dtype=np.bool_)
            for first, end in spans[i]:
                is_answer |= (starts >= first) & (starts < end)
            if not is_answer[1:].any():
                raise DataError(
                    f"{conversation.origin}: the chat template leaves no token of the answer"
                )
            size = int(np.flatnonzero(is_answer)[-1]) + 1
            tokens = np.array(encoded["input_ids"][i][:size], dtype=np.int64)
            results.append(EncodedConversation(tokens=tokens, is_answer=is_answer[:size]))
        return results

    def _without_marks(self, content: str) -> str:
        for mark in self._marks:
            if mark in content:
                content = content.replace(mark, f"{mark[:1]} {mark[1:]}")
        return content

    def _answer_spans(self, messages: Sequence[Message], whole: str) -> list[tuple[int, int]]:
        """Start and end in ``whole`` of each answer with its end mark."""
        spans = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = self.render(messages[: i + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    "the chat template writes earlier turns differently when a turn is added, so "
                    "answers cannot be told from prompts; use another template"
                )
            spans.append((len(before), len(after.rstrip())))
        return spans


def shorten(conversation: EncodedConversation, *, limit: int) -> EncodedConversation:
    """Cut a conversation to ``limit`` tokens, at least 2, so that a target remains.

    First comes off what follows the limit. If that would take the first answer, or more of it than
    half the limit leaves room for, the middle of what stands before it comes off too: a question is
    mostly asked at the beginning or at the end of a prompt.
    """
    if len(conversation) <= limit:
        return conversation
    tokens, is_answer = conversation.tokens, conversation.is_answer
    first = 1 + int(np.argmax(is_answer[1:]))  # nothing predicts a row's first token
    following = np.flatnonzero(~is_answer[first:])
    answer = int(following[0]) if len(following) else len(tokens) - first
    room = limit - min(answer, limit // 2)
    if first > room:
        head = (room + 1) // 2
        kept = np.concatenate([np.arange(head), np.arange(first - (room - head), len(tokens))])
        tokens, is_answer = tokens[kept], is_answer[kept]
    size = int(np.flatnonzero(is_answer[:limit])[-1]) + 1
    return EncodedConversation(tokens=tokens[:size], is_answer=is_answer[:size])


# --- rows -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChatStatistics:
    """What became of the conversations.

    Attributes:
        conversations: How many there are.
        shortened: How many of them were too long for a row.
        lost_answer_tokens: Answer tokens that shortening took.
        targets: Tokens that are predicted, in all rows.
        padding: Input positions that hold no token, in all rows.
    """

    conversations: int
    shortened: int
    lost_answer_tokens: int
    targets: int
    padding: int


class ChatRows(Rows):
    """Conversations packed whole into rows, the longest first, each where it fits best."""

    def __init__(
        self,
        conversations: Iterable[Conversation],
        encoder: ChatEncoder,
        *,
        sequence_length: int,
        too_long: Literal["shorten", "refuse"] = "shorten",
    ) -> None:
        """Tokenise and pack.

        Args:
            conversations: Read once, never held whole as text.
            encoder: Gives their tokens.
            sequence_length: Inputs of a row, t.
            too_long: What becomes of a conversation that is too long for a row.

        Raises:
            DataError: If there is no conversation, or one cannot be encoded or is refused.
        """
        self.sequence_length, self._pad_token_id = sequence_length, encoder.pad_token_id
        self._conversations: list[EncodedConversation] = []
        shortened = lost = 0
        iterator = iter(conversations)
        while group := list(itertools.islice(iterator, ENCODE_CONVERSATIONS)):
            for conversation, whole in zip(group, encoder.encode(group), strict=True):
                kept = shorten(whole, limit=sequence_length + 1)
                if kept is not whole and too_long == "refuse":
                    raise DataError(
                        f"{conversation.origin}: the conversation has {len(whole)} tokens, more "
                        f"than data.sequence_length {sequence_length} and one; raise it, remove "
                        "the record, or set data.too_long: shorten"
                    )
                shortened += kept is not whole
                lost += int(whole.is_answer.sum() - kept.is_answer.sum())
                self._conversations.append(kept)
        if not self._conversations:
            raise DataError("data: no conversation with an answer is left to train on")
        # The last token of a conversation is a target only: it takes no input position.
        sizes = [len(conversation) - 1 for conversation in self._conversations]
        self._rows = pack(sizes, capacity=sequence_length)
        self.statistics = ChatStatistics(
            conversations=len(sizes),
            shortened=shortened,
            lost_answer_tokens=lost,
            targets=sum(int(c.is_answer[1:].sum()) for c in self._conversations),
            padding=len(self._rows) * sequence_length - sum(sizes),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows at once, in the form of ``PackedSequences.batch``.

        ``document_ids`` is the conversation's number, -1 on padding.

        Args:
            rows: Row numbers, b of them; numbers past the end begin again.
        """
        shape = (len(rows), self.sequence_length)
        input_ids = np.full(shape, self._pad_token_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        document_ids = np.full(shape, -1, dtype=np.int64)
        for i, row in enumerate(rows):
            start = 0
            for number in self._rows[int(row) % len(self)]:
                conversation = self._conversations[number]
                stop = start + len(conversation) - 1
                tokens, counted = conversation.tokens[1:], conversation.is_answer[1:]
                input_ids[i, start:stop] = conversation.tokens[:-1]
                targets[i, start:stop] = np.where(counted, tokens, IGNORE_INDEX)
                position_ids[i, start:stop] = np.arange(stop - start)
                document_ids[i, start:stop] = number
                start = stop
            position_ids[i, start:] = np.arange(self.sequence_length - start)
        arrays = {
            "input_ids": input_ids,
            "targets": targets,
            "position_ids": position_ids,
            "document_ids": document_ids,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing.

    Args:
        sizes: Of the items, each from 1 to ``capacity``.
        capacity: Of a bin.

    Returns:
        The items (as indices) of each bin; no more than about 11/9 of the fewest bins possible.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where some bin has exactly s free: finds the best fit in a few steps
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = sizes[item]
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            target = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, target = capacity, len(bins)
            bins.append([])
        bins[target].append(item)
        by_space[space - size].append(target)
        spaces |= 1 << (space - size)
    return bins
