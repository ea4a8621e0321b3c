"""The server's optimizers: Flower's arithmetic, and what nobody sent stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samara.federated.aggregation import Layout
from samara.federated.methods_config import FedAdagrad, FedAdam, FedAvg, FedYogi
from samara.federated.proximal import ProximalTerm
from samara.federated.server_optimizers import Moments, update

LAYOUT = Layout(
    shapes={"l0": (3, 2), "l1": (3, 2), "head": (4,)},
    groups={"l0": "0", "l1": "1", "head": "head"},
    num_layers=2,
)
ALL = ("0", "1", "head")
KINDS = [FedAdam(), FedYogi(), FedAdagrad()]


def draw(seed, scale=1.0):
    noise = np.random.default_rng(seed)
    return {
        name: (scale * noise.standard_normal(shape)).astype(np.float32)
        for name, shape in LAYOUT.shapes.items()
    }


def step(config, moments, previous, averaged, sent=ALL):
    return update(config, moments, previous=previous, averaged=averaged, sent=sent, layout=LAYOUT)


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad"])
@pytest.mark.parametrize("lr", [1.0, 0.03])
def test_the_arithmetic_is_that_of_flower_bit_for_bit(name, lr, monkeypatch):
    pytest.importorskip("flwr")
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import strategy

    def as_record(tensors):
        return ArrayRecord({key: Array(value) for key, value in tensors.items()})

    betas = {} if name == "FedAdagrad" else {"beta_1": 0.8, "beta_2": 0.95}
    theirs = getattr(strategy, name)(eta=lr, tau=1e-2, **betas)
    # What the clients sent is averaged before; here the mean is given.
    monkeypatch.setattr(
        strategy.FedAvg, "aggregate_train", lambda _, round, mean: (as_record(mean), None)
    )
    own = {"betas": (0.8, 0.95)} if betas else {}
    config = {"FedAdam": FedAdam, "FedYogi": FedYogi, "FedAdagrad": FedAdagrad}[name](
        lr=lr, tau=1e-2, **own
    )
    values, moments = draw(0), Moments()
    for round in range(1, 6):
        mean = draw(round, scale=0.3)
        theirs.current_arrays = values
        expected, _ = theirs.aggregate_train(round, mean)
        values, moments = step(config, moments, values, mean)
        for key in values:
            assert values[key].dtype == np.float32
            np.testing.assert_array_equal(values[key], expected[key].numpy().astype(np.float32))


def test_fedavg_is_the_mean_itself():
    mean = draw(1)
    values, moments = step(FedAvg(), Moments(), draw(0), mean)
    assert all(values[name] is mean[name] for name in mean)
    assert moments == Moments()


@pytest.mark.parametrize("config", KINDS, ids=lambda own: own.kind)
@settings(max_examples=15, deadline=None)
@given(rounds=st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_layer_that_nobody_sent_keeps_value_moments_and_count(config, rounds):
    """However often layer 1 is left out, it goes on as if those rounds had not been."""
    values, moments = draw(0), Moments()
    only, own = dict(values), Moments()
    for number, is_sent in enumerate(rounds):
        mean = draw(number + 1)
        sent = ALL if is_sent else ("0", "head")
        averaged = mean if is_sent else {**mean, "l1": values["l1"]}
        before = values["l1"]
        values, moments = step(config, moments, values, averaged, sent)
        if is_sent:
            only, own = step(config, own, only, {**only, "l1": mean["l1"]}, ("1",))
        else:
            np.testing.assert_array_equal(values["l1"], before)
        np.testing.assert_array_equal(values["l1"], only["l1"])
    assert moments.steps.get("1", 0) == own.steps.get("1", 0) == sum(rounds)


def test_moments_come_back_from_a_file_under_their_names():
    _, moments = step(FedAdam(), Moments(), draw(0), draw(1), ("0", "head"))
    written = {**moments.tensors("last"), **Moments().tensors("best")}
    again = Moments.of("last", written, moments.steps)
    assert again.steps == {"0": 1, "head": 1}
    assert again.mean.keys() == again.square.keys() == {"l0", "head"}
    assert Moments.of("best", written, {}) == Moments()


def test_the_pull_is_the_gradient_of_half_the_squared_distance():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    skipped = nn.Parameter(torch.randn(2))
    pull = ProximalTerm(0.7, [*parameters, skipped])
    starts = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))

    def loss():
        return sum((p**3).sum() for p in parameters)

    pairs = zip(parameters, starts, strict=True)
    whole = loss() + 0.35 * sum(((p - start) ** 2).sum() for p, start in pairs)
    expected = torch.autograd.grad(whole, parameters)
    torch.autograd.backward(loss())
    pull.add()
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert skipped.grad is None
