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


class AllocateConfig(Config):
    """Ranks for a low-rank design (CoLA), from the activations of a model of Samara's."""

    model: str | None = None
    """Which of the models; left out: the first."""
    budget: Annotated[float, Field(gt=0.0)]
    """Parameters of all linears together; up to 1: a share of what they have when dense."""
    multiple: PositiveInt = 8
    """Every rank is a multiple of this, and at least this."""
    centred: bool = True
    """Count the energy that differs between tokens: a large mean takes one direction, and would
    hide what the others are needed for. False: all energy, as r(alpha) is defined."""
    activation: Literal["low_rank_only", "both"] = "low_rank_only"
    """As in `model.cola`; the paper ships `both` up to 130M."""


class AnalyzeConfig(Config):
    """Verb `analyze`: models and text in, effective ranks of their activations out."""

    models: dict[str, str] = Field(min_length=1)
    """Name -> model folder, run folder or `stage:NAME`; any decoder or encoder."""
    data: str
    """A prepared folder or `stage:NAME`, or a file: .txt, .jsonl or .parquet."""
    split: Literal["validation", "test", "train"] = "validation"
    """Of a prepared folder."""
    alphas: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(
        default=(0.95,), min_length=1
    )
    """Shares of the energy: r(alpha) is the fewest directions that hold so much. The first is the
    one that is shown."""
    sequence_length: PositiveInt = 256
    """Longer documents are cut into pieces of this many tokens."""
    max_tokens: PositiveInt = 65_536
    """The first tokens of the text are used, so many; tens for each channel of the widest linear
    are needed."""
    batch_size: PositiveInt = 16
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: autocast, as in training. The sums are float64 in either case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoints: bool = False
    """Also measure each checkpoint that the runs kept: how ranks move during training."""
    layers_at_once: PositiveInt | None = None
    """Layers whose sums are in memory together (8 bytes for each pair of channels); the text is
    read once for each group. Left out: all."""
    allocate: AllocateConfig | None = None
    """Also choose ranks for a low-rank design."""
