"""UL2's mixture of denoisers (arXiv 2205.05131, section 3.1, table 1) for a prefix-LM decoder.

A row is one piece of text under one of seven denoisers. Some spans of it are taken out, each
replaced by a sentinel of its own; the model reads what is left and writes the spans:

    [mode] w w <0> w w w <1>   <0> w w <1> w [eos]
    `-------- prefix -------'  `---- targets ----'

Attention is bidirectional within the prefix and causal after it; only the targets are predicted.
The mode token says what kind of denoiser it is: R (regular), S (sequential: the end of the text) or
X (extreme: long spans or many).

Span lengths follow the code of T5 (arXiv 1910.10683): counts are fixed by length and denoiser, and
text and noise are each cut into that many non-empty parts, all cuts equally likely. Differs from
it: of R and X, a lone span is put anywhere with equal chance instead of always at the end, where it
would be a second S; and there are never more spans than noise or kept tokens.

Each denoiser gets the longest text that fits a row: no target is ever cut off, little is padded.
One pass reads the stream once (but a lone last token), in pieces of those lengths, across documents
as T5 does; their marks stay in the text. Each denoiser has exactly its share of the rows, in random
order.

Tensors: b batch, t sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from samara.data.draws import Draws, Purpose
from samara.data.rows import Batch, Rows
from samara.data.tokens import IGNORE_INDEX, IntArray, TokenShards
from samara.errors import ConfigError, DataError

Mode = Literal["R", "S", "X"]

MODE_TOKENS: dict[Mode, str] = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """How much of a text is taken out, in spans of what mean length.

    Attributes:
        mode: R, S or X.
        corruption: Share of the tokens taken out, r.
        mean_span: Mean length of a span, mu; None: one span at the end, mu = length / 4.
    """

    mode: Mode
    corruption: float
    mean_span: float | None

    def counts(self, length: int) -> Counts:
        """Tokens and spans taken out of ``length`` tokens, at least 2; as T5 counts them."""
        noise = min(max(round(length * self.corruption), 1), length - 1)
        mean_span = length / 4 if self.mean_span is None else self.mean_span
        spans = max(1, round(noise / mean_span))
        return Counts(noise=noise, spans=min(spans, noise, length - noise))

    def row_size(self, length: int) -> int:
        """Tokens of a row made of ``length`` of text: mode, prefix, targets and end mark."""
        return length + 2 * self.counts(length).spans + 2

    def text_length(self, row_size: int) -> int:
        """The longest text whose row has at most ``row_size`` tokens; 0 if none of 2 or more."""
        lengths = range(row_size, 1, -1)
        return next((length for length in lengths if self.row_size(length) <= row_size), 0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Tokens taken out, and in how many spans."""

    noise: int
    spans: int


DENOISERS: dict[str, Denoiser] = {
    "R-3-0.15": Denoiser(mode="R", mean_span=3, corruption=0.15),
    "R-8-0.15": Denoiser(mode="R", mean_span=8, corruption=0.15),
    "S-0.25": Denoiser(mode="S", mean_span=None, corruption=0.25),
    "X-3-0.5": Denoiser(mode="X", mean_span=3, corruption=0.5),
    "X-8-0.5": Denoiser(mode="X", mean_span=8, corruption=0.5),
    "X-64-0.15": Denoiser(mode="X", mean_span=64, corruption=0.15),
    "X-64-0.5": Denoiser(mode="X", mean_span=64, corruption=0.5),
}
"""The seven: mode, mean span, corruption. Their order is that of ``denoiser_ids``."""


# --- one text ---------------------------------------------------------------------------------


def noise_mask(length: int, denoiser: Denoiser, draws: Draws) -> BoolArray:
    """Which of ``length`` tokens (at least 2) are taken out; True: taken out."""
    counts = denoiser.counts(length)
    kept = length - counts.noise
    if counts.spans == 1 and denoiser.mode != "S":
        before = int(draws.integers(1, below=kept + 1)[0])
        runs = np.array([before, counts.noise, kept - before])
    else:
        runs = np.empty(2 * counts.spans, dtype=np.int64)
        runs[0::2] = _random_parts(kept, counts.spans, draws)
        runs[1::2] = _random_parts(counts.noise, counts.spans, draws)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _random_parts(total: int, parts: int, draws: Draws) -> IntArray:
    """Cut ``total`` into non-empty parts; all ways to do so are equally likely."""
    cuts = draws.subset(parts - 1, of=total - 1) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """A text with spans taken out: what is left, and the spans, with the sentinels in both."""

    prefix: IntArray
    targets: IntArray


