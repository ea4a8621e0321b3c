"""``samara design --fit``: the best design under limits of size, compute, memory or time.

The rule, in full:

* **Candidates** grow from the recipe's design: every hidden size up to 8192 (multiples of what the
  heads need, in steps of about 6 %), and depths whose aspect ratio, hidden size over layers, is
  within 1.5 times the recipe's. Loss hardly depends on shape there: Kaplan et al. (arXiv
  2001.08361, section 3.1) saw few percent over a factor of 40 in aspect ratio. Four families are
  searched: uniform and layer-wise widths (OpenELM, arXiv 2404.14619), dense and low-rank (CoLA,
  arXiv 2502.10940). Each keeps the recipe's own ratios where the recipe has them, else the
  published ones.
* **Tokens**: as many as ``flops`` and ``hours`` pay for, in whole steps; the recipe's own number
  where neither is given.
* **Score**: Chinchilla's parametric law (Hoffmann et al., arXiv 2203.15556, approach 3) with the
  coefficients refitted by Besiroglu et al. (arXiv 2404.10102),
  ``loss = 1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658``, for N parameters (the vocabulary
  matrix counted once: the fit's models are tied) and D tokens. The lowest wins.
* **The answer is of the recipe's own family.** The law sees how many parameters there are, not
  where they stand: it cannot tell uniform from layer-wise. No law for low rank is published;
  there N is what is trained, so equal compute is compared with equal compute.

The law ranks designs; it forecasts nobody's loss, which hangs on the text and the tokenizer. It
assumes text that is not repeated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samara.errors import ConfigError, did_you_mean
from samara.measure.budget import Budget, budget
from samara.measure.config import DeviceProfile
from samara.measure.design import ASSUMED_UTILIZATION, DesignInput, estimated_speed, prefixed
from samara.measure.devices import device_profile
from samara.measure.memory import training_memory
from samara.model.config import ModelConfig
from samara.model.layerwise_scaling import make_divisible

# Besiroglu et al. (arXiv 2404.10102), table 1: Chinchilla's approach 3, fitted again.
IRREDUCIBLE, SIZE, SIZE_EXPONENT = 1.8172, 482.01, 0.3478
DATA, DATA_EXPONENT = 2085.43, 0.3658
# Hoffmann et al. (arXiv 2203.15556), abstract: what the law was fitted to.
FITTED_PARAMETERS = (70e6, 16e9)
FITTED_TOKENS = (5e9, 500e9)

LARGEST_HIDDEN_SIZE = 8192
WIDTH_STEPS = 16  # steps from one hidden size to its double, where the heads allow as many
DEPTH_STEPS = 12  # depths tried for one hidden size, at most about
ASPECT_RATIO_BAND = 1.5
FEWEST_STEPS = 1000  # the batch is halved until a run has as many
LEAST_BYTES_PER_PARAMETER = 12  # weight, gradient and one moment, float32: any optimizer's least
UNIFORM_FFN_DIVISOR = 64
RANK_DIVISOR = 16
LAYERWISE_ALPHA, LAYERWISE_BETA = (0.5, 1.0), (0.5, 4.0)  # OpenELM, section 2.1
UNIFORM_FFN = 8 / 3  # Llama (arXiv 2302.13971), section 2.2
COLA_RANK = 1 / 4  # CoLA, section 5

_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")
_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6}
_BINARY = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
_UNITS: dict[str, dict[str, float]] = {
    "params": {**_DECIMAL, "B": 1e9},
    "flops": {**_DECIMAL, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21},
    "memory": {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, **_BINARY},
    "hours": {"": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a design and its training may cost; None: as much as they like."""

    params: float | None = None
    """Parameters, all of them."""
    flops: float | None = None
    """Floating-point operations of the whole run."""
    memory: float | None = None
    """Bytes of training on one device."""
    hours: float | None = None
    """Time on one device, estimated."""


def parse_limits(texts: Sequence[str]) -> Limits:
    """Read limits: ``params=30M``, ``flops=8e15``, ``memory=8GB``, ``hours=8``; several by comma.

    Raises:
        ConfigError: If one is unknown, written twice, or no positive number of its unit.
    """
    found: dict[str, float] = {}
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        key, separator, raw = (piece.strip() for piece in text.partition("="))
        if not separator:
            raise ConfigError(f"--fit {text}: is written key=value, as params=30M")
        if key not in _UNITS:
            raise ConfigError(f"--fit {text}: unknown limit '{key}'{did_you_mean(key, _UNITS)}")
        if key in found:
            raise ConfigError(f"--fit {text}: {key} is given twice; keep one")
        found[key] = _amount(text, key, raw)
    return Limits(**found)


