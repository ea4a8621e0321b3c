"""Masked language modelling: BERT's algorithm, its rows, and what reads them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samara.data.draws import Draws, Purpose
from samara.data.loader import evaluation_batches, training_batches
from samara.data.masked_lm import DocumentRows, Frame, MaskedRows, MaskingRule, mask_tokens
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX, PackedSequences, TokenShards, write_token_shards
from samara.errors import ConfigError, DataError

PAD, BOS, EOS, MASK = 0, 1, 2, 320
VOCAB_SIZE = 321
RULE = MaskingRule(
    mask_token_id=MASK, special_token_ids=(PAD, BOS, EOS, MASK), vocab_size=VOCAB_SIZE
)
MARKED = Frame(first=BOS, last=EOS)
Sentences = Callable[[int], list[str]]


def draws(row: int = 0) -> Draws:
    return Draws(seed=3, purpose=Purpose.MASKED_LM, row=row)


# --- the algorithm ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "max_predictions", "expected"),
    [
        (1, None, 1),  # at least one
        (3, None, 1),
        (10, None, 2),  # 1.5
        (30, None, 4),  # 4.5: halves to even
        (128, 20, 19),  # BERT, first phase
        (512, 77, 77),  # BERT, second phase: 76.8
        (512, 76, 76),
        (512, 5, 5),
    ],
)
def test_how_many_are_predicted(num_tokens: int, max_predictions: int | None, expected: int):
    rule = MaskingRule(
        mask_token_id=MASK,
        special_token_ids=(BOS, EOS),
        vocab_size=VOCAB_SIZE,
        max_predictions=max_predictions,
    )
    assert rule.num_predictions(num_tokens) == expected
    masked = mask_tokens(np.full(num_tokens, 9), rule=rule, draws=draws())
    assert (masked.targets != IGNORE_INDEX).sum() == expected


def test_special_tokens_are_never_chosen_but_count():
    tokens = np.array([BOS, *range(10, 18), EOS])  # 10 with the marks: 2 predictions; 8: 1
    for row in range(200):
        masked = mask_tokens(tokens, rule=RULE, draws=draws(row))
        assert masked.targets[0] == masked.targets[-1] == IGNORE_INDEX
        assert masked.inputs[0] == BOS
        assert masked.inputs[-1] == EOS
        assert (masked.targets != IGNORE_INDEX).sum() == 2


def test_a_row_of_marks_alone_predicts_nothing():
    masked = mask_tokens(np.array([BOS, EOS]), rule=RULE, draws=draws())
    assert masked.inputs.tolist() == [BOS, EOS]
    assert masked.targets.tolist() == [IGNORE_INDEX, IGNORE_INDEX]


def test_few_candidates_are_all_taken():
    tokens = np.array([BOS] * 39 + [50])  # 6 wanted, 1 there
    masked = mask_tokens(tokens, rule=RULE, draws=draws())
    assert masked.targets.tolist() == [IGNORE_INDEX] * 39 + [50]


def test_equals_the_script_step_by_step():
    """BERT's loop over shuffled candidates, one at a time."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 200)
    numbers = draws()
    candidates = [i for i, token in enumerate(tokens) if token not in RULE.special_token_ids]
    shuffled = [candidates[i] for i in numbers.permutation(len(candidates))]
    wanted = max(1, round(len(tokens) * 0.15))
    covered: list[int] = []
    for index in shuffled:
        if len(covered) >= wanted:
            break
        covered.append(index)
    lots, randoms = numbers.uniform(wanted), numbers.integers(wanted, below=VOCAB_SIZE)
    expected = tokens.copy()
    for i, index in enumerate(covered):
        if lots[i] < 0.8:
            expected[index] = MASK
        elif lots[i] >= 0.9:
            expected[index] = randoms[i]
    masked = mask_tokens(tokens, rule=RULE, draws=draws())
    assert masked.inputs.tolist() == expected.tolist()
    assert np.flatnonzero(masked.targets != IGNORE_INDEX).tolist() == sorted(covered)
    assert masked.targets[covered].tolist() == tokens[covered].tolist()


