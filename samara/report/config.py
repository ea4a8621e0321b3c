"""Settings of the report. Nothing here imports torch."""

from __future__ import annotations

from pydantic import Field

from samara.config import Config


class ReportConfig(Config):
    """Verb `report`: run folders in, one self-contained HTML page out."""

    title: str = "Samara report"
    subtitle: str = ""
    pretraining: dict[str, str] = Field(default_factory=dict)
    """Name -> pretraining run folder or `stage:NAME`; the first is the baseline."""
    evaluation: str | None = None
    """An evaluation run folder or `stage:NAME`."""
    finetuning: dict[str, str] = Field(default_factory=dict)
    """Name -> fine-tuning run folder or `stage:NAME`; runs of one task are compared with the last.
    """
    audits: dict[str, str] = Field(default_factory=dict)
    """Name -> audit run folder or `stage:NAME`."""
    federated: dict[str, str] = Field(default_factory=dict)
    """Name -> federated run folder or `stage:NAME`; runs of one task are compared with the first.
    """
    release: str | None = None
    """A release's run folder or `stage:NAME`: versions, gates, rollbacks."""
    corpus: str | None = None
    """A prepared folder or `stage:NAME`."""
    demo_scale: bool = False
    """Say on the page that the figures are of demo scale and what that means."""