def _amount(text: str, key: str, raw: str) -> float:
    match = _NUMBER.fullmatch(raw)
    units = _UNITS[key]
    known = ", ".join(unit for unit in units if unit)
    if match is None:
        example = {"params": "30M", "flops": "8e15", "memory": "8GB", "hours": "8"}[key]
        raise ConfigError(f"--fit {text}: '{raw}' is no number; write {key}={example}")
    if match[2] not in units:
        wrong = f"unknown unit '{match[2]}'" if match[2] else "has no unit"
        known = f" (known: {known})" if known else "; give a plain number"
        raise ConfigError(f"--fit {text}: {wrong}{known}")
    amount = float(match[1]) * units[match[2]]
    if not 0 < amount < math.inf:
        raise ConfigError(f"--fit {text}: must be more than 0")
    return amount


def predicted_loss(*, parameters: float, tokens: float) -> float:
    """Chinchilla's law as refitted (arXiv 2404.10102): nats per token of its own text."""
    size, data = math.pow(parameters, SIZE_EXPONENT), math.pow(tokens, DATA_EXPONENT)
    return IRREDUCIBLE + SIZE / size + DATA / data


@dataclass(frozen=True, kw_only=True)
class Family:
    """A way to derive all widths from a hidden size and a depth.

    Attributes:
        layerwise: Whether widths grow with depth.
        alpha: Query width over hidden size, first and last layer.
        beta: FFN width over hidden size, first and last layer.
        gqa_group_size: Query heads that share one key-value head.
        ffn_dim_divisor: FFN widths are multiples of this.
        rank: Bottleneck over hidden size; None: dense.
    """

    layerwise: bool
    alpha: tuple[float, float]
    beta: tuple[float, float]
    gqa_group_size: int
    ffn_dim_divisor: int
    rank: float | None

    @property
    def name(self) -> str:
        widths = "layer-wise" if self.layerwise else "uniform"
        return f"{widths}, {'dense' if self.rank is None else 'CoLA'}"

    def shape(self, base: ModelConfig, hidden_size: int, num_layers: int) -> dict[str, Any]:
        """The keys of a recipe's model section that make the widths, short."""
        keys: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "head_dim": base.head_dim,
            "gqa_group_size": self.gqa_group_size,
        }
        if self.layerwise:
            keys["ffn_dim_divisor"] = self.ffn_dim_divisor
            keys["layerwise_scaling"] = {"alpha": list(self.alpha), "beta": list(self.beta)}
        else:
            unit = base.head_dim * self.gqa_group_size
            queries = make_divisible(hidden_size * self.alpha[0], unit) // base.head_dim
            keys["num_query_heads"] = queries
            keys["ffn_dim"] = make_divisible(hidden_size * self.beta[0], self.ffn_dim_divisor)
        if self.rank is not None:
            activation = base.cola.activation if base.cola else "both"
            rank = make_divisible(hidden_size * self.rank, RANK_DIVISOR)
            keys["cola"] = {"rank": rank, "activation": activation}
        return keys


def families(base: ModelConfig) -> tuple[Family, ...]:
    """The recipe's own family first, then the three others.

    Args:
        base: The recipe's design as written, not expanded.

    Raises:
        ConfigError: If it lists widths or ranks by layer, which no other depth could follow.
    """
    for key in ("num_query_heads", "num_kv_heads", "ffn_dim"):
        if isinstance(getattr(base, key), tuple):
            raise ConfigError(
                f"model.{key}: lists its layers, so --fit cannot change their number; "
                "give one number, or layerwise_scaling"
            )
    rank = base.cola.rank if base.cola else None
    if isinstance(rank, tuple):
        raise ConfigError(
            "model.cola.rank: lists its layers, so --fit cannot change their number; "
            "give one number"
        )
    dense = _layerwise(base) if base.layerwise_scaling else _uniform(base)
    other = _uniform(base) if base.layerwise_scaling else _layerwise(base)
    cola = rank / base.hidden_size if rank else COLA_RANK
    found = [replace(one, rank=r) for one in (dense, other) for r in (None, cola)]
    return tuple(sorted(found, key=lambda one: not _is_own(one, base)))


def _is_own(family: Family, base: ModelConfig) -> bool:
    same_widths = family.layerwise == (base.layerwise_scaling is not None)
    return same_widths and (family.rank is not None) == (base.cola is not None)


