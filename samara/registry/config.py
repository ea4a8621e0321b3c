"""What must hold before an alias moves: ``--gates`` files."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from samara.config import Config


class KpiGate(Config):
    """One score that a version must have; at least one bound is given."""

    task: str
    metric: str
    direction: Literal["higher", "lower"] = "higher"
    """Which way is better."""
    bound: float | None = None
    """The whole confidence interval must lie on the good side of it."""
    max_loss: float | None = Field(default=None, ge=0)
    """How much worse than the version that holds the alias now it may be, at most; the interval of
    the difference must exclude more. Nothing holds the alias yet: only ``bound`` counts."""
    min_samples: int = Field(default=100, ge=1)
    """Fewer items decide nothing."""
    is_rate: bool = False
    """The score is a share of items: without an interval of its own it gets Wilson's."""

    @model_validator(mode="after")
    def _needs_a_bound(self) -> Self:
        if self.bound is None and self.max_loss is None:
            raise ValueError("give bound, max_loss, or both")
        return self


class Gates(Config):
    """All that a version must pass."""

    kpis: list[KpiGate] = Field(min_length=1)
    audits: list[str] = Field(default_factory=lambda: ["bias", "stability"])
    """Suites whose verdict must be ``pass``."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the intervals worked out here, two-sided; those in the evidence have their own."""
