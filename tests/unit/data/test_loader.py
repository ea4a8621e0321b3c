"""The order of training: a pure function of seed and step."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest
import torch

from samara.data.loader import epoch_permutation, evaluation_batches, training_batches
from samara.data.masked_lm import MaskedRows, MaskingRule
from samara.data.rows import Batch, Rows
from samara.data.tokens import PackedSequences, TokenShards
from samara.errors import ConfigError


@pytest.fixture
def rows(shards: TokenShards) -> PackedSequences:
    return PackedSequences(shards, sequence_length=32)


def take(rows: Rows, **options: Any) -> list[list[Batch]]:
    settings = {"batch_size": 4, "micro_batch_size": 2, "seed": 0, "start_step": 0, "num_steps": 20}
    return list(training_batches(rows, **{**settings, **options}))


def joined(step: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in step]) for name in step[0]}


def assert_equal(left: list[list[Batch]], right: list[list[Batch]]) -> None:
    assert len(left) == len(right)
    for step, other in zip(left, right, strict=True):
        assert [batch.keys() for batch in step] == [batch.keys() for batch in other]
        for batch, twin in zip(step, other, strict=True):
            assert all(torch.equal(batch[name], twin[name]) for name in batch)


def row_numbers(rows: PackedSequences, steps: list[list[Batch]]) -> list[int]:
    known = {tuple(row["input_ids"].tolist()): number for number, row in enumerate(rows)}
    assert len(known) == len(rows)
    return [known[tuple(ids)] for step in steps for ids in joined(step)["input_ids"].tolist()]


def test_shapes(rows: PackedSequences) -> None:
    steps = take(rows, num_steps=3)
    assert [len(step) for step in steps] == [2, 2, 2]
    assert all(tensor.shape == (2, 32) for step in steps for b in step for tensor in b.values())


def test_every_epoch_reads_every_row_once_in_a_new_order(rows: PackedSequences) -> None:
    size = len(rows)
    assert size % 4, "batches must run on across the end of an epoch"
    numbers = row_numbers(rows, take(rows, num_steps=-(-3 * size // 4)))
    epochs = [numbers[start : start + size] for start in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(size))


def test_numbers_past_the_end_are_the_same_rows(rows: PackedSequences) -> None:
    size = len(rows)
    first, later = rows.batch([0, size - 1]), rows.batch([2 * size, 4 * size - 1])
    assert all(torch.equal(first[name], later[name]) for name in first)


def test_noise_differs_between_epochs_and_not_between_readings(rows: PackedSequences) -> None:
    rule = MaskingRule(mask_token_id=3, special_token_ids=(0, 1, 2, 3), vocab_size=50)
    masked = MaskedRows(rows, rule=rule, seed=1)
    size = len(masked)
    options = {"batch_size": size, "micro_batch_size": size}
    for epoch, (batch,) in enumerate(take(masked, num_steps=3, **options)):
        order = epoch_permutation(size, seed=0, epoch=epoch)
        expected = masked.batch((order + epoch * size).tolist())
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
        # The text of a row stays, its masks do not.
        assert torch.equal(batch["document_ids"], rows.batch(order.tolist())["document_ids"])
        if epoch:
            assert not torch.equal(batch["targets"], masked.batch(order.tolist())["targets"])


def test_starting_later_continues(rows: PackedSequences) -> None:
    assert_equal(take(rows)[7:], take(rows, start_step=7, num_steps=13))


def test_the_seed_decides(rows: PackedSequences) -> None:
    assert_equal(take(rows, seed=3), take(rows, seed=3))
    assert row_numbers(rows, take(rows, seed=3)) != row_numbers(rows, take(rows, seed=4))


def test_micro_batches_cut_the_same_batch(rows: PackedSequences) -> None:
    for step, other in zip(take(rows), take(rows, micro_batch_size=4), strict=True):
        assert len(other) == 1
        assert all(torch.equal(joined(step)[name], other[0][name]) for name in other[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_same_global_batches(rows: PackedSequences, world_size: int) -> None:
    options = {"micro_batch_size": 1}
    shares = [take(rows, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    together = [[b for part in parts for b in part] for parts in zip(*shares, strict=True)]
    assert_equal(together, take(rows, **options))


def test_workers_do_not_change_the_order(rows: PackedSequences) -> None:
    assert_equal(
        take(rows, num_workers=2, start_step=5, num_steps=9), take(rows, start_step=5, num_steps=9)
    )


def test_workers_outlive_the_signals_of_a_stop(rows: PackedSequences) -> None:
    """Ctrl-C reaches every process of the terminal; the main one still finishes its step."""
    steps = training_batches(
        rows,
        batch_size=4,
        micro_batch_size=2,
        seed=0,
        start_step=0,
        num_steps=20,
        num_workers=1,
    )
    read = [next(steps)]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    read += steps
    assert_equal(read, take(rows))


def test_global_random_numbers_are_left_alone(rows: PackedSequences) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(rows, num_steps=2)
    take(rows, num_steps=2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_rows_asked_than_there_are(rows: PackedSequences) -> None:
    size = len(rows)
    numbers = row_numbers(rows, take(rows, batch_size=2 * size, micro_batch_size=size, num_steps=1))
    assert sorted(numbers) == sorted([*range(size), *range(size)])


def test_indivisible_batch(rows: PackedSequences) -> None:
    with pytest.raises(
        ConfigError, match=r"training\.batch_size: 4 is not divisible by 1 processes times .* 3"
    ):
        take(rows, micro_batch_size=3)
    with pytest.raises(ConfigError, match=r"4 is not divisible by 3 processes"):
        take(rows, world_size=3, micro_batch_size=1)


def test_permutation_is_pinned() -> None:
    """Resuming an old run on a newer numpy rests on it."""
    assert epoch_permutation(8, seed=7, epoch=2).tolist() == [6, 7, 4, 0, 1, 5, 3, 2]
    assert epoch_permutation(5, seed=2**64 + 7, epoch=0).tolist() == (
        epoch_permutation(5, seed=7, epoch=0).tolist()
    )


def test_evaluation_reads_in_order(rows: PackedSequences) -> None:
    batches = list(evaluation_batches(rows, batch_size=4))
    assert [len(b["input_ids"]) for b in batches][-1] == len(rows) % 4
    assert row_numbers(rows, [batches]) == list(range(len(rows)))