def _layerwise(base: ModelConfig) -> Family:
    scaling = base.layerwise_scaling
    return Family(
        layerwise=True,
        alpha=scaling.alpha if scaling else LAYERWISE_ALPHA,
        beta=scaling.beta if scaling else LAYERWISE_BETA,
        gqa_group_size=_group_size(base),
        ffn_dim_divisor=base.ffn_dim_divisor,
        rank=None,
    )


def _uniform(base: ModelConfig) -> Family:
    queries, ffn = base.num_query_heads, base.ffn_dim
    assert not isinstance(queries, tuple)
    assert not isinstance(ffn, tuple)
    alpha = queries * base.head_dim / base.hidden_size if queries else 1.0
    beta = ffn / base.hidden_size if ffn else UNIFORM_FFN
    return Family(
        layerwise=False,
        alpha=(alpha, alpha),
        beta=(beta, beta),
        gqa_group_size=_group_size(base),
        ffn_dim_divisor=UNIFORM_FFN_DIVISOR,
        rank=None,
    )


def _group_size(base: ModelConfig) -> int:
    if base.num_kv_heads is None:
        return base.gqa_group_size
    queries, keys = base.resolved().num_query_heads, base.num_kv_heads
    assert isinstance(queries, tuple)
    assert isinstance(keys, int)
    return queries[0] // keys


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A design that keeps the limits, with the run it would get.

    Attributes:
        family: How its widths are derived.
        shape: The keys of its model section that make the widths.
        input: The design and its run, as verb ``design`` takes them.
        parameters: As the law counts them, the vocabulary matrix once.
        loss: As the law predicts it.
    """

    family: Family
    shape: dict[str, Any]
    input: DesignInput
    parameters: int

    @property
    def loss(self) -> float:
        return predicted_loss(parameters=self.parameters, tokens=self.input.tokens)

    @property
    def bound(self) -> float:
        """What no number of parameters could get below with these tokens."""
        return predicted_loss(parameters=math.inf, tokens=self.input.tokens)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The answer: the best design of every family that has one, the recipe's own first."""

    limits: Limits
    utilization: float
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def fit(
    base: DesignInput,
    model: ModelConfig,
    limits: Limits,
    *,
    device: str | None = None,
    utilization: float = ASSUMED_UTILIZATION,
) -> Fit:
    """Search the best design under limits, by the rule at the top of this module.

    Args:
        base: The recipe's design and run.
        model: The same design as written in the recipe, not expanded: its family.
        limits: What may not be exceeded. With ``hours``, training must also fit the device.
        device: A device profile (name or YAML file). Left out: the one the recipe names.
        utilization: Assumed share of the device's peak.

    Raises:
        ConfigError: If the recipe's family has no design that keeps the limits.
    """
    profile = device_profile(device or base.device_profile)
    named = replace(base, device_profile=device or base.device_profile)
    search = _Search(
        base=named, model=model, limits=limits, profile=profile, utilization=utilization
    )
    found = [search.best(family) for family in families(model)]
    if found[0] is None:
        raise ConfigError(
            f"--fit: no design of the recipe's family keeps within {limits_text(limits)}; "
            f"{search.hint()}"
        )
    return Fit(
        limits=limits,
        utilization=utilization,
        candidates=tuple(one for one in found if one is not None),
    )


def limits_text(limits: Limits) -> str:
    """Limits in words: ``params 30 M, hours 8``."""
    named = ((key, getattr(limits, key)) for key in _UNITS)
    units = {"memory": "B", "flops": "FLOP"}
    return ", ".join(
        f"{key} {value:g}" if key == "hours" else f"{key} {prefixed(value, units.get(key, ''))}"
        for key, value in named
        if value is not None
    )


