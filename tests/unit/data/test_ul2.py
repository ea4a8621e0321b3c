"""UL2: the seven denoisers, T5's segmentation, and rows for a prefix-LM decoder."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from samara.data.draws import Draws, Purpose
from samara.data.loader import training_batches
from samara.data.objectives import DENOISER_NAMES
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX, TokenShards, write_token_shards
from samara.data.ul2 import (
    DENOISERS,
    MODE_TOKENS,
    Denoiser,
    DenoisingRows,
    UL2Ids,
    noise_mask,
    num_sentinels,
    take_out,
    ul2_tokens,
)
from samara.errors import ConfigError, DataError

PAD, EOS = 0, 2
VOCAB_SIZE = 320
LENGTH = 48
MODES = {"R": 320, "S": 321, "X": 322}
SENTINELS = tuple(range(323, 323 + num_sentinels(LENGTH)))
IDS = UL2Ids(modes=MODES, sentinels=SENTINELS, end=EOS)
EACH = pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS.keys())


def draws(row: int = 0) -> Draws:
    return Draws(seed=1, purpose=Purpose.UL2_SPANS, row=row)


def spans_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def rebuild(prefix: list[int], targets: list[int]) -> list[int]:
    """The text, from what is left of it and the spans."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    text: list[int] = []
    for token in prefix:
        text += spans[token] if token in SENTINELS else [token]
    return text


# --- the mixture ------------------------------------------------------------------------------


def test_the_denoisers_are_exactly_the_seven():
    found = {(d.mode, d.mean_span, d.corruption) for d in DENOISERS.values()}
    assert found == {
        ("R", 3, 0.15),
        ("R", 8, 0.15),
        ("S", None, 0.25),
        ("X", 3, 0.5),
        ("X", 8, 0.5),
        ("X", 64, 0.15),
        ("X", 64, 0.5),
    }
    assert len(DENOISERS) == 7
    assert tuple(DENOISERS) == DENOISER_NAMES
    assert MODE_TOKENS == {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}


@pytest.mark.parametrize(
    ("name", "noise", "spans"),
    [
        ("R-3-0.15", 77, 26),  # 76.8; 25.7
        ("R-8-0.15", 77, 10),  # 9.6
        ("S-0.25", 128, 1),
        ("X-3-0.5", 256, 85),  # 85.3
        ("X-8-0.5", 256, 32),
        ("X-64-0.15", 77, 1),  # 1.2
        ("X-64-0.5", 256, 4),
    ],
)
def test_counts_of_512_tokens(name: str, noise: int, spans: int):
    counts = DENOISERS[name].counts(512)
    assert (counts.noise, counts.spans) == (noise, spans)


@EACH
@pytest.mark.parametrize("length", [2, 3, 5, 17, 100, 511])
def test_masks_have_exactly_these_counts(denoiser: Denoiser, length: int):
    counts = denoiser.counts(length)
    for row in range(20):
        mask = noise_mask(length, denoiser, draws(row))
        assert mask.shape == (length,)
        assert mask.sum() == counts.noise
        assert len(spans_of(mask)) == counts.spans
        if counts.spans > 1:
            assert not mask[0]
            assert mask[-1]


@EACH
def test_realised_rate_and_mean_span_are_those_asked_for(denoiser: Denoiser):
    """A mask that is the union of several denoisers' would fail here."""
    length = 2048
    mask = noise_mask(length, denoiser, draws())
    assert mask.mean() == pytest.approx(denoiser.corruption, abs=0.5 / length)
    lengths = [size for _, size in spans_of(mask)]
    mean_span = length / 4 if denoiser.mean_span is None else denoiser.mean_span
    assert np.mean(lengths) == pytest.approx(mean_span, rel=0.05)


@pytest.mark.parametrize("length", range(2, 200))
def test_s_is_always_one_span_at_the_end(length: int):
    denoiser = DENOISERS["S-0.25"]
    mask = noise_mask(length, denoiser, draws(length))
    noise = denoiser.counts(length).noise
    assert spans_of(mask) == [(length - noise, noise)]


def test_a_lone_span_of_x_may_be_anywhere():
    """Never rolled, X with mean 64 on a short text would be S under another name."""
    denoiser, length = DENOISERS["X-64-0.15"], 40
    starts = Counter(
        spans_of(noise_mask(length, denoiser, draws(row)))[0][0] for row in range(7000)
    )
    assert sorted(starts) == list(range(35))  # 6 of 40 tokens: 35 places
    assert min(starts.values()) > 130  # of 200 expected
    assert max(starts.values()) < 270


def test_segmentations_are_equally_likely():
    """12 tokens, half of them noise, in 2 spans: 5 x 5 ways."""
    denoiser = Denoiser(mode="R", mean_span=3, corruption=0.5)
    seen = Counter(tuple(spans_of(noise_mask(12, denoiser, draws(row)))) for row in range(5000))
    assert len(seen) == 25
    assert min(seen.values()) > 140  # of 200 expected
    assert max(seen.values()) < 260


