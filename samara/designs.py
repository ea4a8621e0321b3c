"""What verb ``design`` reads off recipes, and the recipe that it writes for a design it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samara.config import dump_yaml, validate
from samara.data.config import PrepareConfig, TrainTokenizer
from samara.errors import ConfigError
from samara.measure.design import DesignInput
from samara.measure.fit import Candidate, Fit, Limits, fit, limits_text
from samara.model.config import ModelConfig
from samara.recipe import REFERENCE, Recipe, Stage, load_recipe
from samara.runs import write_text
from samara.train.config import PretrainConfig

WIDTH_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "head_dim",
    "num_query_heads",
    "num_kv_heads",
    "gqa_group_size",
    "ffn_dim",
    "ffn_dim_divisor",
    "layerwise_scaling",
    "cola",
)
FEWEST_TIMES = 10
"""How often a run evaluates and saves at least, where the recipe means to."""
LONGEST_WARMUP = 0.1
"""Share of a run; a longer warm-up was meant for a longer run, and the default is taken."""


def design_inputs(paths: Sequence[Path], overrides: Sequence[str] = ()) -> list[DesignInput]:
    """Collect the designs of recipes, a chain's stages each for itself.

    Args:
        paths: Recipe files.
        overrides: ``key=value`` settings laid over each of them.

    Raises:
        ConfigError: If a recipe is wrong, or pretrains nothing.
    """
    found = []
    for path in paths:
        recipe = load_recipe(path, overrides)
        configs = _pretrainings(recipe)
        if not configs:
            raise ConfigError(f"{path}: has no pretrain section with a model to design")
        found += [_design_input(name, config, recipe) for name, config in configs.items()]
    return found


def _pretrainings(recipe: Recipe) -> dict[str, PretrainConfig]:
    symbolic = {stage.name: Path(f"{REFERENCE}{stage.name}") for stage in recipe.stages}
    configs = {stage.name or recipe.name: stage.config(symbolic) for stage in recipe.stages}
    return {
        name: config
        for name, config in configs.items()
        if isinstance(config, PretrainConfig) and config.model is not None
    }


def _design_input(name: str, config: PretrainConfig, recipe: Recipe) -> DesignInput:
    assert config.model is not None
    training, length = config.training, config.data.sequence_length
    vocab_size = config.model.vocab_size or _planned_vocab_size(config, recipe)
    rates = training.layer_rates(config.model.num_hidden_layers)
    return DesignInput(
        name=name,
        model=config.model.expand(vocab_size=vocab_size),
        sequence_length=length,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size or training.batch_size,
        tokens=training.num_steps(length) * training.batch_size * length,
        precision=training.precision,
        optimizer=config.optimizer.kind,
        activation_checkpointing=training.activation_checkpointing,
        device_profile=config.logging.device_profile,
        active_layers=None if rates is None else rates.active_layers,
        layer_keep=None if rates is None else rates.keep,
    )


def _planned_vocab_size(config: PretrainConfig, recipe: Recipe) -> int | None:
    """The size of the tokenizer that the corpus will be given, where the recipe trains one."""
    corpus = config.data.corpus
    if isinstance(corpus, str):
        name = corpus.removeprefix(REFERENCE)
        stages = {stage.name: stage for stage in recipe.stages}
        if not corpus.startswith(REFERENCE) or stages[name].verb != "prepare":
            return None
        prepared = stages[name].config({n: Path(n) for n in stages})
        assert isinstance(prepared, PrepareConfig)
        corpus = prepared
    tokenizer = corpus.tokenizer
    return tokenizer.vocab_size if isinstance(tokenizer, TrainTokenizer) else None


# --- the best design under limits ---------------------------------------------------------------


def fit_recipe(
    paths: Sequence[Path],
    overrides: Sequence[str],
    limits: Limits,
    *,
    device: str | None = None,
    write: Path | None = None,
) -> Fit:
    """Search the best design under limits, starting from a recipe's.

    Args:
        paths: One recipe with one design.
        overrides: ``key=value`` settings laid over it.
        limits: What may not be exceeded.
        device: A device profile (name or YAML file). Left out: the one the recipe names.
        write: Where to write the recipe of the answer, if anywhere.

    Raises:
        ConfigError: If there is not one design to start from, nothing keeps the limits, or the
            file to write exists.
    """
    if len(paths) != 1:
        raise ConfigError(f"--fit: starts from one recipe, {len(paths)} given")
    (path,) = paths
    if write is not None and write.exists():
        raise ConfigError(f"--write {write}: exists; name a new file")
    inputs = design_inputs(paths, overrides)
    if any(item.layer_keep is not None for item in inputs):
        raise ConfigError(
            "--fit: chooses the number of layers, and training.layer_dropout has rates for those "
            "of one design; take it out with training.layer_dropout=null"
        )
    if len(inputs) != 1:
        names = ", ".join(item.name for item in inputs)
        raise ConfigError(f"--fit: starts from one design, {path} has {len(inputs)} ({names})")
    recipe = load_recipe(path, overrides)
    (stage,) = [s for s in recipe.stages if s.verb == "pretrain" and s.data.get("model")]
    model = validate(ModelConfig, stage.data["model"], path="model")
    found = fit(inputs[0], model, limits, device=device)
    if write is not None:
        write_text(write, _fitted_recipe(recipe, stage, found, source=path, device=device))
    return found


def _fitted_recipe(
    recipe: Recipe, stage: Stage, found: Fit, *, source: Path, device: str | None
) -> str:
    """The recipe with the answer's design and run in the place of its own."""
    settings = _fitted_settings(stage.data, found.best)
    if device is not None:
        settings["logging"] = {**(settings.get("logging") or {}), "device_profile": device}
    head: dict[str, Any] = {
        "schema": 1,
        "name": f"{recipe.name}-fit",
        "description": f"The best design for {limits_text(found.limits)}, from {recipe.name}.",
    }
    if recipe.is_lifecycle:
        stages = {s.name: {s.verb: settings if s is stage else s.data} for s in recipe.stages}
        data = {**head, "stages": stages}
    else:
        data = {**head, stage.verb: settings}
    comment = (
        f"# Written by: samara design {source} --fit. The learning rate is still that of\n"
        f"# {recipe.name}, which has another size: try half and double before a long run.\n"
    )
    return comment + dump_yaml(data)


def _fitted_settings(data: dict[str, Any], best: Candidate) -> dict[str, Any]:
    """The settings of a pretraining with the candidate's design, tokens and batches."""
    run = best.input
    steps = run.tokens // (run.batch_size * run.sequence_length)
    kept = {key: value for key, value in data["model"].items() if key not in WIDTH_KEYS}
    training = {key: value for key, value in data["training"].items() if key != "max_steps"}
    training |= {
        "max_tokens": run.tokens,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
    }
    result = {**data, "model": {**best.shape, **kept}, "training": training}
    schedule = dict(data.get("schedule") or {})
    if (schedule.get("warmup_steps") or 0) > LONGEST_WARMUP * steps:
        del schedule["warmup_steps"]
        result["schedule"] = schedule
    for section, key in (("training", "evaluate_every_steps"), ("checkpoint", "every_steps")):
        value = (result.get(section) or {}).get(key)
        if value is not None:
            often = max(1, steps // FEWEST_TIMES)
            result[section] = {**result[section], key: min(value, often)}
    return result
