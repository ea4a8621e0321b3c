"""What a run starts from: a fresh design, or the weights of another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samara.data.objectives import MaskedObjective, Objective
from samara.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from samara.errors import CheckpointError, ConfigError, DataError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import load_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM
from samara.runs import Compute, RunFolder, hash_weights, model_folder, read_json
from samara.train.config import PretrainConfig

LanguageModel = SamaraForCausalLM | SamaraForMaskedLM


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from.

    Attributes:
        design: The expanded design.
        folder: The model folder to load; None: fresh weights.
        parents: For the lineage: role to content hash.
        inherited: Compute that its ancestors spent.
    """

    design: ModelConfig
    folder: Path | None = None
    parents: Mapping[str, str] = field(default_factory=dict)
    inherited: Compute = field(default_factory=Compute)

    def build(self, objective: Objective, tokenizer: TextTokenizer) -> LanguageModel:
        """Make the model, in float32 on the CPU; fresh weights come from torch's generator.

        Args:
            objective: Decides which way attention looks, and the head.
            tokenizer: Gives the ids of begin, end and padding; generation stops at the end mark.
        """
        masked = isinstance(objective, MaskedObjective)
        special_tokens = tokenizer.special_tokens
        if self.folder is None:
            config = SamaraConfig.from_design(
                self.design,
                attention="bidirectional" if masked else "causal",
                bos_token_id=special_tokens["bos_token_id"],
                eos_token_id=special_tokens["eos_token_id"],
                pad_token_id=special_tokens["pad_token_id"],
            )
            return SamaraForMaskedLM(config) if masked else SamaraForCausalLM(config)
        if masked:
            return load_model(self.folder, model_class=SamaraForMaskedLM, dtype=torch.float32)
        model = load_model(self.folder, dtype=torch.float32)
        for name, token_id in special_tokens.items():
            if token_id is not None:
                setattr(model.config, name, token_id)
                setattr(model.generation_config, name, token_id)
        return model


def find_origin(config: PretrainConfig, tokenizer: TextTokenizer) -> Origin:
    """Resolve ``model`` or ``init_from`` of a recipe against the tokenizer that it trains with.

    Raises:
        ConfigError: If the design's vocabulary or context, or the tokenizer, does not fit.
        CheckpointError: If ``init_from`` holds no whole Samara model.
    """
    if config.model is not None:
        return Origin(design=config.model.expand(vocab_size=tokenizer.vocab_size))
    assert config.init_from is not None
    origin = origin_of(config.init_from, sequence_length=config.data.sequence_length)
    assert origin.folder is not None
    check_tokenizer(origin.folder, tokenizer)
    return origin


def origin_of(init_from: str, *, sequence_length: int) -> Origin:
    """A model to go on from.

    Args:
        init_from: Its folder, or that of the run that made it.
        sequence_length: Positions it is to be trained on.

    Raises:
        ConfigError: If its context is shorter.
        CheckpointError: If the folder holds no Samara model.
    """
    folder = model_folder(Path(init_from).expanduser())
    design = _read_design(folder)
    if sequence_length > design.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length: {sequence_length} exceeds the {design.max_position_embeddings} "
            f"positions of init_from {folder}"
        )
    return Origin(
        design=design,
        folder=folder,
        parents={"init_from": hash_weights(folder)},
        inherited=RunFolder(folder.parent).lineage().total if folder.name == "model" else Compute(),
    )


def _read_design(folder: Path) -> ModelConfig:
    fields = read_json(folder / "config.json")
    if not isinstance(fields, dict) or fields.get("model_type") != SamaraConfig.model_type:
        raise CheckpointError(
            f"init_from: {folder} holds no Samara model; pretrain goes on from folders that "
            "Samara wrote"
        )
    config: SamaraConfig = SamaraConfig.from_dict(fields)
    return config.to_design()


def check_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    """Refuse to go on with other tokens than the weights were trained on."""
    try:
        own = TextTokenizer.load(folder)
    except DataError as error:
        raise ConfigError(f"init_from: {error}") from error
    if _content(own) != _content(tokenizer):
        raise ConfigError(
            f"init_from: the tokenizer of {folder} is not that of {tokenizer.folder}; "
            f"prepare the corpus with tokenizer: {{kind: load, path: {folder}}}"
        )


def _content(tokenizer: TextTokenizer) -> dict[str, Any]:
    """What decides the tokens, whatever wrote the file."""
    data = dict(read_json(tokenizer.folder / TOKENIZER_FILE))
    ignored = ("truncation", "padding")
    kept = {key: value for key, value in data.items() if key not in ignored}
    return {**kept, "special_tokens": tokenizer.special_tokens}
