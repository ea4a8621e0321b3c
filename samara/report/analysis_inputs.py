"""An analysis of activations, read for the page: ``ranks.json`` of verb ``analyze``."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from samara.report.run_files import Record, read_record, run_folder, said, state_of
from samara.runs import RunFolder


class RankSite(Record):
    """The effective ranks at one place of a model."""

    layer: NonNegativeInt
    projection: str
    space: str
    """input | bottleneck | activated | output"""
    width: PositiveInt
    ranks: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """One per alpha."""
    centred_ranks: tuple[NonNegativeInt, ...] = Field(min_length=1)

    @property
    def share(self) -> float:
        """Rank at the first alpha over width."""
        return self.ranks[0] / self.width

    @property
    def centred_share(self) -> float:
        """The same with the mean taken away."""
        return self.centred_ranks[0] / self.width


class RankMeasurement(Record):
    """All places of a model at one point of its training."""

    step: NonNegativeInt | None
    """None: the finished model."""
    sites: tuple[RankSite, ...] = Field(min_length=1)


class AnalyzedModel(Record):
    """One model."""

    num_tokens: PositiveInt
    warning: str | None
    measurements: tuple[RankMeasurement, ...] = Field(min_length=1)
    """By step; the finished model last."""

    @property
    def final(self) -> tuple[RankSite, ...]:
        return self.measurements[-1].sites


class RankAllocation(Record):
    """Ranks chosen for a low-rank design."""

    model: str
    budget: PositiveInt
    parameters: PositiveInt
    dense_parameters: PositiveInt
    captured: float
    centred: bool
    ranks: tuple[dict[str, PositiveInt], ...]


class Analysis(Record):
    """``ranks.json``."""

    alphas: tuple[float, ...] = Field(min_length=1)
    models: dict[str, AnalyzedModel] = Field(min_length=1)
    allocation: RankAllocation | None


def read_analysis(name: str | None) -> tuple[Analysis | None, str]:
    """The analysis, or why there is none.

    Raises:
        CheckpointError: If the folder does not exist, or its file is damaged.
    """
    if name is None:
        return None, "The report names no analysis."
    folder = run_folder(name, "analysis")
    path = folder / "ranks.json"
    if not path.exists():
        state = state_of(RunFolder(folder), finished=False)
        return None, f"The analysis has no results yet ({said(state)})."
    return read_record(Analysis, path), ""