def take_out(tokens: IntArray, mask: BoolArray, sentinels: IntArray) -> Denoising:
    """Take spans out of a text; sentinel i stands for the i-th span from the left.

    Args:
        tokens: The text.
        mask: True on the spans.
        sentinels: Ids, at least as many as spans.
    """
    before = np.concatenate([[False], mask[:-1]])
    starts = mask & ~before
    used = sentinels[: int(starts.sum())]
    prefix = tokens.copy()
    prefix[starts] = used
    return Denoising(
        prefix=prefix[~mask | starts],
        targets=np.insert(tokens[mask], np.flatnonzero(starts[mask]), used),
    )


# --- special tokens ---------------------------------------------------------------------------


def num_sentinels(sequence_length: int) -> int:
    """Sentinels that rows of ``sequence_length`` inputs can need."""
    size = sequence_length + 1
    lengths = [(d, d.text_length(size)) for d in DENOISERS.values()]
    return max((d.counts(length).spans for d, length in lengths if length), default=0)


def ul2_tokens(sequence_length: int) -> tuple[str, ...]:
    """Spellings of the mode tokens and of the sentinels, the latter as T5 spells them."""
    sentinels = (f"<extra_id_{i}>" for i in range(num_sentinels(sequence_length)))
    return (*MODE_TOKENS.values(), *sentinels)


@dataclass(frozen=True, kw_only=True)
class UL2Ids:
    """Ids of the tokens that rows are built with.

    Attributes:
        modes: Of each mode.
        sentinels: In the order of the spans they stand for.
        end: Closes the targets.
    """

    modes: Mapping[Mode, int]
    sentinels: tuple[int, ...]
    end: int


# --- rows -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """One pass over the stream: where each row's text starts and ends, and its denoiser."""

    bounds: IntArray  # (rows + 1,)
    denoisers: IntArray  # (rows,)