# --- one text ---------------------------------------------------------------------------------


def test_spans_give_way_to_sentinels_in_order():
    mask = np.array([0, 0, 1, 0, 1, 1, 0, 1], dtype=bool)
    parts = take_out(np.arange(10, 18), mask, np.array([90, 91, 92, 93]))
    assert parts.prefix.tolist() == [10, 11, 90, 13, 91, 16, 92]
    assert parts.targets.tolist() == [90, 12, 91, 14, 15, 92, 17]


def test_a_span_at_the_very_start():
    mask = np.array([1, 1, 0, 1], dtype=bool)
    parts = take_out(np.arange(10, 14), mask, np.array([90, 91]))
    assert parts.prefix.tolist() == [90, 12, 91]
    assert parts.targets.tolist() == [90, 10, 11, 91, 13]


@EACH
@pytest.mark.parametrize("length", [2, 7, 41, 512])
def test_lengths_and_reconstruction(denoiser: Denoiser, length: int):
    """No closing sentinel, nothing lost, whatever the denoiser."""
    sentinels = np.arange(1000, 1200)
    tokens = np.arange(length)
    counts = denoiser.counts(length)
    parts = take_out(tokens, noise_mask(length, denoiser, draws()), sentinels)
    assert len(parts.prefix) == length - counts.noise + counts.spans
    assert len(parts.targets) == counts.noise + counts.spans
    assert denoiser.row_size(length) == 1 + len(parts.prefix) + len(parts.targets) + 1
    used = list(range(1000, 1000 + counts.spans))
    assert [t for t in parts.prefix.tolist() if t >= 1000] == used
    assert [t for t in parts.targets.tolist() if t >= 1000] == used
    assert parts.targets[0] == 1000


# --- rows -------------------------------------------------------------------------------------


def make_rows(shards: TokenShards, *, seed: int = 4, **options: object) -> DenoisingRows:
    return DenoisingRows(
        shards,
        sequence_length=LENGTH,
        ids=IDS,
        seed=seed,
        **options,  # type: ignore[arg-type]
    )


def parts_of(row: dict[str, torch.Tensor]) -> tuple[int, list[int], list[int]]:
    """Mode token, prefix without it, and targets with the end mark."""
    prefix_length = int(row["prefix_length"])
    ids, targets = row["input_ids"].tolist(), row["targets"].tolist()
    return ids[0], ids[1:prefix_length], [t for t in targets if t != IGNORE_INDEX]


def test_a_row_is_mode_prefix_and_targets(shards: TokenShards):
    rows = make_rows(shards)
    names = list(DENOISERS)
    for number in range(len(rows)):
        row = rows[number]
        denoiser = DENOISERS[names[int(row["denoiser_ids"])]]
        mode, prefix, targets = parts_of(row)
        assert mode == MODES[denoiser.mode]
        assert targets[-1] == EOS
        text = rebuild(prefix, targets[:-1])
        counts = denoiser.counts(len(text))
        assert len(prefix) == len(text) - counts.noise + counts.spans
        assert len(targets) == counts.noise + counts.spans + 1  # none was cut off
        size = len(prefix) + len(targets)
        whole = [mode, *prefix, *targets]
        assert row["input_ids"].tolist() == whole[:-1] + [PAD] * (LENGTH - size)
        start = int(row["prefix_length"]) - 1  # the prefix's last token predicts the first target
        assert row["targets"][start:size].tolist() == targets
        assert (row["targets"][:start] == IGNORE_INDEX).all()
        assert (row["targets"][size:] == IGNORE_INDEX).all()
        assert row["position_ids"].tolist() == [*range(size), *range(LENGTH - size)]


def test_no_target_is_visible_to_the_position_that_predicts_it(shards: TokenShards):
    batch = make_rows(shards).batch(range(20))
    for ids, targets, prefix_length in zip(
        batch["input_ids"], batch["targets"], batch["prefix_length"].tolist(), strict=True
    ):
        key = torch.arange(LENGTH)
        sees = (key <= key[:, None]) | (key < prefix_length)
        for position in (targets != IGNORE_INDEX).nonzero()[:, 0].tolist():
            following = position + 1
            if following < LENGTH and targets[position] != EOS:
                assert ids[following] == targets[position]
                assert not sees[position, following]


@pytest.mark.parametrize("draw", [0, 1, 5])
def test_a_pass_reads_the_stream_once_and_in_order_of_its_pieces(shards: TokenShards, draw: int):
    rows = make_rows(shards)
    n = len(rows)
    text: list[int] = []
    for number in range(draw * n, draw * n + n):
        batch = rows.batch([number])
        _, prefix, targets = parts_of({name: tensor[0] for name, tensor in batch.items()})
        text += rebuild(prefix, targets[:-1])
    stream = shards.read(0, shards.num_tokens).tolist()
    assert text == stream[: len(text)]
    assert len(text) >= len(stream) - 1


