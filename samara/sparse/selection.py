"""Selection: from a model and samples to a support of exactly K entries, within memory.

Matrices are done in groups whose gradient sums fit the limit; of each group only the scores stay,
in float32 on the host (4 bytes a target weight; a column or block counts once). Then the budget is
divided (:mod:`samara.sparse.budget`) and the best of each matrix are taken, exactly and
deterministically (:mod:`samara.sparse.top_k`).
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.errors import ConfigError, did_you_mean
from samara.sparse.attach import Use, input_dim, linear_weights
from samara.sparse.budget import allocate
from samara.sparse.calibration import Calibration, GradientSums, Pruning, gradient_sums
from samara.sparse.config import SelectionConfig
from samara.sparse.scores import Score, rms_normalized
from samara.sparse.support import Support, TensorSupport, whole
from samara.sparse.top_k import Scored, count_best, top_k
from samara.sparse.units import Units, root_mean_square
from samara.train.objective import count_targets

QUERY_AND_KEY = frozenset(
    ("q_proj", "k_proj", "query", "key", "query_proj", "key_proj", "q_lin", "k_lin", "q", "k")
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A support, and how it came about.

    Attributes:
        support: Which entries are trained.
        record: Plain data: score, budget, counts by tensor, samples, seconds.
    """

    support: Support
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A matrix that entries are chosen from."""

    weight: nn.Parameter
    units: Units
    score: Score


def select(
    model: PreTrainedModel,
    config: SelectionConfig,
    calibration: Calibration,
    *,
    seed: int,
    include: Support | None = None,
) -> Selection:
    """Choose the entries to train.

    Args:
        model: On its device; not changed.
        config: Score, budget, shape of the support.
        calibration: Samples and loss; the first ``config.num_samples`` are used.
        seed: Of scores that draw numbers.
        include: Entries that are in the support whatever their score, within the budget.

    Raises:
        ConfigError: If a pattern matches nothing, or there is nothing to choose from.
        NonFiniteLossError: If gradients are not finite.
    """
    start = time.perf_counter()
    full = _matching(model, config.train_fully, key="train_fully")
    targets = _targets(model, config, seed=seed, without=full)
    total = _total(config, targets)
    samples = calibration.samples[: config.num_samples]
    calibration = Calibration(
        objective=calibration.objective, samples=samples, precision=calibration.precision
    )
    scores = _scores(model, config, calibration, targets, total)
    if config.granularity == "two_level" and config.column_share < 1.0:
        _keep_best_columns(model, config, calibration, targets, scores)
    included = dict(include.indices) if include is not None else {}
    counts, masses = _divide(config, targets, scores, total, included, device=model.device)
    tensors = {
        name: TensorSupport(
            shape=targets[name].units.shape,
            index=targets[name].units.entries(top_k(scores[name].to(model.device), count).cpu()),
            block=targets[name].units.block,
        )
        for name, count in counts.items()
        if count
    }
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    support = Support(tensors={**tensors, **{name: whole(shapes[name]) for name in full}})
    record = {
        **_record(config, support, samples),
        "target_weights": sum(t.weight.numel() for t in targets.values()),
        "trained_fully": full,
        "samples": len(samples) if _needs_gradients(targets) else 0,
        "best_by_tensor": masses,
        "seconds": time.perf_counter() - start,
    }
    return Selection(support=support, record=record)


def _record(config: SelectionConfig, support: Support, samples: Sequence[Batch]) -> dict[str, Any]:
    """What the choice was made by, and what came out."""
    return {
        "score": config.score,
        "exponents": config.exponents,
        "granularity": config.granularity,
        "rho": config.rho,
        "normalize": config.normalize,
        "entries": support.num_entries,
        "entries_by_tensor": {n: t.index.numel() for n, t in support.tensors.items()},
        "support_id": support.support_id,
        # A sample's loss is a mean over its targets: short answers weigh as much as long ones.
        "target_tokens": [count_targets([sample]) for sample in samples],
    }


def target_names(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """The matrices that a setting means, in the order of the model.

    Raises:
        ConfigError: If a pattern matches no linear weight.
    """
    linear = linear_weights(model)
    if targets == "linear":
        return list(linear)
    if targets == "without_qk":
        return [name for name in linear if not QUERY_AND_KEY & set(name.split("."))]
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    chosen: set[str] = set()
    for pattern in targets:
        found = fnmatch.filter(matrices, pattern)
        if not found:
            near = did_you_mean(pattern, linear)
            raise ConfigError(f"targets: no matrix matches {pattern}{near}")
        chosen.update(found)
    return [name for name, _ in model.named_parameters() if name in chosen]


def _targets(
    model: PreTrainedModel, config: SelectionConfig, *, seed: int, without: Sequence[str]
) -> dict[str, _Target]:
    linear: Mapping[str, Use] = linear_weights(model)
    parameters = dict(model.named_parameters())
    names = [n for n in target_names(model, config.targets) if n not in without]
    targets = {}
    for name in names:
        weight = parameters[name]
        rows, columns = weight.shape
        # An embedding's input is the vocabulary: its row of the matrix is what a token chooses.
        facing = input_dim(linear[name]) if name in linear else 0
        targets[name] = _Target(
            weight=weight,
            units=Units(shape=(rows, columns), granularity=config.granularity, input_dim=facing),
            score=Score(
                name=config.score, exponents=config.exponents, density=config.share(), seed=seed
            ),
        )
    if not targets:
        raise ConfigError("targets: the model has no linear layer to choose weights from")
    return targets


def _matching(model: nn.Module, patterns: Sequence[str], *, key: str) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"{key}: no tensor matches {pattern}{did_you_mean(pattern, names)}")
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]


def _total(config: SelectionConfig, targets: Mapping[str, _Target]) -> int:
    available = sum(target.weight.numel() for target in targets.values())
    if config.num_entries is not None:
        if config.num_entries > available:
            raise ConfigError(
                f"num_entries: {config.num_entries} exceeds the {available} weights of the targets"
            )
        return config.num_entries
    return max(1, round(config.share() * available))


def _needs_gradients(targets: Mapping[str, _Target]) -> bool:
    return next(iter(targets.values())).score.needs_gradients


def _scores(
    model: PreTrainedModel,
    config: SelectionConfig,
    calibration: Calibration,
    targets: Mapping[str, _Target],
    total: int,
) -> dict[str, Tensor]:
    """Unit scores of all targets, flat float32 on the host."""
    found: dict[str, Tensor] = {}
    available = sum(target.weight.numel() for target in targets.values())
    pruning = None
    if config.candidates is not None:
        share = config.candidates * total / available
        pruning = Pruning(
            keep={n: max(1, round(share * t.weight.numel())) for n, t in targets.items()},
            score=lambda name, sums: targets[name].score(name, targets[name].weight, sums),
        )
    for group in _groups(config, targets):
        weights = {name: targets[name].weight for name in group}
        sums: dict[str, GradientSums] = {}
        if _needs_gradients(targets):
            sums = gradient_sums(
                model,
                weights,
                calibration,
                dtype=getattr(torch, config.accumulators),
                pruning=pruning,
            )
        for name in group:
            target = targets[name]
            entries = target.score(name, target.weight, sums.pop(name, None))
            units = target.units.scores(entries)
            if config.normalize == "rms":
                units = rms_normalized(units)
            found[name] = units.to(device="cpu", dtype=torch.float32)
    return found


def _groups(config: SelectionConfig, targets: Mapping[str, _Target]) -> Iterator[list[str]]:
    """Names in order, in groups whose gradient sums fit the limit; one matrix at least."""
    limit = config.accumulator_gigabytes * 1e9
    weight_bytes = 2 * getattr(torch, config.accumulators).itemsize
    group: list[str] = []
    taken = 0.0
    for name, target in targets.items():
        needed = weight_bytes * target.weight.numel()
        if group and taken + needed > limit:
            yield group
            group, taken = [], 0.0
        group.append(name)
        taken += needed
    if group:
        yield group


def _keep_best_columns(
    model: PreTrainedModel,
    config: SelectionConfig,
    calibration: Calibration,
    targets: Mapping[str, _Target],
    scores: dict[str, Tensor],
) -> None:
    """Set scores outside each layer's best input columns to 0.

    Layers that read the same tensor (queries, keys and values) share their columns, chosen by the
    sum of the column scores: one slice of the input serves all.
    """
    for names in shared_inputs(model, list(targets), calibration):
        by_column = [
            root_mean_square(scores[n].view(targets[n].units.shape), dim=1 - _facing(targets[n]))
            for n in names
        ]
        total = torch.stack(by_column).sum(dim=0)
        kept = top_k(total, max(1, round(config.column_share * total.numel())))
        keep = torch.zeros_like(total)
        keep[kept] = 1.0
        for name in names:
            shape = targets[name].units.shape
            mask = keep[None, :] if _facing(targets[name]) == 1 else keep[:, None]
            scores[name] = (scores[name].view(shape) * mask).flatten()


def _facing(target: _Target) -> int:
    return target.units.input_dim


def shared_inputs(
    model: PreTrainedModel, names: Sequence[str], calibration: Calibration
) -> list[list[str]]:
    """Group linear weights by the tensor that they read, found by running one sample.

    Raises:
        ConfigError: If there is no sample.
    """
    if not calibration.samples:
        raise ConfigError("two_level: needs a sample to see which layers share their input")
    linear = linear_weights(model)
    groups: list[list[str]] = []
    last: list[Tensor | None] = [None]  # held, so that its address is not used again

    def watch(name: str, use: Use) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if any(name in group for group in groups):
                return
            if groups and arguments[0] is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[0] = arguments[0]

        return use.module.register_forward_pre_hook(hook)

    handles = [
        watch(name, linear[name])
        for name in names
        if name in linear and linear[name].attribute != "cola_b"
    ]
    sample = {key: tensor.to(model.device) for key, tensor in calibration.samples[0].items()}
    was_training = model.training
    model.train(False)
    with torch.no_grad(), calibration.autocast(model.device):
        calibration.objective(model, sample)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    seen = {name for group in groups for name in group}
    return groups + [[name] for name in names if name not in seen]


def _divide(
    config: SelectionConfig,
    targets: Mapping[str, _Target],
    scores: dict[str, Tensor],
    total: int,
    included: Mapping[str, Tensor],
    *,
    device: torch.device,
) -> tuple[dict[str, int], dict[str, int]]:
    """Units of each matrix, and its entries among the best of all."""
    floors = {}
    for name, target in targets.items():
        units = target.units.unit_of(included.get(name, torch.empty(0, dtype=torch.int64)))
        scores[name][units] = torch.inf
        floors[name] = units.numel() * target.units.size
    masses = count_best(
        lambda: (
            Scored(scores=scores[n].to(device), unit=t.units.size) for n, t in targets.items()
        ),
        total,
    )
    sizes = [target.weight.numel() for target in targets.values()]
    capacities = [
        min(t.weight.numel(), int((scores[n] > 0).sum()) * t.units.size) for n, t in targets.items()
    ]
    entries = allocate(
        total,
        sizes=sizes,
        capacities=capacities,
        masses=masses,
        floors=list(floors.values()),
        rho=config.rho,
        clamp=config.clamp,
    )
    unit_sizes = [target.units.size for target in targets.values()]
    rounded = round_to_units(entries, unit_sizes, capacities)
    if not any(rounded):
        raise ConfigError(
            f"density: {total} entries are less than one {config.granularity} of "
            f"{min(unit_sizes)} entries; raise the density, or take a finer granularity"
        )
    return (
        dict(zip(targets, rounded, strict=True)),
        dict(zip(targets, masses, strict=True)),
    )


def round_to_units(
    entries: Sequence[int], units: Sequence[int], capacities: Sequence[int]
) -> list[int]:
    """Whole units of each matrix, with no more entries in all than asked for.

    Fractions of units are collected and given out again by largest remainder, where they suffice.
    """
    counts = [count // unit for count, unit in zip(entries, units, strict=True)]
    left = sum(count % unit for count, unit in zip(entries, units, strict=True))
    order = sorted(range(len(units)), key=lambda i: -(entries[i] % units[i]) / units[i])
    for place in order:
        has_more = (counts[place] + 1) * units[place] <= capacities[place]
        if units[place] <= left and has_more:
            counts[place] += 1
            left -= units[place]
    return counts
