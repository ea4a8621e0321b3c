"""Recipes: one file that says everything about a run.

A recipe names one verb, or chains several as ``stages``:

    schema: 1                       schema: 1
    name: small                     name: quickstart
    pretrain:                       defaults:
      model: …                        pretrain: {seed: 1, …}
                                    stages:
                                      data: {prepare: …}
                                      dense: {pretrain: {data: {corpus: stage:data}, …}}

A value ``stage:NAME`` means the folder of an earlier stage, ``stage:NAME/FILE`` something in it.
``defaults`` holds, per verb, what its stages share; a stage's own keys win. There is no inheritance
between files.

Nothing here imports torch; a verb's module is imported when it runs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from samara.adapt.audits.config import AuditRunConfig
from samara.adapt.config import FinetuneConfig
from samara.config import Config, apply_overrides, load_yaml, merge, validate
from samara.data.config import PrepareConfig
from samara.errors import ConfigError, did_you_mean
from samara.federated.config import FederateConfig
from samara.growth.config import GrowConfig
from samara.measure.config import AnalyzeConfig, EvaluateConfig
from samara.release.config import ReleaseConfig
from samara.report.config import ReportConfig
from samara.runs import RunFolder, hash_json
from samara.train.config import InstructConfig, PretrainConfig

REFERENCE = "stage:"
STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One kind of work: its settings, and where its function is found when it is needed."""

    config: type[Config]
    function: str

    def load(self) -> Callable[[Any, RunFolder], None]:
        """Import the verb's module and return its function."""
        module, _, name = self.function.partition(":")
        function: Callable[[Any, RunFolder], None] = getattr(importlib.import_module(module), name)
        return function


VERBS: dict[str, Verb] = {
    "prepare": Verb(config=PrepareConfig, function="samara.data.prepare:prepare_verb"),
    "pretrain": Verb(config=PretrainConfig, function="samara.train.pretrain:pretrain"),
    "grow": Verb(config=GrowConfig, function="samara.growth.grow:grow_verb"),
    "instruct": Verb(config=InstructConfig, function="samara.train.instruct:instruct"),
    "finetune": Verb(config=FinetuneConfig, function="samara.adapt.finetune:finetune"),
    "federate": Verb(config=FederateConfig, function="samara.federated.federate:federate"),
    "audit": Verb(config=AuditRunConfig, function="samara.adapt.audits.verb:audit_verb"),
    "release": Verb(config=ReleaseConfig, function="samara.release.release:release"),
    "evaluate": Verb(config=EvaluateConfig, function="samara.measure.evaluate:evaluate"),
    "analyze": Verb(config=AnalyzeConfig, function="samara.train.analyze:analyze"),
    "report": Verb(config=ReportConfig, function="samara.report.report:report"),
}


class StageConfig(Config):
    """One verb and its settings."""

    prepare: PrepareConfig | None = None
    """Text in; documents, tokenizer and token shards out."""
    pretrain: PretrainConfig | None = None
    """Corpus in; checkpoint out."""
    grow: GrowConfig | None = None
    """Checkpoint in; a larger one out that trained on."""
    instruct: InstructConfig | None = None
    """Model and conversations in; a model that answers out."""
    finetune: FinetuneConfig | None = None
    """Model and task in; a delta, an adapter or a model out."""
    federate: FederateConfig | None = None
    """Model and clients' data in; an adapter out, and the clients' own layers."""
    audit: AuditRunConfig | None = None
    """A model before and after a change in; verdicts for a registry's gates out."""
    release: ReleaseConfig | None = None
    """Runs in; versions in a registry out, promoted through gates."""
    evaluate: EvaluateConfig | None = None
    """Models in; scores with intervals out."""
    analyze: AnalyzeConfig | None = None
    """Models and text in; effective ranks of their activations out."""
    report: ReportConfig | None = None
    """Run folders in; one HTML page out."""


class RecipeFile(StageConfig):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    """Version of this format."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    """Names the run folder: `runs/NAME`."""
    description: str = ""
    """What the run is for, in a sentence."""
    defaults: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Per verb: settings that its stages share."""
    stages: dict[str, StageConfig] | None = None
    """Name -> stage, worked off in this order."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One verb's work within a recipe.

    Attributes:
        name: The stage's name; empty in a recipe of one verb.
        verb: A key of :data:`VERBS`.
        data: Its settings as plain data, with references still in them.
        needs: The stages it refers to.
    """

    name: str
    verb: str
    data: dict[str, Any]
    needs: tuple[str, ...] = ()

    def config(self, folders: Mapping[str, Path]) -> Config:
        """The settings with each reference replaced by the folder of that stage."""
        path = f"stages.{self.name}.{self.verb}" if self.name else self.verb
        return validate(VERBS[self.verb].config, _bind(self.data, folders), path=path).resolved()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe: a name and the stages to work off, in order."""

    name: str
    description: str = ""
    stages: tuple[Stage, ...] = field(default_factory=tuple)

    @property
    def is_lifecycle(self) -> bool:
        """Whether it chains stages, rather than naming one verb."""
        return bool(self.stages[0].name)

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with nothing left implicit; itself a valid recipe."""
        head: dict[str, Any] = {"schema": 1, "name": self.name}
        if self.description:
            head["description"] = self.description
        if not self.is_lifecycle:
            (stage,) = self.stages
            return {**head, stage.verb: plain(stage.config({}))}
        symbolic = {stage.name: Path(f"{REFERENCE}{stage.name}") for stage in self.stages}
        stages = {s.name: {s.verb: plain(s.config(symbolic))} for s in self.stages}
        return {**head, "stages": stages}

    def fingerprints(self) -> dict[str, str]:
        """Per stage a hash of its settings and of the stages it needs: equal hash, equal work."""
        found: dict[str, str] = {}
        for stage in self.stages:
            symbolic = {name: Path(f"{REFERENCE}{name}") for name in stage.needs}
            found[stage.name] = hash_json(
                {
                    "verb": stage.verb,
                    "config": plain(stage.config(symbolic)),
                    "needs": {name: found[name] for name in stage.needs},
                }
            )
        return found


