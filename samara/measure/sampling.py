"""Text that a model writes, to read beside its scores; the same again for the same seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samara.measure.config import SamplingConfig
from samara.measure.language_model import LanguageModel
from samara.measure.language_model_folder import open_language_model


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, and what the model wrote after it."""

    prompt: str
    text: str


def sample_texts(
    language_model: LanguageModel, config: SamplingConfig, *, seed: int
) -> list[Sample]:
    """Let a model go on after each prompt.

    Each prompt has random numbers of its own, made from the seed and its text: the sample of a
    prompt does not change with the prompts around it. The global random state is left as it was.

    Args:
        language_model: The model with its tokenizer.
        config: Prompts, length, temperature, top-p.
        seed: Another seed gives other texts; of no account at temperature 0.

    Raises:
        ConfigError: If ``max_new_tokens`` leaves no room for a prompt.
    """
    options: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": 0,  # all of them: transformers would take the best 50
        }
    device = language_model.device
    samples = []
    for prompt in config.prompts:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_prompt_seed(seed, prompt))
            (written,) = language_model.generate_until(
                [prompt], max_new_tokens=config.max_new_tokens, options=options
            )
        samples.append(Sample(prompt=prompt, text=written.text))
    return samples


def sample_from_folder(
    path: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """Open a model and return the prompt with what the model writes after it.

    Args:
        path: A model folder, or the run folder of the model.
        prompt: Where to go on from.
        max_new_tokens: The most tokens to write.
        temperature: 0: always the likeliest token.
        top_p: Draw from the likeliest tokens that have this much probability together.
        seed: Decides the draws.

    Raises:
        CheckpointError: If the folder holds no model with its tokenizer.
        ConfigError: If ``max_new_tokens`` leaves no room for the prompt.
    """
    config = SamplingConfig(
        prompts=(prompt,), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    )
    saved = open_language_model(path)
    (sample,) = sample_texts(saved.language_model, config, seed=seed)
    return sample.prompt + sample.text


def _prompt_seed(seed: int, prompt: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits and a sign
