"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1 and its data script).

Of a row's n tokens, round(0.15 n) are chosen, at least one and at most ``max_predictions``; never a
special token, though these count in n. Of the chosen, 80 % become the mask token, 10 % stay as they
are, 10 % become a token drawn uniformly from the whole vocabulary (special tokens included, as in
the script). Only the chosen are predicted.

Differs from BERT: no next-sentence prediction (RoBERTa, arXiv 1907.11692, section 4.2), no masking
of whole words, and masks are drawn anew in every pass unless ``mask_sets`` says after how many they
repeat (BERT: 10).

Targets are NOT shifted: ``targets[i]`` is what stood at position i. Attention must be bidirectional
within a document, whose positions start at 0; padding is a document of its own.

Tensors: b batch, t sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samara.data.draws import Draws, Purpose
from samara.data.rows import Batch, Rows
from samara.data.tokens import IGNORE_INDEX, IntArray, PackedSequences, TokenShards
from samara.errors import ConfigError, DataError

MASKED_SHARE = 0.8
KEPT_SHARE = 0.1
"""The rest, another 0.1, becomes a random token."""


@dataclass(frozen=True, kw_only=True)
class MaskingRule:
    """What is masked, and with what.

    Attributes:
        mask_token_id: Id of the mask token.
        special_token_ids: Ids that are never chosen.
        vocab_size: Random tokens are drawn from [0, vocab_size).
        fraction: Share of the tokens chosen.
        max_predictions: Most tokens chosen in a row (BERT: 20 of 128); None: no other limit.
    """

    mask_token_id: int
    special_token_ids: tuple[int, ...]
    vocab_size: int
    fraction: float = 0.15
    max_predictions: int | None = None

    def num_predictions(self, num_tokens: int) -> int:
        """Tokens to choose of ``num_tokens``; Python's ``round``, halves to even, as the script."""
        wanted = max(1, round(num_tokens * self.fraction))
        return wanted if self.max_predictions is None else min(self.max_predictions, wanted)


@dataclass(frozen=True, kw_only=True)
class MaskedTokens:
    """A masked row: what the model reads, and what it must say, IGNORE_INDEX elsewhere."""

    inputs: IntArray
    targets: IntArray


def mask_tokens(tokens: IntArray, *, rule: MaskingRule, draws: Draws) -> MaskedTokens:
    """Mask one row.

    Args:
        tokens: The row's tokens (n,), special ones included, padding not.
        rule: What to mask.
        draws: The row's random numbers.
    """
    candidates = np.flatnonzero(~np.isin(tokens, rule.special_token_ids))
    order = draws.permutation(len(candidates))
    chosen = candidates[order[: rule.num_predictions(len(tokens))]]
    lot = draws.uniform(len(chosen))
    random_tokens = draws.integers(len(chosen), below=rule.vocab_size)
    shown = np.where(lot < MASKED_SHARE + KEPT_SHARE, tokens[chosen], random_tokens)
    inputs, targets = tokens.copy(), np.full_like(tokens, IGNORE_INDEX)
    inputs[chosen] = np.where(lot < MASKED_SHARE, rule.mask_token_id, shown)
    targets[chosen] = tokens[chosen]
    return MaskedTokens(inputs=inputs, targets=targets)


# --- rows -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The marks around a text, where there are any: ``[CLS] … [SEP]``, or begin and end of text."""

    first: int | None = None
    last: int | None = None

    @property
    def size(self) -> int:
        return (self.first is not None) + (self.last is not None)


