"""What is known of a model or delta: scores, audits, licence. Read by gates, kept by the registry.

Delta files carry the same records in their headers. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from samara.config import Config


class Evaluation(Config):
    """One metric on one task."""

    task: str
    metric: str
    value: float
    ci: tuple[float, float] | None = None
    n: int | None = None
    """Items that ``value`` is measured on."""
    base_value: float | None = None
    full_ft_value: float | None = None


class Audit(Config):
    """One suite of checks (bias, safety, stability), before and after the change."""

    suite: str
    before: float | None = None
    after: float | None = None
    ci_of_change: tuple[float, float] | None = None
    verdict: Literal["pass", "fail", "inconclusive"]


class License(Config):
    """What the licences of a change and of its base permit."""

    delta: str | None = None
    base: str | None = None
    redistribution: Literal["allowed", "internal", "forbidden", "unknown"] = "unknown"
    """Whether the change, or a model with it in, may be given away."""
    use: Literal["allowed", "forbidden"] = "allowed"
    """Whether it may be used at all."""
    notice: str | None = None


class Evidence(Config):
    """Scores and audits of one version; what ``--evidence`` files hold."""

    evaluations: list[Evaluation] = Field(default_factory=list)
    audits: list[Audit] = Field(default_factory=list)

    def evaluation(self, task: str, metric: str) -> Evaluation | None:
        """The last score of a metric on a task."""
        found = [row for row in self.evaluations if (row.task, row.metric) == (task, metric)]
        return found[-1] if found else None

    def audit(self, suite: str) -> Audit | None:
        """The last audit by a suite."""
        found = [row for row in self.audits if row.suite == suite]
        return found[-1] if found else None

    def __add__(self, later: Evidence) -> Evidence:
        return Evidence(
            evaluations=[*self.evaluations, *later.evaluations],
            audits=[*self.audits, *later.audits],
        )


class Description(Config):
    """What a version says about itself when it is added; kept unchanged for ever."""

    kind: Literal["model", "run", "delta"]
    identity: str
    """Content hash that descendants name as their parent: a weights hash, or a delta's id."""
    made_from: list[str] = Field(default_factory=list)
    """Identities of what it was made from."""
    evidence: Evidence = Evidence()
    license: License = License()
    note: str | None = None
