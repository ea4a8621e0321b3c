"""What of a model is trained and exchanged: adapters, few weights of its own, or all of them.

``lora``    adapters of peft beside the frozen model, and a new head
``sparse``  few weights, chosen once by the server on its own validation rows
            (:mod:`samara.sparse.selection`) and kept beside the run as ``support.safetensors``;
            a client needs that file once, and from then on only values travel, float32, in the
            order of their positions. The whole of a new head is among them.
``full``    all weights

Whichever it is, clients, server and messages know named float32 arrays and nothing else, and layer
dropout works on the layers around them: a skipped layer leaves what is trained of it without
gradient, and so its values, moments and step counts as they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from samara.adapt.config import LoraMethod, SparseMethod
from samara.adapt.methods import SUPPORT, SparseAdaptation
from samara.adapt.models import TaskModel
from samara.adapt.peft_methods import ADAPTER, PeftAdaptation
from samara.data.rows import Rows
from samara.errors import ConfigError
from samara.federated.aggregation import Tensor
from samara.federated.config import FederateConfig
from samara.federated.store import to_torch
from samara.model.disk_errors import disk_errors
from samara.model.modeling import SamaraPreTrainedModel, set_activation_checkpointing
from samara.runs import RunFolder, new_folder, write_bytes
from samara.sparse.calibration import Calibration
from samara.sparse.config import SparseAdamWConfig
from samara.sparse.delta_records import Provenance
from samara.sparse.update import SparseAdamW
from samara.train.config import AdamW
from samara.train.layer_stack import find_layers
from samara.train.objective import Objective
from samara.train.optim import Optimizer, Updater

HEAD_FILE, MODEL = "head.safetensors", "model"
FLOAT_BYTES = 4


class Payload(ABC):
    """What is trained of a model.

    Attributes:
        model: Runs.
        parameters: The trained values by the names under which they travel.
        homes: The model's own parameter that each is of.
    """

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    homes: Mapping[str, nn.Parameter]

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put values in; those that are not named stay."""

    @abstractmethod
    def optimizer(self) -> Updater:
        """An optimizer that starts afresh, of what asks for gradients now."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that training keeps beside the weights: gradients, moments and the like."""

    @property
    def setup_bytes(self) -> int:
        """Bytes that a client needs once beside model and recipe, in no message of a round."""
        return 0

    @abstractmethod
    def export(self, run: RunFolder, records: Provenance) -> None:
        """Write the values that are in the model as the run's result."""

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.parameters.values(), *self.model.parameters()):
            parameter.grad = None


