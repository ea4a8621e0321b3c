"""The optimizer's state of a grown model, by the same index maps as its weights.

AdamW's moments follow the gradient's rule (:mod:`samara.growth.axes`); Muon's momentum is a first
moment. AdamW keeps one age (``step``) per tensor, so that a widened tensor would hold entries of
two ages: with zero moments at a high age, the first update of a new entry is as large as
(1 - b1) / sqrt(1 - b2) of the learning rate, 3.16 at (0.9, 0.999). Such a tensor is given the
highest age at which no gradient can move a new entry by more than the learning rate, and the old
moments are restated for that age: corrected for bias they are what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from samara.growth.axes import TensorRule, grow_moment
from samara.growth.operator_config import OperatorConfig
from samara.growth.parameters import GrownParameter

POWERS: dict[str, Literal[1, 2]] = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}

Betas = tuple[float, float]


def grow_optimizer(
    parameters: Iterable[GrownParameter],
    optimizer: Mapping[str, Tensor],
    *,
    operator: OperatorConfig,
    betas: Betas,
) -> dict[str, Tensor]:
    """Make the larger model's optimizer state, on storage of its own.

    Args:
        parameters: The larger model's.
        optimizer: The smaller model's state, ``{parameter name}.{key}``.
        operator: What moments do.
        betas: AdamW's decay rates.
    """
    return {
        f"{parameter.name}.{key}": value
        for parameter in parameters
        for key, value in _entries(parameter, optimizer, operator=operator, betas=betas).items()
    }


def _entries(
    parameter: GrownParameter,
    optimizer: Mapping[str, Tensor],
    *,
    operator: OperatorConfig,
    betas: Betas,
) -> dict[str, Tensor]:
    """The state of one parameter, by key; empty: it starts afresh, at age 0.

    What is fresh: a layer without source, and one whose output starts at zero, as the gradients of
    its source are none of its own. Under ``moments: zero`` every new layer.
    """
    starts_afresh = parameter.has_zero_output or (parameter.is_new and operator.moments == "zero")
    if parameter.rule is None or operator.moments == "reset" or starts_afresh:
        return {}
    found = [
        {
            key: optimizer[f"{source}.{key}"]
            for key in (*POWERS, "step")
            if f"{source}.{key}" in optimizer
        }
        for source in parameter.sources
    ]
    if not all(found):
        return {}
    rule, first = parameter.rule, found[0]
    entries = {
        key: torch.stack([_grow(state[key], key, rule, operator) for state in found]).mean(dim=0)
        for key in first
        if key != "step"
    }
    if "step" in first:
        entries["step"] = first["step"].clone()
    young = rule.repeated_entries if operator.moments == "zero" else rule.new_entries
    if young.any():
        for key in entries.keys() & POWERS.keys():
            entries[key].masked_fill_(young.to(entries[key].device), 0.0)
        if "step" in entries:
            entries = restate(entries, betas=betas)
    return entries


def _grow(moment: Tensor, key: str, rule: TensorRule, operator: OperatorConfig) -> Tensor:
    if operator.moments == "copy":
        return rule.gather(moment)
    return grow_moment(moment, rule, power=POWERS[key])


def restate(entries: Mapping[str, Tensor], *, betas: Betas) -> dict[str, Tensor]:
    """AdamW's state at the highest age where a zero entry's first update is at most lr.

    The moments corrected for bias, m / (1 - b1^t) and v / (1 - b2^t), do not change.
    """
    age = int(entries["step"].item())
    younger = highest_safe_age(age, betas)
    if younger == age:
        return dict(entries)
    shares = [(1 - beta**younger) / (1 - beta**age) for beta in betas]
    return {
        "exp_avg": entries["exp_avg"] * shares[0],
        "exp_avg_sq": entries["exp_avg_sq"] * shares[1],
        "step": torch.full_like(entries["step"], younger),
    }


@functools.cache
def highest_safe_age(age: int, betas: Betas) -> int:
    """The highest age up to ``age`` at which :func:`first_update` of a zero entry is at most 1.

    At age 0 it is 1. From there it falls, if at all, before it rises to its limit.
    """
    safe = 0
    for candidate in range(1, age + 1):
        if first_update(candidate, betas) > 1:
            break
        safe = candidate
        if max(betas) ** candidate < 1e-9:
            return age  # as good as at its limit, and still below 1
    return safe


def first_update(age: int, betas: Betas) -> float:
    """The largest |first update| / lr of an entry with m = v = 0 in a tensor of that age."""
    beta1, beta2 = betas
    steps = age + 1
    corrections = (1 - beta2**steps) ** 0.5 / (1 - beta1**steps)
    return float((1 - beta1) / (1 - beta2) ** 0.5 * corrections)
