"""Settings of measuring: evaluation, sampling, device profiles. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from samara.config import Config
from samara.data.objectives import CausalObjective, Objective


class SamplingConfig(Config):
    """Text sampled from each model, to read."""

    prompts: tuple[str, ...] = ("Return the",)
    max_new_tokens: PositiveInt = 48
    temperature: NonNegativeFloat = 0.8
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95


class EvaluateConfig(Config):
    """Verb `evaluate`: models and a prepared corpus in, scores with intervals out."""

    models: dict[str, str] = Field(min_length=1)
    """Name -> model folder or `stage:NAME`. The first is the baseline of the comparisons."""
    corpus: str
    """A prepared folder or `stage:NAME`."""
    split: Literal["validation", "test"] = "validation"
    objective: Objective = CausalObjective()
    """What the models were trained for. `masked_lm` (the loss at masked tokens; its exponential is
    a pseudo-perplexity) and `ul2` draw the same noise for every model and in every run."""
    sequence_length: PositiveInt = 256
    batch_size: PositiveInt = 16
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_tokens: PositiveInt | None = None
    """Use only the first rows, as many as this many tokens fill. Left out: all."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    bootstrap_samples: PositiveInt = 2000
    """Resamples of the documents behind every interval."""
    sampling: SamplingConfig | None = SamplingConfig()
    """Left out: none. A masked model writes none either."""
    seed: NonNegativeInt = 0


class DeviceProfile(Config):
    """What a device can do and what it costs: the basis of MFU, time, energy and money."""

    name: str
    cuda_names: tuple[str, ...] = ()
    """What CUDA calls the device: how `auto` finds the profile."""
    peak_flops: dict[Literal["float32", "bfloat16"], PositiveFloat]
    """Dense matrix multiply-adds per second, times two."""
    memory_bytes: PositiveInt
    watts: PositiveFloat
    """Draw of one device under load."""
    price_per_hour: NonNegativeFloat = 0.0
    """Money for one hour of the device."""
    price_per_kwh: NonNegativeFloat = 0.30
    currency: str = "USD"
    source: str
    """Where the figures come from: `measured …`, `data sheet …`, `assumed …`."""
