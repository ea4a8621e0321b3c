"""Settings of a release: what is registered, behind which gates, in which steps. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from samara.config import Config
from samara.errors import ConfigError, did_you_mean
from samara.registry.config import Gates


class VersionConfig(Config):
    """What becomes a version of the line; its own scores and audits come with it."""

    source: str
    """A model folder, run folder or delta file (`.sdelta`), or `stage:NAME`."""
    evidence: tuple[str, ...] = ()
    """More of it: YAML or JSON files with evaluations and audits, or the run folder of an audit
    (`stage:NAME`), which must be of this very version."""
    note: str | None = None
    """A word about it."""


class OverrideConfig(Config):
    """A person's decision to move an alias though its gates do not let the version pass."""

    name: str = Field(min_length=1)
    reason: str = Field(min_length=1)


class PromoteStep(Config):
    """Point an alias to a version, if the alias's gates let it pass."""

    do: Literal["promote"]
    version: str
    """A name of `versions`."""
    alias: str = "stable"
    override: OverrideConfig | None = None
    """Left out: the gates decide."""
    unless_passed: Literal["stop", "go_on"] = "stop"
    """When the gates hold or refuse the version: `stop` ends the release, `go_on` takes the next
    step. Either way the registry's log has what they said."""


class RollbackStep(Config):
    """Point an alias back to a version that it pointed to before."""

    do: Literal["rollback"]
    alias: str = "stable"
    version: str | None = None
    """A name of `versions`. Left out: the one before."""
    reason: str = Field(min_length=1)
    """Why; it is recorded."""


Step = Annotated[PromoteStep | RollbackStep, Field(discriminator="do")]


class ReleaseConfig(Config):
    """Verb `release`: runs in; versions in a registry out, promoted through gates.

    Goes on where it was interrupted: no step is taken twice.
    """

    line: str
    """The model line that the versions belong to."""
    versions: dict[str, VersionConfig] = Field(min_length=1)
    """Name -> what is added, in this order. The same content twice is one version."""
    gates: dict[str, Gates] = Field(default_factory=dict)
    """Alias -> what must hold before it moves. `stable` never moves without gates."""
    steps: tuple[Step, ...] = ()
    """Promotions and rollbacks, in order."""
    registry: str | None = None
    """Folder or fsspec URL of the registry. Left out: `registry` in the run folder."""
    catalogue: str | None = None
    """SQLAlchemy URL of its catalogue. Left out: SQLite in the registry's folder."""
    actor: str | None = None
    """Who acts, for the log. Left out: the user logged in."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for place, step in enumerate(self.steps):
            if step.version is not None and step.version not in self.versions:
                raise ConfigError(
                    f"steps.{place}.version: '{step.version}' is no name of versions"
                    f"{did_you_mean(step.version, self.versions)}"
                )
        return self