def test_rows_are_full_but_the_last(shards: TokenShards):
    """Each denoiser has the longest text that fits: at most what one more span would take."""
    rows = make_rows(shards)
    padding = (rows.batch(range(len(rows) - 1))["input_ids"] == PAD).sum(1)
    assert padding.max() <= 2


def test_equal_shares_of_the_rows(shards: TokenShards):
    rows = make_rows(shards)
    n = len(rows)
    for draw in range(3):
        ids = rows.batch(range(draw * n, draw * n + n))["denoiser_ids"]
        counts = torch.bincount(ids, minlength=7)
        assert counts.max() - counts.min() <= 2
        assert counts.sum() == n


def test_weights_are_shares_of_the_rows(shards: TokenShards):
    rows = make_rows(shards, weights={"S-0.25": 2.0, "R-3-0.15": 1.0, "X-3-0.5": 1.0})
    counts = torch.bincount(rows.batch(range(len(rows)))["denoiser_ids"], minlength=7).tolist()
    used = dict(zip(DENOISERS, counts, strict=True))
    assert {name for name, count in used.items() if count} == {"S-0.25", "R-3-0.15", "X-3-0.5"}
    for name, share in (("S-0.25", 0.5), ("R-3-0.15", 0.25), ("X-3-0.5", 0.25)):
        assert abs(used[name] - share * len(rows)) <= 1.5


def test_each_pass_has_other_denoisers_and_spans(shards: TokenShards):
    rows = make_rows(shards)
    n = len(rows)
    passes = [rows.batch(range(i * n, i * n + n)) for i in range(3)]
    for a, b in itertools.combinations(passes, 2):
        assert not torch.equal(a["denoiser_ids"], b["denoiser_ids"])
        assert not torch.equal(a["input_ids"], b["input_ids"])


def test_a_row_depends_on_its_number_and_the_seed_alone(shards: TokenShards):
    rows = make_rows(shards)
    n = len(rows)
    numbers = [3, 2 * n + 1, 0, n + 4]  # passes back and forth
    whole = rows.batch(numbers)
    for i, number in enumerate(numbers):
        alone = pickle.loads(pickle.dumps(make_rows(shards))).batch([number])
        for name, tensor in alone.items():
            assert torch.equal(whole[name][i], tensor[0]), name
    other = make_rows(shards, seed=5).batch(numbers)
    assert not torch.equal(whole["input_ids"], other["input_ids"])


def test_the_loader_reads_them(shards: TokenShards):
    rows = make_rows(shards)
    (step,) = training_batches(
        rows, batch_size=4, micro_batch_size=4, seed=1, start_step=2, num_steps=1
    )
    assert step[0]["input_ids"].shape == (4, LENGTH)
    assert step[0]["prefix_length"].shape == (4,)


@pytest.mark.parametrize("length", [5, 6, 11, 48, 257, 2048])
def test_sentinels_are_never_short(length: int):
    needed = max(d.counts(d.text_length(length + 1)).spans for d in DENOISERS.values())
    assert num_sentinels(length) == needed
    tokens = ul2_tokens(length)
    assert tokens[:3] == ("[NLU]", "[S2S]", "[NLG]")
    assert tokens[3:] == tuple(f"<extra_id_{i}>" for i in range(needed))


@EACH
@pytest.mark.parametrize("row_size", [6, 7, 30, 129, 513])
def test_the_longest_text_that_fits(denoiser: Denoiser, row_size: int):
    length = denoiser.text_length(row_size)
    assert denoiser.row_size(length) <= row_size
    assert all(denoiser.row_size(more) > row_size for more in range(length + 1, row_size + 1))


# --- errors -----------------------------------------------------------------------------------


def test_a_row_too_short_is_refused(shards: TokenShards):
    with pytest.raises(ConfigError, match=r"sequence_length: 4 is too short for UL2.*5 or more"):
        DenoisingRows(shards, sequence_length=4, ids=IDS, seed=0)
    assert len(DenoisingRows(shards, sequence_length=5, ids=IDS, seed=0)) > 0


def test_too_few_sentinels_are_refused(shards: TokenShards):
    few = UL2Ids(modes=MODES, sentinels=SENTINELS[:2], end=EOS)
    with pytest.raises(ConfigError, match=r"needs \d+ sentinels, the tokenizer has 2"):
        DenoisingRows(shards, sequence_length=LENGTH, ids=few, seed=0)


def test_a_single_token_is_refused(tokenizer: TextTokenizer, tmp_path: Path):
    unmarked = TextTokenizer.load(tokenizer.folder)
    unmarked.special_tokens = dict.fromkeys(tokenizer.special_tokens)
    write_token_shards(["e"], unmarked, tmp_path / "train")
    with pytest.raises(DataError, match="1 tokens, too few"):
        make_rows(TokenShards.open(tmp_path, "train"))
