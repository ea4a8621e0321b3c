"""The ``objective:`` section of a recipe: what a model learns to predict. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError, did_you_mean

DENOISER_NAMES = (
    "R-3-0.15",
    "R-8-0.15",
    "S-0.25",
    "X-3-0.5",
    "X-8-0.5",
    "X-64-0.15",
    "X-64-0.5",
)
"""UL2's denoisers by mode, mean span and corruption (:data:`samara.data.ul2.DENOISERS`)."""


class CausalObjective(Config):
    """Predict each token from those before it."""

    kind: Literal["causal_lm"] = "causal_lm"


class MaskedObjective(Config):
    """BERT's masked language modelling (arXiv 1810.04805), for a model that looks both ways."""

    kind: Literal["masked_lm"] = "masked_lm"
    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of a row's tokens that are predicted."""
    max_predictions: PositiveInt | None = None
    """Most tokens predicted in a row (BERT: 20 of 128, 77 of 512). Left out: no limit but the
    fraction."""
    mask_sets: PositiveInt | None = None
    """Passes over the data after which masks repeat (BERT: 10). Left out: they never do."""
    rows: Literal["packed", "documents"] = "packed"
    """`packed`: rows are full, documents kept apart by attention. `documents`: one document or a
    piece of one a row, padded; needed by Hugging Face's BERT."""


class UL2Objective(Config):
    """UL2's mixture of denoisers (arXiv 2205.05131), for a decoder with a bidirectional prefix."""

    kind: Literal["ul2"] = "ul2"
    weights: dict[str, NonNegativeFloat] | None = None
    """Relative share of the rows by denoiser (`R-3-0.15`, `R-8-0.15`, `S-0.25`, `X-3-0.5`,
    `X-8-0.5`, `X-64-0.15`, `X-64-0.5`); one left out is not used. Left empty: equal shares."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is None:
            return self
        for name in self.weights:
            if name not in DENOISER_NAMES:
                raise ConfigError(f"no denoiser '{name}'{did_you_mean(name, DENOISER_NAMES)}")
        if not sum(self.weights.values()) > 0:
            raise ConfigError("weights: give at least one denoiser a weight above 0")
        return self


Objective = Annotated[CausalObjective | MaskedObjective | UL2Objective, Field(discriminator="kind")]
