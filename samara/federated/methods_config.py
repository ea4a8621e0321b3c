"""Settings of what is trained and exchanged, and of what the server does with it. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from samara.config import Config

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


# --- the server's update --------------------------------------------------------------------------


class FedAvg(Config):
    """The mean of what the clients sent is the new value (McMahan et al., arXiv 1602.05629)."""

    kind: Literal["fedavg"] = "fedavg"


class AdaptiveServer(Config):
    """The mean change is the gradient of an optimizer on the server (arXiv 2003.00295)."""

    lr: PositiveFloat = 1e-2
    """About what it moves an element by in a round. The default is a guess: what ten local steps
    of AdamW at 1e-3 move it by."""
    tau: PositiveFloat = 1e-3
    """Added to the root of the second moment: larger is less adaptive."""


class FedAdam(AdaptiveServer):
    """Adam on the server."""

    kind: Literal["fedadam"] = "fedadam"
    betas: tuple[Beta, Beta] = (0.9, 0.99)


class FedYogi(AdaptiveServer):
    """Yogi on the server: a second moment that falls slowly."""

    kind: Literal["fedyogi"] = "fedyogi"
    betas: tuple[Beta, Beta] = (0.9, 0.99)


class FedAdagrad(AdaptiveServer):
    """Adagrad on the server: a second moment that only grows."""

    kind: Literal["fedadagrad"] = "fedadagrad"


ServerUpdate = Annotated[FedAvg | FedAdam | FedYogi | FedAdagrad, Field(discriminator="kind")]
