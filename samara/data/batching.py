"""Cutting a stream of texts into batches that bound both their number and their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batches(
    items: Iterable[Item], *, size: Callable[[Item], int], max_items: int, max_size: int
) -> Iterator[list[Item]]:
    """Yield lists of at most ``max_items`` items whose sizes add up to about ``max_size``.

    An item larger than ``max_size`` comes alone or ends its batch.
    """
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if len(batch) == max_items or total >= max_size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
