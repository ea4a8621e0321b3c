"""Teach transformers' Auto classes what a ``samara`` checkpoint is, without importing transformers.

Importing transformers takes seconds, so ``import samara`` must not. If transformers is not there
yet, an import hook waits: it counts how deep we are in imports of the two packages, and when the
outermost of them has finished, so that no module is half-made, it registers what can be registered.
Nothing private of transformers is touched.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODEL = "transformers.models.auto.modeling_auto"
WATCHED = ("transformers", "samara")


def register_with_transformers() -> None:
    """Register now what transformers has loaded, and the rest when it loads it."""
    hook = _RegistrationHook()
    hook.register()
    if not hook.is_done and not any(isinstance(f, _RegistrationHook) for f in sys.meta_path):
        sys.meta_path.insert(0, hook)


class _RegistrationHook:
    """A finder that finds nothing new: it only learns when imports of interest finish."""

    def __init__(self) -> None:
        self.depth = 0
        self.has_config = self.has_model = False

    @property
    def is_done(self) -> bool:
        return self.has_config and self.has_model

    def register(self) -> None:
        """Register with each Auto module that is loaded."""
        if not self.has_config and AUTO_CONFIG in sys.modules:
            from samara.model.configuration import SamaraConfig

            auto_config = sys.modules[AUTO_CONFIG].AutoConfig
            auto_config.register(SamaraConfig.model_type, SamaraConfig, exist_ok=True)
            self.has_config = True
        if not self.has_model and AUTO_MODEL in sys.modules:
            from samara.model.classification import SamaraForSequenceClassification
            from samara.model.masked_lm import SamaraForMaskedLM
            from samara.model.modeling import SamaraForCausalLM, SamaraModel

            auto, config = sys.modules[AUTO_MODEL], SamaraForCausalLM.config_class
            auto.AutoModel.register(config, SamaraModel, exist_ok=True)
            auto.AutoModelForCausalLM.register(config, SamaraForCausalLM, exist_ok=True)
            auto.AutoModelForMaskedLM.register(config, SamaraForMaskedLM, exist_ok=True)
            auto.AutoModelForSequenceClassification.register(
                config, SamaraForSequenceClassification, exist_ok=True
            )
            self.has_model = True

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let Python find a watched module, and wrap its execution."""
        if name.partition(".")[0] not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
                if self.depth == 1 and not self.is_done:
                    self.register()
                    if self.is_done:
                        sys.meta_path.remove(self)
            finally:
                self.depth -= 1

        # The loader belongs to this one spec.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
