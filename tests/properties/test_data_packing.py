"""Packing counts every token once, keeps documents apart, and loses nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.data.loader import evaluation_batches, training_batches
from samara.data.tokenizer import TextTokenizer, train_tokenizer
from samara.data.tokens import IGNORE_INDEX, PackedSequences, TokenShards, write_token_shards

DOCUMENTS = st.lists(st.text("elm seed", max_size=12), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_tokenizer(["elm seed"] * 3, folder, vocab_size=262)


@settings(max_examples=60, deadline=None)
@given(
    texts=DOCUMENTS,
    length=st.integers(1, 20),
    boundaries=st.booleans(),
    shard_tokens=st.integers(1, 40),
    batch_size=st.integers(1, 7),
)
def test_packing(
    tokenizer: TextTokenizer,
    texts: list[str],
    length: int,
    boundaries: bool,
    shard_tokens: int,
    batch_size: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_token_shards(texts, tokenizer, Path(folder) / "train", shard_tokens=shard_tokens)
        shards = TokenShards.open(Path(folder), "train")
        rows = PackedSequences(shards, sequence_length=length, document_boundaries=boundaries)
        batches = list(evaluation_batches(rows, batch_size=batch_size))
        flat = {
            name: torch.cat([b[name].flatten() for b in batches]).tolist() for name in batches[0]
        }
        documents = [[1, *tokenizer.encode(text), 2] for text in texts]
        stream = [id_ for document in documents for id_ in document]
        owner = [n for n, document in enumerate(documents) for _ in document]
        place = [i for document in documents for i in range(len(document))]

        # Inputs: the stream (its last token may have no row of its own), then padding.
        real = min(len(stream), len(flat["input_ids"]))
        assert real >= len(stream) - 1
        assert flat["input_ids"][:real] == stream[:real]
        assert flat["document_ids"] == owner[:real] + [-1] * (len(flat["input_ids"]) - real)
        assert set(flat["input_ids"][real:]) <= {0}

        # Targets: each token once, except that a document's first is not predicted from another.
        counted = [i for i, id_ in enumerate(flat["targets"]) if id_ != IGNORE_INDEX]
        expected = [i for i in range(len(stream) - 1) if not boundaries or owner[i] == owner[i + 1]]
        assert counted == expected
        assert [flat["targets"][i] for i in counted] == [stream[i + 1] for i in expected]
        assert len(counted) == rows.num_targets

        # Positions: from the start of the row, or of the document where that comes later.
        for i, position in enumerate(flat["position_ids"][:real]):
            in_row = i % length
            assert position == (min(in_row, place[i]) if boundaries else in_row)
        if boundaries:  # padding is told apart like one more document
            padding = flat["position_ids"][real:]
            assert padding == list(range(len(padding)))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([(2, 1, 1), (2, 1, 2), (6, 3, 2), (6, 2, 3), (12, 3, 2)]),
    seed=st.integers(0, 2**70),
    start=st.integers(0, 50),
)
def test_order_is_a_function_of_seed_and_step(
    tokenizer: TextTokenizer, batch: tuple[int, int, int], seed: int, start: int
) -> None:
    batch_size, micro_batch_size, world_size = batch
    with tempfile.TemporaryDirectory() as folder:
        write_token_shards(["elm seed elm"] * 9, tokenizer, Path(folder) / "train")
        rows = PackedSequences(TokenShards.open(Path(folder), "train"), sequence_length=5)

        def read(start_step: int, num_steps: int, **share: int) -> list[torch.Tensor]:
            steps = training_batches(
                rows,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                seed=seed,
                start_step=start_step,
                num_steps=num_steps,
                **share,
            )
            return [torch.cat([b["document_ids"] for b in step]) for step in steps]

        whole = read(0, start + 3)
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], read(start, 3), strict=True))
        shares = [read(start, 3, rank=r, world_size=world_size) for r in range(world_size)]
        for step, parts in zip(whole[start:], zip(*shares, strict=True), strict=True):
            assert torch.equal(step, torch.cat(parts))
