"""Samara: build, grow and adapt your own language models on little hardware.

Public names are imported when they are first used, so that ``import samara`` is instant. It also
tells transformers, now or once it is imported, what a ``samara`` checkpoint is:
``AutoModelForCausalLM.from_pretrained(folder)`` works from then on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from samara.model.auto import register_with_transformers

if TYPE_CHECKING:
    from samara.errors import SamaraError
    from samara.model.classification import SamaraForSequenceClassification
    from samara.model.config import ModelConfig
    from samara.model.configuration import SamaraConfig
    from samara.model.loading import load_model, save_model
    from samara.model.masked_lm import SamaraForMaskedLM
    from samara.model.modeling import SamaraForCausalLM, SamaraModel, set_activation_checkpointing
    from samara.sparse.delta import Delta

__all__ = [
    "Delta",
    "ModelConfig",
    "SamaraConfig",
    "SamaraError",
    "SamaraForCausalLM",
    "SamaraForMaskedLM",
    "SamaraForSequenceClassification",
    "SamaraModel",
    "load_model",
    "save_model",
    "set_activation_checkpointing",
]

_MODULES = {
    "Delta": "samara.sparse.delta",
    "ModelConfig": "samara.model.config",
    "SamaraConfig": "samara.model.configuration",
    "SamaraError": "samara.errors",
    "SamaraForCausalLM": "samara.model.modeling",
    "SamaraForMaskedLM": "samara.model.masked_lm",
    "SamaraForSequenceClassification": "samara.model.classification",
    "SamaraModel": "samara.model.modeling",
    "load_model": "samara.model.loading",
    "save_model": "samara.model.loading",
    "set_activation_checkpointing": "samara.model.modeling",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'samara' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


register_with_transformers()
