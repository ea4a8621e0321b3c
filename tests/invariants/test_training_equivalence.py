"""Ways of training that must not change the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from samara.data.rows import Batch
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing
from samara.train.checkpoint import TrainingState, named_weights
from samara.train.config import AdamW, Muon
from samara.train.loop import Hooks, train
from samara.train.objective import CausalLM, count_targets
from samara.train.optim import Optimizer

VOCAB_SIZE, ROWS, LENGTH = 53, 8, 10


def make_model(*, dtype: torch.dtype, rank: int | None) -> SamaraForCausalLM:
    design = ModelConfig.model_validate(
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "ffn_dim": (24, 32),
            "vocab_size": VOCAB_SIZE,
            "cola": None if rank is None else {"rank": rank, "activation": "both"},
        }
    )
    torch.manual_seed(5)
    return SamaraForCausalLM(SamaraConfig.from_design(design)).to(dtype)


def make_steps(num_steps: int, *, rows_at_once: int) -> list[list[Batch]]:
    """The same rows for every cut into micro-batches; each row has another number of targets."""
    generator = torch.Generator().manual_seed(9)
    steps = []
    for _ in range(num_steps):
        tokens = torch.randint(0, VOCAB_SIZE, (ROWS, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        for row in range(ROWS):
            targets[row, : row + 1] = -100
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH).clone()
        positions[:, 6:] -= 6  # a second document
        whole = {"input_ids": tokens[:, :-1], "targets": targets, "position_ids": positions}
        steps.append(
            [
                {name: tensor[i : i + rows_at_once] for name, tensor in whole.items()}
                for i in range(0, ROWS, rows_at_once)
            ]
        )
    return steps


def trained(
    *,
    rows_at_once: int = ROWS,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    optimizer: AdamW | Muon | None = None,
    activation_checkpointing: Any = "none",
    precision: Any = "float32",
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and (loss, gradient norm) of each step after four steps of training."""
    model = make_model(dtype=dtype, rank=rank)
    set_activation_checkpointing(model, activation_checkpointing)
    records: list[dict[str, Any]] = []
    train(
        model,
        objective=CausalLM(z_loss=1e-3),
        optimizer=Optimizer(model, optimizer or AdamW(lr=1.0)),
        learning_rate=lambda step: 0.01 / (step + 1),
        batches=make_steps(4, rows_at_once=rows_at_once),
        state=TrainingState(),
        num_steps=4,
        precision=precision,
        clip_grad_norm=0.5,
        hooks=Hooks(log=records.append),
    )
    series = [value for record in records for value in (record["loss"], record["grad_norm"])]
    return {n: t.detach().clone() for n, t in named_weights(model).items()}, series


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_accumulation_equals_one_large_batch(rows_at_once: int, rank: int | None) -> None:
    assert len({count_targets([batch]) for batch in make_steps(1, rows_at_once=1)[0]}) > 1

    weights, series = trained(dtype=torch.float64, rank=rank)
    other_weights, other_series = trained(dtype=torch.float64, rank=rank, rows_at_once=rows_at_once)

    assert other_series == pytest.approx(series, rel=1e-13)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-10, atol=1e-12)


def test_accumulation_in_float32() -> None:
    _, series = trained()
    _, other = trained(rows_at_once=1)

    assert other == pytest.approx(series, rel=2e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "rank"), [("layer", None), ("layer", 4), ("cola_m", 4)])
def test_activation_checkpointing_changes_no_bit(
    mode: str, rank: int | None, precision: str
) -> None:
    weights, series = trained(rank=rank, precision=precision)
    other_weights, other_series = trained(
        rank=rank, precision=precision, activation_checkpointing=mode
    )

    assert other_series == series
    assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("optimizer", [AdamW(lr=1.0), Muon(lr=1.0)])
def test_training_twice_gives_the_same_bits(optimizer: AdamW | Muon) -> None:
    weights, series = trained(optimizer=optimizer)
    other_weights, other_series = trained(optimizer=optimizer)

    assert other_series == series
    assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())


def test_bfloat16_autocast_stays_near_float32() -> None:
    _, series = trained()
    other_weights, other_series = trained(precision="bfloat16")

    assert all(weight.dtype == torch.float32 for weight in other_weights.values())
    assert other_series != series
    assert other_series == pytest.approx(series, rel=0.05)
