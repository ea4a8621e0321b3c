"""What verb ``design`` reads off recipes: every pretraining in them, as far as its costs go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samara.data.config import PrepareConfig, TrainTokenizer
from samara.errors import ConfigError
from samara.measure.design import DesignInput
from samara.recipe import REFERENCE, Recipe, load_recipe
from samara.train.config import PretrainConfig


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