def test_shares_are_80_10_10_and_random_tokens_come_from_the_whole_vocabulary():
    rule = MaskingRule(mask_token_id=30, special_token_ids=(0, 1, 30), vocab_size=32)
    tokens = np.full(100_000, 20)
    masked = mask_tokens(tokens, rule=rule, draws=draws())
    chosen = masked.inputs[masked.targets != IGNORE_INDEX]
    n = len(chosen)
    assert n == 15_000
    counts = np.bincount(chosen, minlength=32)
    # Of the random tenth, 1/32 falls on the mask token and 1/32 on the token itself.
    assert counts[30] / n == pytest.approx(0.8 + 0.1 / 32, abs=0.015)
    assert counts[20] / n == pytest.approx(0.1 + 0.1 / 32, abs=0.012)
    others = np.delete(counts, [20, 30])
    assert others.min() > 15  # special tokens too
    assert others.max() < 90
    assert others.mean() == pytest.approx(0.1 * n / 32, rel=0.1)


# --- packed rows ------------------------------------------------------------------------------


@pytest.fixture
def packed(shards: TokenShards) -> PackedSequences:
    return PackedSequences(shards, sequence_length=32)


def test_rows_are_the_packed_rows_with_some_tokens_hidden(packed: PackedSequences):
    rows = MaskedRows(packed, rule=RULE, seed=5)
    everything = range(len(rows))
    plain, batch = packed.batch(everything), rows.batch(everything)
    chosen = batch["targets"] != IGNORE_INDEX
    assert torch.equal(batch["targets"][chosen], plain["input_ids"][chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain["input_ids"][~chosen])
    assert torch.equal(batch["document_ids"], plain["document_ids"])
    assert torch.equal(batch["attention_mask"], (plain["document_ids"] >= 0).long())
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["position_ids"][real], plain["position_ids"][real])
    assert not chosen[~real].any()
    expected = [max(1, round(0.15 * n)) for n in real.sum(1).tolist()]
    assert chosen.sum(1).tolist() == expected
    assert not torch.isin(batch["targets"][chosen], torch.tensor(RULE.special_token_ids)).any()


@pytest.mark.parametrize("document_boundaries", [True, False])
def test_padding_starts_a_document_of_its_own(shards: TokenShards, document_boundaries: bool):
    packed = PackedSequences(shards, sequence_length=48, document_boundaries=document_boundaries)
    row = MaskedRows(packed, rule=RULE, seed=0)[-1]
    size = int(row["attention_mask"].sum())
    assert 0 < size < 48
    assert row["position_ids"][size:].tolist() == list(range(48 - size))
    assert row["input_ids"][size:].tolist() == [PAD] * (48 - size)


def test_a_row_does_not_depend_on_its_batch(packed: PackedSequences):
    rows = MaskedRows(packed, rule=RULE, seed=5)
    whole = rows.batch([4, 2, 9])
    for i, number in enumerate([4, 2, 9]):
        alone = pickle.loads(pickle.dumps(rows))[number]
        for name, tensor in alone.items():
            assert torch.equal(whole[name][i], tensor), name


def test_each_pass_and_each_seed_has_masks_of_its_own(packed: PackedSequences):
    rows = MaskedRows(packed, rule=RULE, seed=5)
    n = len(rows)
    first, second = rows.batch(range(n)), rows.batch(range(n, 2 * n))
    assert not torch.equal(first["targets"], second["targets"])
    assert torch.equal(first["document_ids"], second["document_ids"])
    other = MaskedRows(packed, rule=RULE, seed=6).batch(range(n))
    assert not torch.equal(first["targets"], other["targets"])


