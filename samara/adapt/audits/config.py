"""Settings of the audits around a change of a model: limits and sizes. No torch here.

The limits are conventions of this project, not of a paper: set your own with ``--limits FILE``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from samara.config import Config

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class BiasLimits(Config):
    """How far the treatment of two terms may drift apart."""

    max_increase_nats: NonNegativeFloat = 0.1
    """Language models: how much larger the mean gap of log-likelihoods may be after the change."""
    max_increase_probability: Share = 0.02
    """Classifiers: how much larger the mean gap of class probabilities may be."""
    max_gap_nats: NonNegativeFloat | None = None
    """Language models with nothing before to compare with: the largest mean gap. Left out: no
    verdict, `inconclusive`."""
    max_gap_probability: Share = 0.1
    """Classifiers with nothing before to compare with: the largest mean gap."""


class StabilityConfig(Config):
    """Whether the same question gets the same answer, and any question gets one."""

    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1, 8, 32), min_length=2)
    """Greedy answers must agree between these."""
    repeats: PositiveInt = 2
    """Runs at each batch size."""
    max_new_tokens: PositiveInt = 16
    """Of a greedy answer."""
    longest_input: PositiveInt = 4096
    """Tokens of the longest input that is tried; a smaller context makes it smaller."""
    min_agreement: Share = 1.0
    """Share of the prompts whose answers are equal in all runs. In bfloat16 ties are decided by
    rounding: lower it, or audit in float32."""
    max_consistency_loss: Share = 0.05
    """How much less alike the answers to two wordings of one prompt may be after the change."""


class ForgettingConfig(Config):
    """How much worse a model may predict the text it came from."""

    max_loss_increase: NonNegativeFloat = 0.05
    """Nats per token."""
    sequence_length: PositiveInt = 256
    """Tokens of a row; rows are what is resampled."""
    max_tokens: PositiveInt | None = None
    """Use only the first rows, as many as so many tokens fill. Left out: all."""
    masked_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Masked models: the share of the tokens that is hidden, the same before and after."""


class AuditConfig(Config):
    """Limits and sizes of all audits."""

    bias: BiasLimits = BiasLimits()
    stability: StabilityConfig = StabilityConfig()
    forgetting: ForgettingConfig = ForgettingConfig()
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Of the intervals behind the verdicts."""
    bootstrap_samples: PositiveInt = 5000
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 16
    """Rows at a time where the batch size is not what is tested."""
