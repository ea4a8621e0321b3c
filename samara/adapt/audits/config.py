"""Settings of the audits around a change of a model: limits, sizes, the verb. No torch here.

The limits are conventions of this project, not of a paper: set your own with ``--limits FILE``, or
``limits`` in a recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Suite = Literal["bias", "stability", "forgetting"]
Precision = Literal["float32", "stored"]
SUITES: tuple[Suite, ...] = ("bias", "stability", "forgetting")
EVIDENCE, DETAILS, SUMMARY = "audit.json", "details.json", "summary.json"
"""What the verb writes."""


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
    min_consistency: Share = 0.5
    """With nothing before to compare with: how alike they must be on average, 1 being the same."""
    min_seed_agreement: Share = 0.8
    """Share of the scored rows that two trainings, which differ in their seed alone, must answer in
    the same way; of several trainings the mean over all pairs."""


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


class AuditRunConfig(Config):
    """Verb `audit`: a model before and after a change in; verdicts for a registry's gates out.

    The run folder is evidence of the audited version, and of no other: a release checks that.
    """

    base: str
    """The model before the change: a model folder, a run folder, or `stage:NAME`."""
    tuned: str | None = None
    """A fine-tuning run, or the folder of the changed model."""
    deltas: tuple[str, ...] = ()
    """In place of it: delta files, in the order they apply. Neither: the base is audited."""
    seeds: tuple[str, ...] = ()
    """Fine-tuning runs with the settings of `tuned` and another seed each: whether the answers
    depend on it becomes part of the stability audit. Left out: that is not looked at."""
    suites: tuple[Suite, ...] = Field(default=SUITES[:2], min_length=1)
    templates: str = "english"
    """Sentences and terms: `english`, `documentation` (of programs), or a YAML file of yours."""
    corpus: str | None = None
    """For `forgetting`: the prepared corpus that the base is from; its validation text is read."""
    texts: tuple[str, ...] = ()
    """Or files with text that the base knows."""
    limits: AuditConfig = AuditConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
    """Of the weights that are asked; `stored`: as they are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.deltas and self.tuned is not None:
            raise ConfigError("deltas and tuned: give one of them, the change is either")
        if self.corpus is not None and self.texts:
            raise ConfigError("corpus and texts: give one of them")
        has_text = self.corpus is not None or bool(self.texts)
        if has_text != ("forgetting" in self.suites):
            raise ConfigError(
                "suites: forgetting needs text that the base knows, and nothing else does; give "
                "corpus or texts with it, or none of the three"
            )
        if self.seeds and (self.tuned is None or "stability" not in self.suites):
            raise ConfigError("seeds: compares runs with tuned in the stability audit; give both")
        return self
