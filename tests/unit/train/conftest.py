"""A tiny model and random batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from samara.data.rows import Batch
from samara.model.config import ColaConfig, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

VOCAB_SIZE = 61


@pytest.fixture
def make_model() -> Callable[..., SamaraForCausalLM]:
    """A function that makes a model of two layers, the same one each time it is called."""

    def make(
        *, dtype: torch.dtype = torch.float32, rank: int | None = None, **design: object
    ) -> SamaraForCausalLM:
        config = ModelConfig.model_validate(
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "head_dim": 8,
                "ffn_dim": 24,
                "vocab_size": VOCAB_SIZE,
                "cola": ColaConfig(rank=rank) if rank else None,
                **design,
            }
        )
        torch.manual_seed(3)
        return SamaraForCausalLM(SamaraConfig.from_design(config)).to(dtype)

    return make


@pytest.fixture
def make_batches() -> Callable[..., list[list[Batch]]]:
    """A function that makes steps of random micro-batches with some targets not counted."""

    def make(
        num_steps: int, *, micro_batches: int = 1, rows: int = 4, length: int = 12, seed: int = 0
    ) -> list[list[Batch]]:
        generator = torch.Generator().manual_seed(seed)
        steps = []
        for _ in range(num_steps):
            shape = (micro_batches * rows, length + 1)
            tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
            targets = tokens[:, 1:].clone()
            targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
            whole = {
                "input_ids": tokens[:, :-1].contiguous(),
                "targets": targets,
                "position_ids": torch.arange(length).expand(shape[0], length).contiguous(),
                "document_ids": torch.zeros(shape[0], length, dtype=torch.int64),
            }
            steps.append(
                [
                    {name: tensor[i : i + rows] for name, tensor in whole.items()}
                    for i in range(0, shape[0], rows)
                ]
            )
        return steps

    return make
