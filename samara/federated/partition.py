"""Whose rows are whose: the data of the clients, and each client's three splits.

Equal seed, equal partition. Drawn from raw random bits with arithmetic of our own, so that no
release of numpy moves a row to another client.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samara.data.draws import Draws, Purpose
from samara.errors import ConfigError, DataError
from samara.federated.config import (
    DirichletPartition,
    IIDPartition,
    KeyPartition,
    Partition,
    QuantityPartition,
)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LEAST_ROWS = 3
"""One for each split of a client."""


@dataclass(frozen=True, kw_only=True)
class ClientRows:
    """The rows of one client, ascending and disjoint, none of them empty."""

    train: IntArray
    validation: IntArray
    test: IntArray


def partition(
    config: Partition,
    *,
    num_rows: int,
    num_clients: int | None,
    seed: int,
    labels: Sequence[Hashable] | None = None,
    keys: Sequence[Hashable] | None = None,
) -> list[IntArray]:
    """Deal the rows out; every row goes to one client, except those of users that are left out.

    Args:
        config: How.
        num_rows: Rows there are.
        num_clients: Clients to make. With natural keys: so many of the largest, or made by putting
            the smallest together; None: all.
        seed: Of the run.
        labels: Of each row, for ``dirichlet``.
        keys: Of each row, for ``key``.

    Returns:
        Row numbers per client, ascending. Of natural clients in the order of their keys.

    Raises:
        ConfigError: If a number of clients is needed and not given.
        DataError: If there are too few rows or keys.
    """
    if isinstance(config, KeyPartition):
        assert keys is not None
        return _by_key(config, keys, num_clients)
    if num_clients is None:
        raise ConfigError(f"clients.number: is required with partition {config.kind}")
    least = LEAST_ROWS if isinstance(config, IIDPartition) else max(LEAST_ROWS, config.min_rows)
    if num_rows < least * num_clients:
        raise DataError(
            f"clients.number: {num_clients} clients of {least} rows or more need "
            f"{least * num_clients} rows, the data has {num_rows}; take fewer clients"
        )
    draws = Draws(seed=seed, purpose=Purpose.CLIENT_PARTITION)
    match config:
        case IIDPartition():
            return [np.sort(p) for p in np.array_split(draws.permutation(num_rows), num_clients)]
        case QuantityPartition():
            parts = [_deal(draws.permutation(num_rows), config.alpha, num_clients, draws)]
        case DirichletPartition():
            assert labels is not None
            parts = [
                _deal(rows[draws.permutation(len(rows))], config.alpha, num_clients, draws)
                for rows in _grouped(labels).values()
            ]
    owned = [np.concatenate([part[client] for part in parts]) for client in range(num_clients)]
    return [np.sort(rows) for rows in _repaired(owned, least=least, draws=draws)]


def _by_key(
    config: KeyPartition, keys: Sequence[Hashable], num_clients: int | None
) -> list[IntArray]:
    least = max(LEAST_ROWS, config.min_rows)
    groups = list(_grouped(keys).values())
    if config.small == "merge":
        groups = _merged(groups, least=least, most=num_clients)
    groups = [rows for rows in groups if len(rows) >= least]
    if not groups or (num_clients or 0) > len(groups):
        raise DataError(
            f"clients.number: {num_clients or 1} wanted, the data has {len(groups)} values of "
            f"'{config.field}' with {least} rows or more"
        )
    if num_clients is not None:
        largest = sorted(range(len(groups)), key=lambda number: -len(groups[number]))
        groups = [groups[number] for number in sorted(largest[:num_clients])]
    return groups


def _merged(groups: list[IntArray], *, least: int, most: int | None) -> list[IntArray]:
    """Put the smallest groups together until all have enough rows and there are no more than most.

    A group made of several stands where the first of them stood.
    """
    left = [(len(rows), place, rows) for place, rows in enumerate(groups)]
    heapq.heapify(left)
    while len(left) > 1 and (left[0][0] < least or len(left) > (most or len(left))):
        one, other = heapq.heappop(left), heapq.heappop(left)
        rows = np.sort(np.concatenate([one[2], other[2]]))
        heapq.heappush(left, (len(rows), min(one[1], other[1]), rows))
    return [rows for _, _, rows in sorted(left, key=lambda entry: entry[1])]


def _grouped(values: Sequence[Hashable]) -> dict[Hashable, IntArray]:
    """Row numbers by value, in the order of the values as text: not in that of the file."""
    found: dict[Hashable, list[int]] = {}
    for row, value in enumerate(values):
        found.setdefault(value, []).append(row)
    return {value: np.array(found[value]) for value in sorted(found, key=str)}


def _deal(rows: IntArray, alpha: float, num_clients: int, draws: Draws) -> list[IntArray]:
    """Cut rows in pieces whose sizes are a draw from a symmetric Dirichlet distribution."""
    shares = _dirichlet(alpha, num_clients, draws)
    ends = np.floor(np.cumsum(shares) * len(rows) + 0.5).astype(np.int64)
    return np.split(rows, ends[:-1])


def _dirichlet(alpha: float, count: int, draws: Draws) -> FloatArray:
    """Gamma(alpha) draws over their sum; as logarithms, since at alpha 0.01 they underflow."""
    logs = np.array([_log_gamma_draw(alpha, draws) for _ in range(count)])
    weights = np.exp(logs - logs.max())
    result: FloatArray = weights / weights.sum()
    return result


def _log_gamma_draw(shape: float, draws: Draws) -> float:
    """Logarithm of a draw from Gamma(shape): Marsaglia and Tsang 2000, below 1 by their boost."""
    if shape < 1:
        boost = math.log(_open_uniform(draws)) / shape
        return _log_gamma_draw(shape + 1, draws) + boost
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        radius = math.sqrt(-2 * math.log(_open_uniform(draws)))
        normal = radius * math.cos(2 * math.pi * _open_uniform(draws))
        cube = (1 + c * normal) ** 3
        if cube <= 0:
            continue
        if math.log(_open_uniform(draws)) < normal**2 / 2 + d - d * cube + d * math.log(cube):
            return math.log(d) + math.log(cube)


def _open_uniform(draws: Draws) -> float:
    """In (0, 1]."""
    return 1.0 - float(draws.uniform(1)[0])


def _repaired(owned: list[IntArray], *, least: int, draws: Draws) -> list[IntArray]:
    """Move rows from the largest clients to those that have too few."""
    parts = [list(rows) for rows in owned]
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            place = int(draws.integers(1, below=len(largest))[0])
            part.append(largest.pop(place))
    return [np.array(part, dtype=np.int64) for part in parts]


def split_rows(
    rows: IntArray, *, validation: float, test: float, seed: int, client: int
) -> ClientRows:
    """Split one client's rows; each split has one row at least.

    Args:
        rows: The client's, three or more.
        validation: Share of them.
        test: Share of them.
        seed: Of the run.
        client: Its number.
    """
    assert len(rows) >= LEAST_ROWS, "three splits need three rows"
    order = Draws(seed=seed, purpose=Purpose.CLIENT_SPLIT, row=client).permutation(len(rows))
    held_out = [max(1, int(share * len(rows) + 0.5)) for share in (validation, test)]
    while sum(held_out) >= len(rows):
        held_out[held_out.index(max(held_out))] -= 1
    first, second = held_out[0], sum(held_out)
    return ClientRows(
        train=np.sort(rows[order[second:]]),
        validation=np.sort(rows[order[:first]]),
        test=np.sort(rows[order[first:second]]),
    )
