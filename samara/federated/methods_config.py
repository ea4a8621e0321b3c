"""Settings beside those of DropPEFT: the server's update, baselines, rows. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from samara.adapt.config import FinetuneData
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


# --- baselines whose clients train different parts ------------------------------------------------


class MixedRanks(Config):
    """Adapters of another rank on each kind of device: method `hetlora` (arXiv 2401.06432)."""

    ranks: dict[str, PositiveInt] = Field(default_factory=dict)
    """Rank by name of the device, `lora.rank` at most. Left out: the quickest kind has `lora.rank`,
    each slower one half of the one before."""
    missing: Literal["zero", "leave_out"] = "zero"
    """In the mean, a row that a client has not counts as zero, as in the paper, or not at all."""


class DepthSearch(Config):
    """Depth and width of the adapters grow by trials: method `fedadapter` (arXiv 2205.10162)."""

    depth: PositiveInt = 2
    """Upper layers that have adapters at first."""
    rank: PositiveInt | None = None
    """Width at first. Left out: a quarter of `lora.rank`, the largest width."""
    depth_step: PositiveInt = 2
    """Layers more of the deeper trial group."""
    rank_factor: Annotated[int, Field(ge=2)] = 2
    """The wider trial group is so many times as wide."""
    trial_rounds: PositiveInt = 5
    """Rounds of the present configuration before the groups are compared."""


# --- where rows come from -------------------------------------------------------------------------


class DatasetOptions(Config):
    """How a dataset is read, where `data.train`, `data.validation` or `task.data` names one."""

    config: str | None = None
    """Of a dataset that has several."""
    revision: str | None = None
    """Commit or tag: name one for a result that can be repeated."""
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"


class FederatedRows(FinetuneData):
    """What clients train on, and what the server holds out.

    `train`, `validation` and `task.data` are each a file of rows (.jsonl, .csv or .tsv, each also
    with .gz), the folder of a `samara prepare` (its documents, with field `package`), or a dataset
    that `datasets` reads: a name on the Hugging Face hub, a local folder in its layout, or what
    `save_to_disk` wrote. Its rows are written into the run folder once.
    """

    dataset: DatasetOptions = DatasetOptions()
