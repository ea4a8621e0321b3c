"""Every row has one owner, nobody is too small, equal seeds agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.data.draws import Draws, Purpose
from samara.errors import ConfigError, DataError
from samara.federated.config import (
    DirichletPartition,
    IIDPartition,
    KeyPartition,
    QuantityPartition,
)
from samara.federated.partition import _dirichlet, partition, split_rows

LABELS = [f"label-{row % 4}" for row in range(400)]


def deal(config, *, rows=400, clients=8, seed=0, **fields):
    return partition(
        config, num_rows=rows, num_clients=clients, seed=seed, **{"labels": LABELS, **fields}
    )


@settings(max_examples=25)
@given(
    alpha=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    clients=st.integers(1, 20),
    least=st.integers(1, 12),
    seed=st.integers(0, 2**70),
    kind=st.sampled_from(["iid", "dirichlet", "quantity"]),
)
def test_every_row_has_one_owner_and_no_client_is_too_small(alpha, clients, least, seed, kind):
    config = {
        "iid": IIDPartition(),
        "dirichlet": DirichletPartition(alpha=alpha, min_rows=least),
        "quantity": QuantityPartition(alpha=alpha, min_rows=least),
    }[kind]
    parts = deal(config, clients=clients, seed=seed)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(400))
    assert min(map(len, parts)) >= (3 if kind == "iid" else max(3, least))
    again = deal(config, clients=clients, seed=seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_alpha_says_how_unlike_the_labels_of_the_clients_are():
    def largest_share(alpha):
        parts = deal(DirichletPartition(alpha=alpha), clients=10)
        counts = [np.bincount(rows % 4, minlength=4) / len(rows) for rows in parts]
        return np.mean([own.max() for own in counts])

    assert largest_share(0.1) > 0.6 > largest_share(1.0) > 0.4 > largest_share(100.0)


def test_iid_clients_are_of_one_size_and_quantity_clients_are_not():
    assert {len(rows) for rows in deal(IIDPartition())} == {50}
    sizes = [len(rows) for rows in deal(QuantityPartition(alpha=0.5))]
    assert max(sizes) > 3 * min(sizes)


def test_another_seed_is_another_partition():
    one, other = (deal(DirichletPartition(), seed=seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_natural_clients_are_the_values_of_a_field():
    keys = ["b"] * 5 + ["a"] * 4 + ["c"] * 2 + ["b"]
    config = KeyPartition(field="user")
    parts = partition(config, num_rows=12, num_clients=None, seed=0, keys=keys)
    assert [part.tolist() for part in parts] == [[5, 6, 7, 8], [0, 1, 2, 3, 4, 11]]
    largest = partition(config, num_rows=12, num_clients=1, seed=0, keys=keys)
    assert [part.tolist() for part in largest] == [[0, 1, 2, 3, 4, 11]]


def test_dirichlet_draws_have_the_mean_and_the_variance_of_their_distribution():
    draws = Draws(seed=1, purpose=Purpose.CLIENT_PARTITION)
    for alpha in (0.3, 2.0):
        found = np.array([_dirichlet(alpha, 4, draws) for _ in range(2000)])
        np.testing.assert_allclose(found.mean(axis=0), 0.25, atol=0.02)
        expected = 0.25 * 0.75 / (4 * alpha + 1)
        np.testing.assert_allclose(found.var(axis=0), expected, rtol=0.15)


@settings(max_examples=30)
@given(
    rows=st.integers(3, 60),
    validation=st.floats(0.01, 0.9),
    test=st.floats(0.01, 0.9),
    client=st.integers(0, 10**6),
)
def test_the_splits_of_a_client_are_disjoint_and_none_is_empty(rows, validation, test, client):
    own = np.arange(rows) * 7
    found = split_rows(own, validation=validation, test=test, seed=3, client=client)
    parts = [found.train, found.validation, found.test]
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == own.tolist()


def test_what_cannot_be_dealt_out_is_refused():
    with pytest.raises(ConfigError, match=r"clients.number: is required with partition iid"):
        deal(IIDPartition(), clients=None)
    with pytest.raises(
        DataError, match=r"60 clients of 10 rows or more need 600 rows, the data has 400"
    ):
        deal(DirichletPartition(), clients=60)
    with pytest.raises(DataError, match=r"3 wanted, the data has 1 values of 'user' with 3 rows"):
        partition(
            KeyPartition(field="user"), num_rows=4, num_clients=3, seed=0, keys=["a"] * 3 + ["b"]
        )


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    number=st.one_of(st.none(), st.integers(1, 6)),
)
def test_small_users_are_put_together_and_no_row_is_lost(sizes, number):
    if sum(sizes) < 8:
        sizes = [*sizes, 8]
    keys = [f"user-{user:02d}" for user, size in enumerate(sizes) for _ in range(size)]
    config = KeyPartition(field="user", min_rows=8, small="merge")
    if number is not None and number > sum(size >= 8 for size in sizes):
        number = None
    parts = partition(config, num_rows=len(keys), num_clients=number, seed=0, keys=keys)
    assert sorted(row for part in parts for row in part) == list(range(len(keys)))
    assert all(len(part) >= 8 for part in parts)
    assert number is None or len(parts) == number
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)
    owners = [{keys[row] for row in part} for part in parts]
    assert sum(map(len, owners)) == len(sizes)  # no user is split
    if number is None:  # whoever has enough stays alone
        alone = [own for own in owners if len(own) == 1]
        assert len(alone) >= sum(size >= 8 for size in sizes) - 1
