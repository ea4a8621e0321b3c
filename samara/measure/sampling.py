"""Text that a model writes, to read beside its scores; the same again for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

from samara.measure.config import SamplingConfig
from samara.measure.generation import GenerationSettings, generate_texts
from samara.measure.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, and what the model wrote after it."""

    prompt: str
    text: str


def sample_texts(
    language_model: LanguageModel, config: SamplingConfig, *, seed: int
) -> list[Sample]:
    """Let a model go on after each prompt; a sample does not change with the prompts around it.

    Args:
        language_model: The model with its tokenizer.
        config: Prompts, length, temperature, top-p.
        seed: Another seed gives other texts; of no account at temperature 0.

    Raises:
        ConfigError: If ``max_new_tokens`` leaves no room for a prompt.
        DataError: If a prompt does not fit into the model's context.
    """
    settings = GenerationSettings(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed,
    )
    texts = generate_texts(language_model, config.prompts, settings)
    return [
        Sample(prompt=prompt, text=text) for prompt, text in zip(config.prompts, texts, strict=True)
    ]
