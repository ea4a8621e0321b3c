"""LoRA, DoRA and SHiRA, as the library ``peft`` makes them, under our loop.

The adapters are put into the model in place, so that the loop and evaluation see the same Hugging
Face class as ever. The result is peft's own adapter folder.

Papers: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; rsLoRA, arXiv 2312.03732; SHiRA, arXiv
2406.13175.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samara.adapt.config import LoraMethod, ShiraMethod
from samara.adapt.methods import TrainedWeights, tensor_bytes
from samara.adapt.models import TaskModel
from samara.errors import ConfigError
from samara.model.disk_errors import disk_errors
from samara.runs import RunFolder, new_folder
from samara.sparse.attach import linear_weights
from samara.sparse.delta_records import Provenance
from samara.train.optim import Optimizer, Updater

ADAPTER = "adapter"


class PeftAdaptation:
    """An adapter is trained beside the frozen weights; a new head is trained with it."""

    def __init__(self, loaded: TaskModel, method: LoraMethod | ShiraMethod, *, seed: int) -> None:
        """Put the adapter in.

        Raises:
            ConfigError: If peft is not installed, or the model has no layer that it can adapt.
        """
        try:
            import peft
        except ImportError:
            raise ConfigError(
                f"method.kind: {method.kind} needs the package peft; pip install 'samara[adapt]'"
            ) from None
        targets = _targets(loaded.model, method)
        head = sorted({name.rpartition(".")[0] for name in loaded.new_tensors})
        settings = _settings(peft, method, loaded.model, targets, head, seed)
        try:
            self._peft = peft.get_peft_model(loaded.model, settings)
        except ValueError as error:
            raise ConfigError(f"method: peft refuses it: {error}") from error
        self.model: PreTrainedModel = self._peft.get_base_model()
        self._optimizer = Optimizer(self.model, method.optimizer)
        self._targets = targets
        self.preparation_seconds = 0.0

    @property
    def updater(self) -> Updater:
        """See :class:`~samara.adapt.methods.Adaptation`."""
        return self._optimizer

    @property
    def weights(self) -> TrainedWeights:
        """See :class:`~samara.adapt.methods.Adaptation`."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return TrainedWeights(trained)

    @property
    def trained(self) -> list[nn.Parameter]:
        """See :class:`~samara.adapt.methods.Adaptation`."""
        return self._optimizer.parameters

    @property
    def num_trained(self) -> int:
        """See :class:`~samara.adapt.methods.Adaptation`."""
        return sum(p.numel() for p in self._optimizer.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """See :class:`~samara.adapt.methods.Adaptation`."""
        return tensor_bytes(self._optimizer.state_dict().values())

    def details(self) -> dict[str, Any]:
        """See :class:`~samara.adapt.methods.Adaptation`."""
        return {"targets": self._targets}

    def watch(self, losses: Sequence[float]) -> None:
        """See :class:`~samara.adapt.methods.Adaptation`: nothing depends on them."""

    def observe(self, loss: float) -> None:
        """See :class:`~samara.adapt.methods.Adaptation`: nothing depends on it."""

    def export(self, run: RunFolder, records: Provenance) -> list[str]:
        """Write ``adapter``, a folder of peft."""
        del records
        self.save(run.path / ADAPTER)
        return [ADAPTER]

    def save(self, folder: Path) -> None:
        """Write a folder of peft, complete or absent.

        Raises:
            ResourceError: If the disk is full.
        """
        with new_folder(folder) as staging, disk_errors():
            self._peft.save_pretrained(staging, save_embedding_layers=False)


def _targets(model: PreTrainedModel, method: LoraMethod | ShiraMethod) -> list[str]:
    """Names of the layers that are adapted.

    Raises:
        ConfigError: If there are none.
    """
    if method.targets is not None:
        return list(method.targets)
    kinds = (nn.Linear,) if isinstance(method, ShiraMethod) else (nn.Linear, Conv1D)
    uses = linear_weights(model)
    names = [n.rpartition(".")[0] for n, use in uses.items() if isinstance(use.module, kinds)]
    if not names:
        raise ConfigError(
            f"method.kind: {method.kind} adapts nn.Linear, and the trunk of this model has none; "
            "use sparse or full"
        )
    return names


def _settings(
    peft: Any,
    method: LoraMethod | ShiraMethod,
    model: PreTrainedModel,
    targets: list[str],
    head: list[str],
    seed: int,
) -> Any:
    common = {"target_modules": targets, "modules_to_save": head or None}
    if isinstance(method, ShiraMethod):
        return peft.ShiraConfig(r=method.rank, random_seed=seed, **common)
    return peft.LoraConfig(
        r=method.rank,
        lora_alpha=2 * method.rank if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rank_stabilized,
        use_dora=method.kind == "dora",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **common,
    )