@dataclass(frozen=True, kw_only=True)
class _Search:
    base: DesignInput
    model: ModelConfig
    limits: Limits
    profile: DeviceProfile
    utilization: float

    @property
    def memory(self) -> float:
        """Bytes that training may take."""
        device = self.profile.memory_bytes if self.limits.hours is not None else math.inf
        return min(self.limits.memory or math.inf, device)

    def best(self, family: Family) -> Candidate | None:
        """The lowest predicted loss; of equals the first, which is the narrowest.

        Costs rise with width and with depth. So the rest of a row of depths is left out once a
        limit is broken, or once the tokens left would lose to the best even with endlessly many
        parameters; and all wider designs, once that holds for the shallowest.
        """
        best: Candidate | None = None
        for hidden_size, depths in self.shapes(family):
            for depth in depths:
                one = self.candidate(family, hidden_size, depth)
                if one is None or (best is not None and one.bound >= best.loss):
                    if depth == depths[0]:
                        return best
                    break
                if best is None or one.loss < best.loss:
                    best = self.in_memory(one) or best
        return best

    def shapes(self, family: Family) -> Iterator[tuple[int, range]]:
        """Hidden sizes with their depths, in a fixed order."""
        ratio = self.model.hidden_size / self.model.num_hidden_layers
        unit = self.model.head_dim * family.gqa_group_size
        width = unit
        while width <= LARGEST_HIDDEN_SIZE:
            low = max(1, math.ceil(width / (ratio * ASPECT_RATIO_BAND)))
            high = max(low, math.floor(width * ASPECT_RATIO_BAND / ratio))
            yield width, range(low, high + 1, max(1, (high - low) // DEPTH_STEPS))
            width += unit * max(1, 2 ** math.floor(math.log2(width)) // (WIDTH_STEPS * unit))

    def candidate(self, family: Family, hidden_size: int, num_layers: int) -> Candidate | None:
        """A shape with the run it would get; None: it breaks a limit, memory in rough."""
        shape = family.shape(self.model, hidden_size, num_layers)
        design = self.design(shape)
        costs = budget(design)
        if costs.parameters.total > (self.limits.params or math.inf):
            return None
        if LEAST_BYTES_PER_PARAMETER * costs.parameters.total > self.memory:
            return None
        run = self.run(design, costs)
        if run is None:
            return None
        parameters = costs.parameters.non_embedding + costs.vocab_size * hidden_size
        return Candidate(family=family, shape=shape, input=run, parameters=parameters)

    def in_memory(self, one: Candidate) -> Candidate | None:
        """The candidate with the largest micro-batch that fits; None: not even one row does."""
        most = one.input.micro_batch_size
        divisors = (size for size in range(most, 0, -1) if most % size == 0)
        runs = [replace(one.input, micro_batch_size=size) for size in divisors]
        if self.memory_of(runs[-1]) > self.memory:
            return None
        fitting = next(run for run in runs if self.memory_of(run) <= self.memory)
        return replace(one, input=fitting)

    def design(self, shape: dict[str, Any]) -> ModelConfig:
        fixed = self.base.model.model_dump(
            exclude={"num_query_heads", "num_kv_heads", "ffn_dim", "cola", *shape}
        )
        return ModelConfig.model_validate({**fixed, **shape}).expand()

    def run(self, design: ModelConfig, costs: Budget) -> DesignInput | None:
        """The run that flops and hours pay for, in whole steps; None: not one step."""
        base, length = self.base, self.base.sequence_length
        mode = base.activation_checkpointing
        if mode == "cola_m" and design.cola is None:
            mode = "layer"
        named = replace(base, model=design, activation_checkpointing=mode)
        tokens = float(base.tokens)
        if self.limits.flops is not None or self.limits.hours is not None:
            speed = estimated_speed(named, costs, self.profile, self.utilization)
            tokens = min(
                (self.limits.flops or math.inf) / costs.flops_per_token(length).training,
                (self.limits.hours or math.inf) * 3600 * speed,
            )
        batch = base.batch_size
        while batch % 2 == 0 and tokens < FEWEST_STEPS * batch * length:
            batch //= 2
        steps = math.floor(tokens / (batch * length))
        if steps == 0:
            return None
        return replace(
            named,
            name=f"{base.name}-fit",
            batch_size=batch,
            micro_batch_size=math.gcd(batch, base.micro_batch_size),
            tokens=steps * batch * length,
        )

    def memory_of(self, run: DesignInput) -> int:
        memory = training_memory(
            run.model,
            micro_batch_size=run.micro_batch_size,
            sequence_length=run.sequence_length,
            precision=run.precision,
            optimizer=run.optimizer,
            activation_checkpointing=run.activation_checkpointing,
            # The larger of the two cases, so that a smaller micro-batch never asks for more.
            accumulates=True,
            device="cuda" if self.profile.cuda_names else "cpu",
        )
        return memory.total

    def hint(self) -> str:
        """What the smallest design of the recipe's family would take."""
        family = families(self.model)[0]
        hidden_size, depths = next(self.shapes(family))
        design = self.design(family.shape(self.model, hidden_size, depths[0]))
        costs, length = budget(design), self.base.sequence_length
        step = costs.flops_per_token(length).training * length
        row = self.memory_of(replace(self.base, model=design, micro_batch_size=1))
        return (
            f"its smallest has {costs.parameters.total:,} parameters, takes {step:.2e} FLOP for a "
            f"row of {length:,} tokens and {row / 1e6:,.0f} MB to train on it"
        )
