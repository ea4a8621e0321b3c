"""Which head a saved configuration is for: the three that a checkpoint may have."""

from __future__ import annotations

from dataclasses import dataclass

from samara.errors import ConfigError, did_you_mean
from samara.model.classification import SamaraForSequenceClassification
from samara.model.configuration import SamaraConfig
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM, SamaraPreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model class.

    Attributes:
        model_class: The class; ``config.json`` names it under ``architectures``.
        description: What such a model is, for people.
        auto_class: Who loads it in ``transformers``.
    """

    model_class: type[SamaraPreTrainedModel]
    description: str
    auto_class: str


CAUSAL = Head(
    model_class=SamaraForCausalLM,
    description="causal language model",
    auto_class="AutoModelForCausalLM",
)
MASKED = Head(
    model_class=SamaraForMaskedLM,
    description="masked language model",
    auto_class="AutoModelForMaskedLM",
)
CLASSIFICATION = Head(
    model_class=SamaraForSequenceClassification,
    description="text classification model",
    auto_class="AutoModelForSequenceClassification",
)
HEADS = {head.model_class.__name__: head for head in (CAUSAL, MASKED, CLASSIFICATION)}


def head_of(config: SamaraConfig) -> Head:
    """The head that ``architectures`` names; where it names none, a language model's.

    Raises:
        ConfigError: If it names another class.
    """
    names: list[str] = config.architectures or []
    if not names:
        return CAUSAL if config.attention == "causal" else MASKED
    if names[0] not in HEADS:
        raise ConfigError(
            f"architectures: unknown class '{names[0]}'{did_you_mean(names[0], HEADS)}"
        )
    return HEADS[names[0]]
