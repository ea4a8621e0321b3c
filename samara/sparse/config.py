"""Settings of sparse updates: which weights to train, and how. No torch here.

Papers and defaults: one score family holds the published selection rules as presets
(:mod:`samara.sparse.scores`); the budget rule is described in :mod:`samara.sparse.budget`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Granularity = Literal["element", "block4", "block16", "column", "row", "two_level"]
DensityName = Literal["tiny", "small", "default", "high", "max"]
ScoreName = Literal[
    "grad_fisher",
    "grad",
    "fisher",
    "newton",
    "snip",
    "gallop",
    "magnitude",
    "small",
    "lift",
    "lift_x_grad_fisher",
    "random",
]

DENSITIES: dict[DensityName, float] = {
    "tiny": 0.0005,
    "small": 0.001,
    "default": 0.005,
    "high": 0.02,
    "max": 0.05,
}


class SelectionConfig(Config):
    """Which weights are trained: a score for each, a budget, and the shape of the support."""

    score: ScoreName = "grad_fisher"
    """Ranks the weights. `random` is the baseline to beat."""
    exponents: tuple[float, float, float] | None = None
    """(a, b, c) of |g|^a * (F + lambda)^b * (|w| + epsilon)^c, in place of the preset's."""
    density: DensityName | Fraction = "default"
    """Share of the target weights: tiny 0.05 %, small 0.1 %, default 0.5 %, high 2 %, max 5 %."""
    num_entries: PositiveInt | None = None
    """How many weights, in place of `density`: to compare methods at an equal count."""
    granularity: Granularity = "element"
    """Single weights; blocks; input columns or output rows of a layer; or `two_level`: single
    weights inside the best input columns, so that less of a layer's input is kept for backward."""
    column_share: Fraction = 0.25
    """`two_level`: share of each layer's input columns that may hold selected weights."""
    normalize: Literal["rms", "none"] = "rms"
    """`rms`: scores are divided by their root mean square in each matrix, so that matrices compare;
    `none`: raw, and a few layers may take all."""
    rho: UnitInterval = 0.5
    """0: every matrix gets its share by size; 1: the best weights of all matrices together."""
    clamp: tuple[NonNegativeFloat, PositiveFloat] = (0.1, 8.0)
    """Least and most entries of a matrix, as multiples of its share by size."""
    targets: Literal["without_qk", "linear"] | tuple[str, ...] = "without_qk"
    """Which matrices: all linear layers of the trunk but queries and keys (LIFT finds those alone
    clearly worse), all linear layers, or patterns of tensor names (`*.v_proj.weight`)."""
    train_fully: tuple[str, ...] = ()
    """Patterns of tensors trained whole, beside the budget: a new head, norms, biases."""
    num_samples: PositiveInt = 128
    """Rows whose gradients the scores see, one backward pass each."""
    accumulators: Literal["float32", "bfloat16"] = "float32"
    """Of gradient sums, on the device. bfloat16 halves them; above 256 samples it loses addends."""
    accumulator_gigabytes: PositiveFloat = 4.0
    """The most memory for gradient sums. What does not fit is done in further passes."""
    candidates: Annotated[float, Field(ge=1.0)] | None = None
    """After 8 samples keep sums for this many times the budget only (SpIEL: 4). Left out: all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.exponents is not None and self.score in ("lift", "lift_x_grad_fisher", "random"):
            raise ConfigError(f"exponents: score {self.score} has none; use grad_fisher")
        if self.accumulators == "bfloat16" and self.num_samples > 256:
            raise ConfigError(
                f"accumulators: bfloat16 sums lose samples beyond 256, num_samples is "
                f"{self.num_samples}; use float32"
            )
        low, high = self.clamp
        if not low <= 1.0 <= high:
            raise ConfigError(f"clamp: {low} to {high} must contain 1, the share by size")
        return self

    def share(self) -> float:
        """The density as a number."""
        return self.density if isinstance(self.density, float) else DENSITIES[self.density]


class SparseAdamWConfig(Config):
    """AdamW on the selected weights: float32 values and moments for these alone."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate; 1e-4 to 3e-4 is usual, and worth a sweep."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Pulls towards the weights of the base model, not towards 0."""


class AutoConfig(Config):
    """Several masks are tried for a few steps each; the better half goes on; the best is used."""

    scores: tuple[ScoreName, ...] = Field(
        default=("grad_fisher", "grad", "snip", "magnitude"), min_length=2
    )
    """The masks to try."""
    density_share: Fraction = 0.25
    """Density of a trial, as a share of the wanted one."""
    steps: PositiveInt = 40
    """Updates of a trial in the first round; twice as many in each next one."""
    lr_factors: tuple[PositiveFloat, ...] = Field(default=(1.0, 3.0), min_length=1)
    """Each mask is tried at these multiples of the learning rate; its better result counts."""


class ExpansionConfig(Config):
    """Staged expansion: more weights are selected when the validation loss stalls."""

    densities: tuple[Fraction, ...] = Field(min_length=1)
    """The densities after the first one, each larger than the one before."""
    patience: PositiveInt = 3
    """Evaluations without gain before the next stage."""
    min_gain: UnitInterval = 0.002
    """Relative fall of the validation loss that counts as a gain."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.densities) != sorted(set(self.densities)):
            raise ConfigError(f"densities: {self.densities} must rise from stage to stage")
        return self


class SparseConfig(Config):
    """Sparse fine-tuning: choose few weights of a model, train these, in place."""

    selection: SelectionConfig = SelectionConfig()
    auto: AutoConfig | None = None
    """Find the score by short trials. Left out: `selection.score`."""
    expansion: ExpansionConfig | None = None
    """Select more when training stalls. Left out: the support stays."""
    optimizer: SparseAdamWConfig = SparseAdamWConfig()
    gradient_path: Literal["auto", "dense"] = "auto"
    """`auto`: only what is selected is computed. `dense`: each matrix's whole gradient, one at a
    time: the reference."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.expansion is not None and self.selection.num_entries is None:
            first, next_ = self.selection.share(), self.expansion.densities[0]
            if next_ <= first:
                raise ConfigError(
                    f"expansion.densities: {next_} is no larger than selection.density {first}"
                )
        return self