class DocumentRows(Rows):
    """One document a row, framed and padded; one that is too long becomes several rows.

    Beside :class:`PackedSequences`, which wastes nothing, for models that cannot keep packed
    documents apart (Hugging Face's BERT).
    """

    def __init__(
        self, shards: TokenShards, *, sequence_length: int, in_stream: Frame, in_row: Frame
    ) -> None:
        """Lay out a split.

        Args:
            shards: The split.
            sequence_length: Positions of a row, t; the frame is part of it.
            in_stream: The marks that stand around each document in the shards; left off.
            in_row: The marks put around each piece.

        Raises:
            ConfigError: If the frame leaves no room for text.
            DataError: If the split holds no text.
        """
        self.shards, self.sequence_length = shards, sequence_length
        self._in_stream, self._in_row = in_stream, in_row
        self._room = sequence_length - in_row.size
        if self._room < 1:
            raise ConfigError(
                f"data.sequence_length: {sequence_length} leaves no room for text beside "
                f"{in_row.size} marks; set it to {in_row.size + 1} or more"
            )
        lengths = np.diff(shards.document_offsets) - in_stream.size
        self._first_rows = np.concatenate([[0], np.cumsum(-(-lengths // self._room))])
        if not len(self):
            raise DataError(f"{shards.folder / shards.split}: no document holds any text")

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows: ``input_ids``, ``position_ids``, ``document_ids``, int64 (b, t).

        Numbers past the end begin again.
        """
        shape = (len(rows), self.sequence_length)
        input_ids = np.full(shape, self.shards.pad_token_id, dtype=np.int64)
        document_ids = np.full(shape, -1, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        for i, row in enumerate(rows):
            place = int(row) % len(self)
            document = int(np.searchsorted(self._first_rows, place, side="right")) - 1
            tokens = self._piece(document, place - int(self._first_rows[document]))
            input_ids[i, : len(tokens)] = tokens
            document_ids[i, : len(tokens)] = document
            position_ids[i] = _positions(len(tokens), self.sequence_length)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "document_ids": torch.from_numpy(document_ids),
        }

    def _piece(self, document: int, piece: int) -> IntArray:
        start, stop = self.shards.document_offsets[document : document + 2].tolist()
        start += self._in_stream.first is not None
        stop -= self._in_stream.last is not None
        start += piece * self._room
        text = self.shards.read(start, min(start + self._room, stop))
        frame = self._in_row
        before = [] if frame.first is None else [frame.first]
        after = [] if frame.last is None else [frame.last]
        return np.concatenate([before, text, after]).astype(np.int64)


class MaskedRows(Rows):
    """Masked rows of a corpus, packed or one document each.

    Row number i is row ``i % len`` in pass ``i // len``: numbers past the end are the same text
    under other masks. The numbers 0 to ``len - 1`` are a fixed evaluation set.
    """

    def __init__(
        self,
        rows: PackedSequences | DocumentRows,
        *,
        rule: MaskingRule,
        seed: int,
        mask_sets: int | None = None,
    ) -> None:
        """Mask rows.

        Args:
            rows: What to mask.
            rule: How.
            seed: Decides the masks; the same for all models that are to be compared.
            mask_sets: Passes after which masks repeat (BERT: 10); None: never.
        """
        self.rows, self.rule, self.seed, self.mask_sets = rows, rule, seed, mask_sets
        self.sequence_length = rows.sequence_length

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows at once.

        Args:
            rows: Row numbers, b of them; any number from 0.

        Returns:
            int64 tensors (b, t): ``input_ids`` masked; ``targets`` not shifted, IGNORE_INDEX where
            nothing was chosen; ``attention_mask`` 1 on tokens; ``position_ids`` from 0 in each
            document and in the padding; ``document_ids``, -1 on padding.
        """
        places = [divmod(int(number), len(self)) for number in rows]
        plain = self.rows.batch([row for _, row in places])
        input_ids, positions = plain["input_ids"].numpy(), plain["position_ids"].numpy()
        real = plain["document_ids"].numpy() >= 0
        targets = np.full_like(input_ids, IGNORE_INDEX)
        for i, (draw, row) in enumerate(places):
            draw = draw if self.mask_sets is None else draw % self.mask_sets
            size = int(real[i].sum())
            draws = Draws(seed=self.seed, purpose=Purpose.MASKED_LM, draw=draw, row=row)
            masked = mask_tokens(input_ids[i, :size], rule=self.rule, draws=draws)
            input_ids[i, :size], targets[i, :size] = masked.inputs, masked.targets
            # Without document boundaries the positions of padding go on from the text's.
            positions[i, size:] = np.arange(self.sequence_length - size)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "targets": torch.from_numpy(targets),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "position_ids": torch.from_numpy(positions),
            "document_ids": plain["document_ids"],
        }


def _positions(num_tokens: int, length: int) -> IntArray:
    """0, 1, … over the tokens, and again over the padding behind them."""
    return np.concatenate([np.arange(num_tokens), np.arange(length - num_tokens)])