class WholeTensors(Payload):
    """Parameters of the model that ask for gradients, each as a whole."""

    def __init__(
        self,
        loaded: TaskModel,
        optimizer: AdamW,
        *,
        adaptation: PeftAdaptation | None = None,
        is_full: bool = False,
    ) -> None:
        """Take what asks for gradients.

        Args:
            loaded: The model.
            optimizer: Of the clients.
            adaptation: The adapters in it, if there are any.
            is_full: Whether the result is the model, rather than its head.
        """
        self.model, self._loaded, self._settings = loaded.model, loaded, optimizer
        self._adaptation, self._is_full = adaptation, is_full
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.homes = self.parameters

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Payload`."""
        with torch.no_grad():
            for name, value in to_torch(tensors).items():
                self.parameters[name].copy_(value)

    def optimizer(self) -> Updater:
        """See :class:`Payload`."""
        return Optimizer(self.model, self._settings)

    @property
    def held_bytes(self) -> int:
        """See :class:`Payload`: a gradient and two moments."""
        return 3 * FLOAT_BYTES * sum(p.numel() for p in self.parameters.values())

    def export(self, run: RunFolder, records: Provenance) -> None:
        """See :class:`Payload`: an adapter folder, a model folder, or the head."""
        del records
        if self._adaptation is not None:
            self._adaptation.save(run.path / ADAPTER)
        elif self._is_full:
            with new_folder(run.path / MODEL) as staging, disk_errors():
                self.model.save_pretrained(staging)
                self._loaded.tokenizer.save_pretrained(str(staging))
        else:
            head = {n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}
            with disk_errors():
                write_bytes(run.path / HEAD_FILE, save(head))


class SparseValues(Payload):
    """Few weights, trained in place; each tensor's travel as one vector of values."""

    def __init__(
        self, config: FederateConfig, loaded: TaskModel, *, run: RunFolder, calibration: Calibration
    ) -> None:
        """Choose the weights on the server's rows, or read what was chosen, and attach.

        Raises:
            ConfigError: If the settings do not fit the model.
            CheckpointError: If the model is stored otherwise than it is loaded.
        """
        own = config.local.optimizer
        self._settings = SparseAdamWConfig(
            lr=own.lr, betas=own.betas, eps=own.eps, weight_decay=own.weight_decay
        )
        self._adaptation = SparseAdaptation(
            loaded,
            SparseMethod(selection=config.selection, optimizer=self._settings),
            run=run,
            calibration=calibration,
            seed=config.seed,
        )
        self.model, self._file = loaded.model, run.path / SUPPORT
        self.selected = self._adaptation.selected
        self.parameters = {name: entry.values for name, entry in self.selected.items()}
        self.homes = {name: entry.weight for name, entry in self.selected.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Payload`."""
        with torch.no_grad():
            for name, value in to_torch(tensors).items():
                entry = self.selected[name]
                entry.values.copy_(value)
                entry.write(entry.values)

    def optimizer(self) -> Updater:
        """See :class:`Payload`."""
        for entry in self.selected.values():
            entry.exp_avg.zero_()
            entry.exp_avg_sq.zero_()
            entry.steps = torch.zeros(())
        return SparseAdamW(self.selected, self._settings)

    @property
    def held_bytes(self) -> int:
        """See :class:`Payload`: positions and the base's numbers too."""
        return sum(entry.state_bytes for entry in self.selected.values())

    @property
    def setup_bytes(self) -> int:
        """See :class:`Payload`: which weights."""
        return self._file.stat().st_size

    def export(self, run: RunFolder, records: Provenance) -> None:
        """See :class:`Payload`: a delta file, and the head where the base has none."""
        self._adaptation.export(run, records)


# --- making one -----------------------------------------------------------------------------------


def make_payload(
    config: FederateConfig,
    loaded: TaskModel,
    *,
    run: RunFolder,
    rows: Callable[[], Rows],
    objective: Objective,
) -> Payload:
    """Say what is trained of a model, by method and payload.

    Args:
        config: The recipe.
        loaded: The model, on its device.
        run: Where a choice of weights is kept.
        rows: Gives those of the server; asked for where weights are chosen.
        objective: The loss of the task.

    Raises:
        ConfigError: If method or payload do not fit the model.
    """
    own = config.local.optimizer
    if config.method == "head_only":
        _only_the_head(loaded)
        return WholeTensors(loaded, own)
    if config.payload == "full":
        loaded.model.requires_grad_(True)
        return WholeTensors(loaded, own, is_full=True)
    if config.payload == "sparse":
        own_rows = rows()
        count = min(config.selection.num_samples, len(own_rows))
        calibration = Calibration(
            objective=objective,
            samples=[own_rows.batch([row]) for row in range(count)],
            precision=config.local.precision,
        )
        return SparseValues(config, loaded, run=run, calibration=calibration)
    return _adapters(config, loaded)


def _only_the_head(loaded: TaskModel) -> None:
    head = set(loaded.new_tensors)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(name in head)
    if not head:
        raise ConfigError("method: head_only needs a new head, and the model has its own")


def _adapters(config: FederateConfig, loaded: TaskModel) -> WholeTensors:
    lora = config.lora
    torch.manual_seed(config.seed)
    adaptation = PeftAdaptation(
        loaded,
        LoraMethod(
            kind="lora",
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
        ),
        seed=config.seed,
    )
    if config.method == "frozen_depth":
        _freeze_lower(config, loaded)
    if config.method == "fedlora_checkpointing":
        if isinstance(loaded.model, SamaraPreTrainedModel):
            set_activation_checkpointing(loaded.model, "layer")
        else:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    return WholeTensors(loaded, config.local.optimizer, adaptation=adaptation)


def _freeze_lower(config: FederateConfig, loaded: TaskModel) -> None:
    layers = find_layers(loaded.model).layers
    trained = config.trained_layers or -(-len(layers) // 2)
    if trained > len(layers):
        raise ConfigError(
            f"trained_layers: {trained} wanted, the model has {len(layers)} layers; lower it"
        )
    for layer in layers[: len(layers) - trained]:
        layer.requires_grad_(False)