def test_masks_repeat_after_their_sets(packed: PackedSequences):
    rows = MaskedRows(packed, rule=RULE, seed=5, mask_sets=2)
    n = len(rows)
    first, second, third = (rows.batch(range(i * n, i * n + n)) for i in range(3))
    assert torch.equal(first["input_ids"], third["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])


def test_evaluation_masks_are_fixed(packed: PackedSequences):
    """The whole evaluation set, in any batch size, is the same in every process."""
    rows = MaskedRows(packed, rule=RULE, seed=0)
    small = [b["targets"] for b in evaluation_batches(rows, batch_size=3)]
    large = [b["targets"] for b in evaluation_batches(rows, batch_size=7)]
    assert torch.equal(torch.cat(small), torch.cat(large))


def test_the_loader_reads_them_with_any_number_of_workers(packed: PackedSequences):
    rows = MaskedRows(packed, rule=RULE, seed=5)

    def targets(num_workers: int) -> torch.Tensor:
        steps = training_batches(
            rows,
            batch_size=4,
            micro_batch_size=2,
            seed=1,
            start_step=1,
            num_steps=3,
            num_workers=num_workers,
        )
        return torch.stack([batch["targets"] for step in steps for batch in step])

    assert torch.equal(targets(0), targets(2))


# --- one document a row -----------------------------------------------------------------------


def test_documents_are_framed_and_padded(shards: TokenShards):
    rows = DocumentRows(shards, sequence_length=16, in_stream=MARKED, in_row=MARKED)
    batch = rows.batch(range(len(rows)))
    texts: dict[int, list[int]] = {}
    for ids, documents, positions in zip(
        batch["input_ids"].tolist(),
        batch["document_ids"].tolist(),
        batch["position_ids"].tolist(),
        strict=True,
    ):
        size = sum(document >= 0 for document in documents)
        assert ids[0] == BOS
        assert ids[size - 1] == EOS
        assert ids[size:] == [PAD] * (16 - size)
        assert len(set(documents[:size])) == 1
        assert positions == [*range(size), *range(16 - size)]
        texts.setdefault(documents[0], []).extend(ids[1 : size - 1])
    for document in range(shards.num_documents):
        start, stop = shards.document_offsets[document : document + 2].tolist()
        assert texts.get(document, []) == shards.read(start, stop).tolist()[1:-1]


def test_marks_of_the_stream_give_way_to_those_of_the_row(shards: TokenShards):
    frame = Frame(first=300, last=301)
    row = DocumentRows(shards, sequence_length=64, in_stream=MARKED, in_row=frame)[0]
    size = int((row["document_ids"] >= 0).sum())
    ids = row["input_ids"][:size].tolist()
    assert (ids[0], ids[-1]) == (300, 301)
    assert not {BOS, EOS} & set(ids)


def test_without_marks_there_is_text_alone(shards: TokenShards):
    rows = DocumentRows(shards, sequence_length=64, in_stream=MARKED, in_row=Frame())
    ids = rows.batch(range(len(rows)))["input_ids"]
    assert not torch.isin(ids, torch.tensor([BOS, EOS])).any()


def test_hugging_face_bert_reads_them(shards: TokenShards):
    """Its loss on our batch is the mean over our targets, so nothing may be shifted."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        )
    ).eval()
    documents = DocumentRows(shards, sequence_length=24, in_stream=MARKED, in_row=MARKED)
    batch = MaskedRows(documents, rule=RULE, seed=0).batch(range(4))
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["targets"],
    )
    chosen = batch["targets"] != IGNORE_INDEX
    log_p = output.logits[chosen].log_softmax(-1)
    expected = -log_p.gather(1, batch["targets"][chosen][:, None]).mean()
    torch.testing.assert_close(output.loss, expected)


def test_a_row_without_room_for_text_is_refused(shards: TokenShards):
    with pytest.raises(ConfigError, match=r"sequence_length: 2 leaves no room.*3 or more"):
        DocumentRows(shards, sequence_length=2, in_stream=MARKED, in_row=MARKED)


def test_documents_without_text_are_refused(tokenizer: TextTokenizer, tmp_path: Path):
    write_token_shards(["", ""], tokenizer, tmp_path / "train")
    empty = TokenShards.open(tmp_path, "train")
    with pytest.raises(DataError, match="no document holds any text"):
        DocumentRows(empty, sequence_length=8, in_stream=MARKED, in_row=MARKED)


def test_a_row_that_is_not_there(packed: PackedSequences):
    rows = MaskedRows(packed, rule=RULE, seed=0)
    with pytest.raises(IndexError, match="row"):
        rows[len(rows)]
