from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samara.errors import CheckpointError
from samara.model.modeling import SamaraForCausalLM
from samara.train.averaging import Averages, member_steps
from samara.train.checkpoint import named_weights

MakeModel = Callable[..., SamaraForCausalLM]


@pytest.mark.parametrize(
    ("num_steps", "every", "count", "expected"),
    [
        (350_000, 5000, 5, (330_000, 335_000, 340_000, 345_000, 350_000)),  # OpenELM
        (10, 4, 2, (8, 10)),
        (10, 4, 9, (4, 8, 10)),
        (3, 5, 2, (3,)),
    ],
)
def test_members_are_the_last_checkpoint_steps(
    num_steps: int, every: int, count: int, expected: tuple[int, ...]
) -> None:
    assert member_steps(num_steps=num_steps, every=every, count=count) == expected


def perturb(model: SamaraForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)


def test_mean_equals_the_mean_by_hand(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    averages = Averages(tmp_path, [2, 4, 6])
    for step in range(1, 7):
        perturb(model, step)
        averages.add(model, step=step)
    members = [
        load_file(tmp_path / f"step-0000000{step}" / "model.safetensors") for step in (2, 4, 6)
    ]

    averages.load_mean(model)

    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{s}" for s in (2, 4, 6)]
    for name, weight in named_weights(model).items():
        a, b, c = (member[name].double() for member in members)
        assert torch.equal(weight, ((a + b + c) / 3).float())
        assert not torch.equal(weight, members[-1][name])


def test_sum_is_float64(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    averages = Averages(tmp_path, [1, 2, 3])
    # In float32, 1e8 + 1 + 1 is 1e8.
    for step, value in ((1, 1e8), (2, 1.0), (3, 1.0)):
        torch.nn.init.constant_(model.model.norm.weight, value)
        averages.add(model, step=step)

    averages.load_mean(model)

    assert model.model.norm.weight[0].item() == float(torch.tensor((1e8 + 2) / 3).float())


def test_missing_member_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    averages = Averages(tmp_path, [1, 2])
    averages.add(model, step=2)

    with pytest.raises(CheckpointError, match=r"step-00000001: is missing, and the final model"):
        averages.load_mean(model)


def test_damaged_member_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    averages = Averages(tmp_path, [1])
    averages.add(model, step=1)
    file = tmp_path / "step-00000001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match="is cut off"):
        averages.load_mean(model)
