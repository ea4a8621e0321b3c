"""Gradient norm and sharpness, against what they are by definition."""

from __future__ import annotations

import pytest
import torch

from samara.data.rows import Batch
from samara.growth.indicators import landscape
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import named_weights
from samara.train.config import AdamW
from samara.train.objective import CausalLM
from samara.train.optim import Optimizer

DESIGN = ModelConfig(
    hidden_size=16, num_hidden_layers=2, head_dim=8, ffn_dim=24, vocab_size=40
).expand()


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (3, 9), generator=generator)
    positions = torch.arange(8).expand(3, 8)
    return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:], "position_ids": positions}


@pytest.fixture
def trained():
    """A model after two updates, and the optimizer that made them."""
    torch.manual_seed(0)
    model = SamaraForCausalLM(SamaraConfig.from_design(DESIGN)).double()
    optimizer = Optimizer(model, AdamW(lr=0.01))
    for seed in (1, 2):
        (CausalLM()(model, batch(seed)).loss / 24).backward()
        optimizer.set_lr(0.01)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def measure(model, optimizer, batches, lr=0.01):
    return landscape(
        model,
        optimizer=optimizer,
        objective=CausalLM(),
        batches=batches,
        precision="float32",
        lr=lr,
    )


def mean_loss(model, batches) -> torch.Tensor:
    return sum(CausalLM()(model, one).loss for one in batches) / (24 * len(batches))


def put(parameters, values) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def test_they_are_what_they_say(trained):
    model, optimizer = trained
    batches = [batch(3), batch(4)]
    found = measure(model, optimizer, batches, lr=1e-4)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(mean_loss(model, batches), parameters)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert found["gradient_norm"] == pytest.approx(norm)

    # The update that the optimizer makes next.
    before = [p.detach().clone() for p in parameters]
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.detach().clone()
    optimizer.set_lr(1e-4)
    optimizer.step()
    update = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    put(parameters, before)
    optimizer.load_state_dict(state)
    # From the slope of the loss along it, at two points close by.
    slopes = []
    for sign in (-0.5, 0.5):
        put(parameters, [b + sign * u for b, u in zip(before, update, strict=True)])
        gradients = torch.autograd.grad(mean_loss(model, batches), parameters)
        slopes.append(sum(float((g * u).sum()) for g, u in zip(gradients, update, strict=True)))
    length = sum(float((u**2).sum()) for u in update)
    exact = (slopes[1] - slopes[0]) / length
    assert found["sharpness"] == pytest.approx(exact, rel=1e-3)


def test_model_and_optimizer_are_as_before(trained):
    model, optimizer = trained
    weights = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    first = measure(model, optimizer, [batch(3)])
    assert measure(model, optimizer, [batch(3)]) == first
    assert all(torch.equal(weights[name], t) for name, t in named_weights(model).items())
    state = optimizer.state_dict()
    assert state.keys() == moments.keys()
    assert all(torch.equal(moments[name], tensor) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_a_fresh_optimizer_stays_fresh(trained):
    model, _ = trained
    optimizer = Optimizer(model, AdamW(lr=0.01))
    found = measure(model, optimizer, [batch(3)])
    assert optimizer.state_dict() == {}
    assert found["gradient_norm"] > 0.0
