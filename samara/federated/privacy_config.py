"""Settings of what is kept from whom in a federation, and which of them exclude each other."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError

METHODS = (
    "droppeft",
    "static_stld",
    "fedlora",
    "fedavg",
    "fedlora_checkpointing",
    "frozen_depth",
    "head_only",
)
"""What the promises were thought through for: every client trains the same tensors, and what it
sends of them does not depend on the others. Any other method is refused."""

ENGINES = ("in_process", "flower", "superlink")
"""Those that carry what the promises need; any other is refused."""

Delta = Annotated[float, Field(gt=0.0, lt=1.0)]


class GaussianPrivacy(Config):
    """A promise of (epsilon, delta)-differential privacy, kept by clipping and Gaussian noise."""

    epsilon: PositiveFloat
    """The budget. What would pass it is not done."""
    delta: Delta
    """Probability with which the promise may fail: well below 1 over the number of those it is
    given to."""
    clip: PositiveFloat
    """Largest L2 norm of what one of them contributes; larger ones are scaled down to it."""
    noise_multiplier: PositiveFloat | None = None
    """Standard deviation of the noise over `clip`. Left out: the smallest with which all rounds
    stay within the budget."""


class SecureSumConfig(Config):
    """Clients mask what they send so that the server learns the sum alone."""

    clip: PositiveFloat | None = None
    """Largest L2 norm of a client's change. With `privacy.client` its `clip` counts: leave it
    out."""
    max_examples: PositiveInt = 1000
    """A client weighs as its examples, and no more than this. With `privacy.client` all weigh the
    same."""
    threshold: Annotated[float, Field(gt=0.5, le=1.0)] = 0.67
    """Share of the clients of a round that have to last until its end for the sum to be opened."""
    min_clients: Annotated[int, Field(ge=3)] = 3
    """A round with fewer is not summed: the sum of few tells much about each."""


class PrivacyConfig(Config):
    """What is kept from whom; see docs/privacy.md for what each promises, and what it does not."""

    client: GaussianPrivacy | None = None
    """What is released barely depends on any one client: noise is added by the server."""
    records: GaussianPrivacy | None = None
    """What a client sends barely depends on any one of its rows: noise is added in its training
    (DP-SGD, by Opacus). The budget is each client's own."""
    secure_sum: SecureSumConfig | None = None
    """The server learns the sum over the clients of a round, and no client's part in it."""
    randomness: Literal["secret", "reproducible"] = "secret"
    """`secret`: noise and draws come from keys of the system's secure source, kept in the run
    folder for going on. `reproducible`: from `seed`, for tests and benchmarks: no protection."""

    @property
    def is_on(self) -> bool:
        """Whether anything is protected."""
        return any((self.client, self.records, self.secure_sum))

    @property
    def sums_vectors(self) -> bool:
        """Whether clipped vectors are summed, in place of a mean over checked replies."""
        return self.client is not None or self.secure_sum is not None

    @property
    def clip(self) -> float:
        """Of a client's change, where vectors are summed."""
        chosen = self.client or self.secure_sum
        assert chosen is not None
        assert chosen.clip is not None
        return chosen.clip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.secure_sum is not None and (self.secure_sum.clip is None) != bool(self.client):
            raise ConfigError(
                "secure_sum.clip: give the largest norm of a client's change"
                if self.client is None
                else "secure_sum.clip: client.clip bounds a client's change already; leave it out"
            )
        return self


def check_privacy(
    privacy: PrivacyConfig,
    *,
    engine: str,
    method: str,
    direction: str,
    rewards: str,
    max_change: float | None,
    clip_grad_norm: float | None,
    precision: str,
    proximal: float,
    payload: str,
    per_round: int,
) -> None:
    """Refuse what would break a promise.

    Args:
        privacy: What is promised.
        engine: Of the recipe.
        method: Of the recipe.
        direction: ``sharing.direction``.
        rewards: ``configurator.rewards``.
        max_change: ``server.max_change``.
        clip_grad_norm: Of ``local``.
        precision: Of ``local``.
        proximal: Of ``local``.
        payload: Of the recipe.
        per_round: ``clients.per_round``.

    Raises:
        ConfigError: If something does not fit.
    """
    if privacy.is_on:
        _check_built(method, engine)
    if privacy.is_on and method == "droppeft" and rewards == "clients":
        raise ConfigError(
            "configurator.rewards: clients would tell the server their losses, which `privacy` "
            "rules out; set it to server"
        )
    if privacy.sums_vectors and max_change is not None:
        raise ConfigError(
            "server.max_change: compares the replies of single clients, which `privacy` rules "
            "out (its clip bounds each of them instead); set it to null"
        )
    if privacy.secure_sum is not None and per_round < privacy.secure_sum.min_clients:
        raise ConfigError(
            f"clients.per_round: {per_round} are fewer than privacy.secure_sum.min_clients "
            f"{privacy.secure_sum.min_clients}: no sum would be opened; raise it"
        )
    noisy = "client" if privacy.client else "records" if privacy.records else None
    if noisy and method == "droppeft" and direction in ("share_common", "share_important"):
        raise ConfigError(
            f"sharing.direction: {direction} lets a client's data decide what it sends, which "
            f"privacy.{noisy} rules out; use all, depth or none"
        )
    if privacy.records is not None:
        _check_records(method, clip_grad_norm, precision, proximal, payload)


def _check_built(method: str, engine: str) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"method: {method} is not built with privacy; use one of {', '.join(METHODS)}"
        )
    if engine not in ENGINES:
        raise ConfigError(
            f"engine: {engine} is not built with privacy; use one of {', '.join(ENGINES)}"
        )


def _check_records(
    method: str, clip_grad_norm: float | None, precision: str, proximal: float, payload: str
) -> None:
    if payload != "lora":
        raise ConfigError(
            f"payload: {payload} is not built with privacy.records, whose gradients per row are "
            "those of adapters; use lora"
        )
    if proximal > 0:
        raise ConfigError(
            f"local.proximal: {proximal:g} pulls on gradients that the noise of privacy.records "
            "replaces; set it to 0"
        )
    if clip_grad_norm is not None:
        raise ConfigError(
            "local.clip_grad_norm: privacy.records clips the gradient of each row instead; set it "
            "to null"
        )
    if precision != "float32":
        raise ConfigError(
            f"local.precision: {precision} is not built with privacy.records; use float32"
        )
    if method == "fedlora_checkpointing":
        raise ConfigError(
            "method: fedlora_checkpointing runs layers twice, which the gradients per row of "
            "privacy.records do not allow; use fedlora"
        )
