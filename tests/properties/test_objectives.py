"""What must hold for every row of every objective, whatever its length, seed and settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.data.chat import EncodedConversation, pack, shorten
from samara.data.draws import Draws, Purpose
from samara.data.masked_lm import MaskedRows, MaskingRule, mask_tokens
from samara.data.openelm_path import normalised_length, split_words
from samara.data.rows import Rows
from samara.data.tokenizer import train_tokenizer
from samara.data.tokens import IGNORE_INDEX, PackedSequences, TokenShards, write_token_shards
from samara.data.ul2 import (
    DENOISERS,
    Denoiser,
    DenoisingRows,
    UL2Ids,
    noise_mask,
    num_sentinels,
    take_out,
)

SEEDS = st.integers(-(2**63), 2**63 - 1)
DENOISER = st.sampled_from(list(DENOISERS.values())) | st.builds(
    Denoiser,
    mode=st.just("X"),
    corruption=st.floats(0.01, 0.99),
    mean_span=st.floats(1.0, 100.0),
)
SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)


# --- masked language modelling ----------------------------------------------------------------


@SETTINGS
@given(
    tokens=st.lists(st.integers(0, 49), min_size=1, max_size=200),
    special=st.sets(st.integers(0, 49), max_size=20),
    fraction=st.floats(0.01, 0.99),
    max_predictions=st.none() | st.integers(1, 30),
    seed=SEEDS,
)
def test_masking_hides_the_right_number_of_ordinary_tokens(
    tokens: list[int],
    special: set[int],
    fraction: float,
    max_predictions: int | None,
    seed: int,
):
    rule = MaskingRule(
        mask_token_id=50,
        special_token_ids=tuple(special),
        vocab_size=51,
        fraction=fraction,
        max_predictions=max_predictions,
    )
    row = np.array(tokens)
    masked = mask_tokens(row, rule=rule, draws=Draws(seed=seed, purpose=Purpose.MASKED_LM))
    chosen = masked.targets != IGNORE_INDEX
    ordinary = sum(token not in special for token in tokens)
    wanted = max(1, round(fraction * len(tokens)))
    assert chosen.sum() == min(wanted, ordinary, max_predictions or wanted)
    assert not special & set(masked.targets[chosen].tolist())
    np.testing.assert_array_equal(masked.targets[chosen], row[chosen])
    np.testing.assert_array_equal(masked.inputs[~chosen], row[~chosen])
    assert 0 <= masked.inputs.min() <= masked.inputs.max() <= 50
    np.testing.assert_array_equal(row, tokens)  # the caller's array is left alone


# --- UL2 --------------------------------------------------------------------------------------


@SETTINGS
@given(length=st.integers(2, 600), denoiser=DENOISER, seed=SEEDS)
def test_denoising_loses_nothing(length: int, denoiser: Denoiser, seed: int):
    counts = denoiser.counts(length)
    assert 1 <= counts.spans <= counts.noise <= length - counts.spans
    mask = noise_mask(length, denoiser, Draws(seed=seed, purpose=Purpose.UL2_SPANS))
    assert (mask.shape, mask.sum()) == ((length,), counts.noise)
    sentinels = np.arange(1000, 1000 + counts.spans)
    parts = take_out(np.arange(length), mask, sentinels)
    assert len(parts.prefix) == length - counts.noise + counts.spans
    assert len(parts.targets) == counts.noise + counts.spans
    cuts = np.flatnonzero(parts.targets >= 1000)
    np.testing.assert_array_equal(parts.targets[cuts], sentinels)
    spans = dict(zip(sentinels.tolist(), np.split(parts.targets, cuts)[1:], strict=True))
    rebuilt = [spans[t][1:] if t >= 1000 else [t] for t in parts.prefix.tolist()]
    np.testing.assert_array_equal(np.concatenate(rebuilt), np.arange(length))


# --- rows -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder: Path = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    words = ["seed", "elm", "wind", "falls", "where", "some", "grow", "tall", "trees", "leaves"]
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(0, 40, 40)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=300)
    write_token_shards(texts, tokenizer, folder / "train", shard_tokens=100)
    return TokenShards.open(folder, "train")


def make_rows(kind: str, shards: TokenShards, length: int, seed: int) -> Rows:
    if kind == "ul2":
        ids = UL2Ids(
            modes={"R": 300, "S": 301, "X": 302},
            sentinels=tuple(range(303, 303 + num_sentinels(length))),
            end=2,
        )
        return DenoisingRows(shards, sequence_length=length, ids=ids, seed=seed)
    rule = MaskingRule(mask_token_id=300, special_token_ids=(0, 1, 2, 300), vocab_size=301)
    packed = PackedSequences(shards, sequence_length=length)
    return MaskedRows(packed, rule=rule, seed=seed)


@pytest.mark.parametrize("kind", ["masked_lm", "ul2"])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_a_row_is_a_function_of_its_number(kind: str, shards: TokenShards, data: st.DataObject):
    """In any batch, any order, any pass; and of a length that never changes."""
    length, seed = data.draw(st.integers(8, 80)), data.draw(SEEDS)
    rows = make_rows(kind, shards, length, seed)
    numbers = data.draw(st.lists(st.integers(0, 3 * len(rows)), min_size=1, max_size=6))
    together = rows.batch(numbers)
    for place, number in enumerate(numbers):
        alone = make_rows(kind, shards, length, seed).batch([number])
        for name, tensor in alone.items():
            np.testing.assert_array_equal(together[name][place], tensor[0], err_msg=name)
    assert together["input_ids"].shape == together["targets"].shape == (len(numbers), length)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(length=st.integers(5, 90), draw=st.integers(0, 4), seed=SEEDS)
def test_a_ul2_pass_reads_every_token_once(shards: TokenShards, length: int, draw: int, seed: int):
    rows = make_rows("ul2", shards, length, seed)
    n = len(rows)
    batch = rows.batch(range(draw * n, draw * n + n))
    made_of = 303  # marks and text are below, what rows add is above
    text = 0
    for ids, targets, prefix in zip(
        batch["input_ids"].numpy(),
        batch["targets"].numpy(),
        batch["prefix_length"].tolist(),
        strict=True,
    ):
        counted = targets[targets != IGNORE_INDEX]
        assert counted[-1] == 2
        text += int((ids[1:prefix] < made_of).sum() + (counted[:-1] < made_of).sum())
    assert shards.num_tokens - text in (0, 1)


# --- OpenELM's path, chat ---------------------------------------------------------------------


@SETTINGS
@given(text=st.text(alphabet="ab. \n\té", max_size=80), words=st.integers(1, 9))
def test_chunks_make_up_the_text(text: str, words: int):
    chunks = split_words(text, words=words)
    assert " ".join(chunks) == text
    assert all(chunk.count(" ") == words - 1 for chunk in chunks[:-1])
    assert 0 <= normalised_length(text) <= len(text)


@SETTINGS
@given(
    is_answer=st.lists(st.booleans(), min_size=2, max_size=80).filter(lambda a: any(a[1:])),
    limit=st.integers(2, 90),
)
def test_shortening_keeps_order_and_a_target(is_answer: list[bool], limit: int):
    size = max(i for i, yes in enumerate(is_answer) if yes) + 1
    whole = EncodedConversation(tokens=np.arange(size), is_answer=np.array(is_answer[:size]))
    short = shorten(whole, limit=limit)
    assert 2 <= len(short) <= limit
    assert short.is_answer[1:].any()
    assert short.is_answer[-1]
    assert (np.diff(short.tokens) > 0).all()
    np.testing.assert_array_equal(short.is_answer, whole.is_answer[short.tokens])
    if size <= limit:
        assert len(short) == size


@SETTINGS
@given(data=st.data(), capacity=st.integers(1, 40))
def test_packing_loses_nothing_and_overflows_nothing(data: st.DataObject, capacity: int):
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = pack(sizes, capacity=capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in items) for items in bins]
    assert all(load <= capacity for load in loads)
    # Best fit never opens a bin while an item fits an old one: no two bins fit in one.
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > capacity
