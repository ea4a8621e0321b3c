"""Models on disk, of every format that ``samara convert`` reads, as growth takes and gives them."""

from __future__ import annotations

from dataclasses import replace

from samara.growth.state import GrowthState
from samara.model.configuration import SamaraConfig
from samara.model.interchange.stored_model import StoredModel, token_ids
from samara.model.interchange.stored_tensors import in_memory


def stored_state(model: StoredModel) -> GrowthState:
    """Read the weights of a stored model; an optimizer it has none.

    Args:
        model: From :func:`samara.model.interchange.formats.read_model`: Samara's own format, a
            plain Llama of transformers, OpenELM.
    """
    weights = {name: tensor.load() for name, tensor in model.tensors.items()}
    return GrowthState(design=model.config.to_design(), weights=weights)


def grown_model(state: GrowthState, *, source: StoredModel) -> StoredModel:
    """The larger model, with all that is no weight of the smaller one: tokenizer, special tokens.

    Args:
        state: The larger model.
        source: What it was grown from.
    """
    config = SamaraConfig.from_design(
        state.design, attention=source.config.attention, **token_ids(source.config)
    )
    tensors = {name: in_memory(weight) for name, weight in state.weights.items()}
    return replace(source, config=config, tensors=tensors)