class DenoisingRows(Rows):
    """Rows of the seven denoisers.

    Row number i is row ``i % len`` of pass ``i // len``; every pass reads all text under another
    assignment of denoisers and other spans. The numbers 0 to ``len - 1`` are a fixed evaluation
    set.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        ids: UL2Ids,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Lay out a split.

        Args:
            shards: The split.
            sequence_length: Inputs of a row, t.
            ids: The tokens that rows are built with.
            seed: Decides denoisers and spans; the same for all models that are to be compared.
            weights: Relative share of the rows by name of :data:`DENOISERS`; one that is left out
                is not used. None: equal shares.

        Raises:
            ConfigError: If a row is too short, or there are too few sentinels.
            DataError: If the split holds fewer than two tokens.
        """
        self.shards, self.sequence_length, self.seed = shards, sequence_length, seed
        self._ids, self._sentinels = ids, np.asarray(ids.sentinels, dtype=np.int64)
        self._denoisers = tuple(DENOISERS.values())
        self._lengths = np.array([d.text_length(sequence_length + 1) for d in self._denoisers])
        if not self._lengths.all():
            raise ConfigError(
                f"data.sequence_length: {sequence_length} is too short for UL2; set it to "
                f"{_shortest()} or more"
            )
        if len(ids.sentinels) < num_sentinels(sequence_length):
            raise ConfigError(
                f"UL2 with data.sequence_length {sequence_length} needs "
                f"{num_sentinels(sequence_length)} sentinels, the tokenizer has "
                f"{len(ids.sentinels)}; extend it with samara.data.ul2.ul2_tokens"
            )
        if shards.num_tokens < 2:
            raise DataError(
                f"{shards.folder / shards.split}: {shards.num_tokens} tokens, too few to take any "
                "out; give more text"
            )
        self._quota, self._last = self._apportion(_shares(weights))
        self._layouts: dict[int, _Layout] = {}

    def _apportion(self, shares: npt.NDArray[np.float64]) -> tuple[IntArray, int]:
        """Rows of each denoiser, and the denoiser of one more row for the text that is left.

        Every pass has the same counts, so it has the same number of rows and reads the same text.
        """
        rows = self.shards.num_tokens // float(shares @ self._lengths)
        quota = np.floor(rows * shares).astype(np.int64)
        while True:
            left = self.shards.num_tokens - int(quota @ self._lengths)
            behind = int(np.argmax(shares * (quota.sum() + 1) - quota))
            if left <= self._lengths[behind]:
                return quota, behind
            quota[behind] += 1

    def __len__(self) -> int:
        left = self.shards.num_tokens - int(self._quota @ self._lengths)
        return int(self._quota.sum()) + (left >= 2)  # of a single token nothing can be taken out

    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows at once.

        Args:
            rows: Row numbers, b of them; any number from 0.

        Returns:
            int64 tensors. (b, t): ``input_ids``; ``targets``, shifted, IGNORE_INDEX on prefix and
            padding; ``position_ids``, from 0 in the row and again in its padding. (b,):
            ``prefix_length``, positions of ``input_ids`` that see each other both ways;
            ``denoiser_ids``, index into :data:`DENOISERS`.
        """
        shape = (len(rows), self.sequence_length)
        input_ids = np.full(shape, self.shards.pad_token_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        prefix_length = np.empty(len(rows), dtype=np.int64)
        denoiser_ids = np.empty(len(rows), dtype=np.int64)
        for i, number in enumerate(rows):
            draw, row = divmod(int(number), len(self))
            denoiser_ids[i] = self._layout(draw).denoisers[row]
            parts = self._denoised(draw, row)
            prefix_length[i] = 1 + len(parts.prefix)
            mode = self._ids.modes[self._denoisers[denoiser_ids[i]].mode]
            whole = np.concatenate([[mode], parts.prefix, parts.targets, [self._ids.end]])
            size = len(whole) - 1
            assert size <= self.sequence_length, "no target is ever cut off"
            input_ids[i, :size] = whole[:-1]
            targets[i, prefix_length[i] - 1 : size] = whole[prefix_length[i] :]
            position_ids[i, :size] = np.arange(size)
            position_ids[i, size:] = np.arange(self.sequence_length - size)
        arrays = {
            "input_ids": input_ids,
            "targets": targets,
            "position_ids": position_ids,
            "prefix_length": prefix_length,
            "denoiser_ids": denoiser_ids,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _denoised(self, draw: int, row: int) -> Denoising:
        layout = self._layout(draw)
        start, stop = layout.bounds[row : row + 2].tolist()
        tokens = self.shards.read(start, stop).astype(np.int64)
        draws = Draws(seed=self.seed, purpose=Purpose.UL2_SPANS, draw=draw, row=row)
        mask = noise_mask(len(tokens), self._denoisers[layout.denoisers[row]], draws)
        return take_out(tokens, mask, self._sentinels)

    def _layout(self, draw: int) -> _Layout:
        """The layout of a pass; the last two are kept, since a batch may lie across them."""
        if draw not in self._layouts:
            draws = Draws(seed=self.seed, purpose=Purpose.UL2_ORDER, draw=draw)
            multiset = np.repeat(np.arange(len(self._quota)), self._quota)
            shuffled = multiset[draws.permutation(len(multiset))]
            denoisers = np.concatenate([shuffled, [self._last]])
            ends = np.cumsum(self._lengths[denoisers])
            ends[-1] = self.shards.num_tokens
            self._layouts[draw] = _Layout(bounds=np.concatenate([[0], ends]), denoisers=denoisers)
            while len(self._layouts) > 2:
                del self._layouts[next(iter(self._layouts))]
        return self._layouts[draw]


def _shares(weights: Mapping[str, float] | None) -> npt.NDArray[np.float64]:
    """Share of the rows of each denoiser; they add up to 1."""
    weights = dict.fromkeys(DENOISERS, 1.0) if weights is None else weights
    assert DENOISERS.keys() >= weights.keys(), "the objective's settings are checked"
    assert sum(weights.values()) > 0
    shares = np.array([weights.get(name, 0.0) for name in DENOISERS], dtype=np.float64)
    return shares / np.sum(shares)


def _shortest() -> int:
    """The shortest row that every denoiser fits, in inputs."""
    return max(d.row_size(2) for d in DENOISERS.values()) - 1