def plain(config: Config) -> dict[str, Any]:
    """A config as plain data (JSON types), defaults included."""
    return config.model_dump(mode="json", by_alias=True)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: The YAML file.
        overrides: ``key=value`` settings laid over the file. In a recipe of one verb the verb's
            name may be left out: ``optimizer.lr=1e-3``.

    Raises:
        ConfigError: One line per mistake, each with the full path of its key.
    """
    data = load_yaml(path)
    return parse_recipe(apply_overrides(data, _complete(data, overrides)))


def _complete(data: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Prefix an override with the verb where the recipe has one verb and the override none."""
    verbs = [key for key in data if key in VERBS]
    if len(verbs) != 1 or "stages" in data:
        return list(overrides)
    top = {"schema", "name", "description", *verbs}
    return [o if o.partition("=")[0].split(".")[0] in top else f"{verbs[0]}.{o}" for o in overrides]


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Validate a recipe given as plain data; see :func:`load_recipe`."""
    raw_stages = data.get("stages")
    if not isinstance(raw_stages, Mapping):
        file = validate(RecipeFile, data)
        verb = _only_verb({key: data[key] for key in data if key in VERBS}, path="")
        if file.defaults:
            raise ConfigError("defaults: needs stages to apply to; put the settings in the verb")
        stage = Stage(name="", verb=verb, data=dict(data[verb]))
        _references(stage.data, verb, {})
        return Recipe(name=file.name, description=file.description, stages=(stage,))
    merged = {**data, "stages": _with_defaults(raw_stages, data.get("defaults") or {})}
    file = validate(RecipeFile, merged)
    misplaced = [key for key in data if key in VERBS]
    if misplaced:
        raise ConfigError(f"{misplaced[0]}: a recipe has either stages or one verb, not both")
    if not merged["stages"]:
        raise ConfigError("stages: is empty; name at least one stage")
    return Recipe(name=file.name, description=file.description, stages=_stages(merged["stages"]))


def _with_defaults(stages: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    for verb in defaults:
        if verb not in VERBS:
            raise ConfigError(f"defaults.{verb}: unknown verb{did_you_mean(str(verb), VERBS)}")
    result: dict[str, Any] = {}
    for name, stage in stages.items():
        if not STAGE_NAME.fullmatch(str(name)):
            raise ConfigError(
                f"stages.{name}: a stage's name is lower-case letters, digits, '-' and '_'"
            )
        result[name] = stage
        if isinstance(stage, Mapping):
            result[name] = {
                verb: merge(defaults.get(verb) or {}, settings)
                if isinstance(settings, Mapping)
                else settings
                for verb, settings in stage.items()
            }
    return result


def _stages(stages: Mapping[str, Any]) -> tuple[Stage, ...]:
    found: list[Stage] = []
    for name, content in stages.items():
        verb = _only_verb(content, path=f"stages.{name}")
        earlier = {stage.name: stage for stage in found}
        needs = _references(content[verb], f"stages.{name}.{verb}", earlier)
        found.append(Stage(name=name, verb=verb, data=dict(content[verb]), needs=needs))
    return tuple(found)


def _only_verb(content: Mapping[str, Any], *, path: str) -> str:
    where = path or "recipe"
    if not content:
        raise ConfigError(f"{where}: names no verb (known: {', '.join(VERBS)}), and no stages")
    if len(content) > 1:
        raise ConfigError(f"{where}: names several verbs ({', '.join(content)}); keep one")
    return next(iter(content))


def _references(value: Any, path: str, earlier: Mapping[str, Stage]) -> tuple[str, ...]:
    """The stages that ``value`` refers to, in order.

    Raises:
        ConfigError: If one is not an earlier stage.
    """
    if isinstance(value, str) and value.startswith(REFERENCE):
        name = value.removeprefix(REFERENCE).partition("/")[0]
        if name not in earlier:
            raise ConfigError(
                f"{path}: no earlier stage is called '{name}'{did_you_mean(name, earlier)}"
            )
        return (name,)
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(f"{path}.{key}", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inner = [(f"{path}.{index}", item) for index, item in enumerate(value)]
    found = [name for where, item in inner for name in _references(item, where, earlier)]
    return tuple(dict.fromkeys(found))


def _bind(value: Any, folders: Mapping[str, Path]) -> Any:
    if isinstance(value, str) and value.startswith(REFERENCE):
        name, _, inside = value.removeprefix(REFERENCE).partition("/")
        return str(folders[name] / inside)
    if isinstance(value, Mapping):
        return {key: _bind(item, folders) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bind(item, folders) for item in value]
    return value
