"""How a model is adapted: what is trained, by which update, and what is kept at the end.

Every method gives the loop a plain Hugging Face model and an updater. ``sparse`` and ``full`` are
here, the adapters of ``peft`` in :mod:`samara.adapt.peft_methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.adapt.config import FullMethod, SparseMethod
from samara.adapt.models import TaskModel
from samara.errors import CheckpointError
from samara.model.disk_errors import disk_errors
from samara.registry.records import Evaluation
from samara.runs import (
    RunFolder,
    environment,
    hash_file,
    new_folder,
    read_json,
    write_bytes,
    write_json,
)
from samara.sparse.attach import Attachment
from samara.sparse.auto import TrialRun, choose_score
from samara.sparse.calibration import Calibration
from samara.sparse.delta import SelectedEntries, delta_from_entries
from samara.sparse.delta_records import Cost, Provenance, Selector, Train
from samara.sparse.expansion import Expansion
from samara.sparse.memory import sparse_memory
from samara.sparse.selection import select
from samara.sparse.support import Support, TensorSupport
from samara.sparse.tensor_bits import CODES
from samara.sparse.tensor_files import CheckpointFiles
from samara.sparse.units import BLOCK_SIDES
from samara.sparse.update import Selected, SparseAdamW
from samara.train.optim import Optimizer, Updater

SUPPORT, SELECTION, DELTA, HEAD = (
    "support.safetensors",
    "selection.json",
    "delta.safetensors",
    "head.safetensors",
)


class TrainedWeights(nn.Module):
    """The weights that a checkpoint has to hold, by name; the rest is the base model's."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = dict(named)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """The live weights."""
        return self._named


class Adaptation(Protocol):
    """A model being adapted.

    Attributes:
        model: What the loop trains.
        preparation_seconds: Time spent before training: choosing what to train.
    """

    model: PreTrainedModel
    preparation_seconds: float

    @property
    def updater(self) -> Updater:
        """Updates what is trained."""
        ...

    @property
    def weights(self) -> TrainedWeights:
        """What a checkpoint holds beside the updater's state."""
        ...

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters of the model that change in training, whole or in part."""
        ...

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        ...

    @property
    def optimizer_bytes(self) -> int:
        """Bytes that the update keeps, gradients left out."""
        ...

    def details(self) -> dict[str, Any]:
        """What else the results say about it, as plain data."""
        ...

    def watch(self, losses: Sequence[float]) -> None:
        """Go on after the validation losses so far."""
        ...

    def observe(self, loss: float) -> None:
        """Take note of a validation loss in the middle of training."""
        ...

    def export(self, run: RunFolder, records: Provenance) -> list[str]:
        """Write the result into the run folder; returns the names of its files and folders."""
        ...


class FullAdaptation:
    """All weights are trained; the result is a model folder."""

    def __init__(self, loaded: TaskModel, method: FullMethod) -> None:
        self.model, self._loaded = loaded.model, loaded
        self.model.requires_grad_(True)
        self._optimizer = Optimizer(self.model, method.optimizer)
        self.preparation_seconds = 0.0

    @property
    def updater(self) -> Updater:
        """See :class:`Adaptation`."""
        return self._optimizer

    @property
    def weights(self) -> TrainedWeights:
        """See :class:`Adaptation`."""
        return TrainedWeights(dict(self.model.named_parameters()))

    @property
    def trained(self) -> list[nn.Parameter]:
        """See :class:`Adaptation`."""
        return self._optimizer.parameters

    @property
    def num_trained(self) -> int:
        """See :class:`Adaptation`."""
        return sum(p.numel() for p in self._optimizer.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """See :class:`Adaptation`."""
        return tensor_bytes(self._optimizer.state_dict().values())

    def details(self) -> dict[str, Any]:
        """See :class:`Adaptation`."""
        return {}

    def watch(self, losses: Sequence[float]) -> None:
        """See :class:`Adaptation`: nothing depends on them."""

    def observe(self, loss: float) -> None:
        """See :class:`Adaptation`: nothing depends on it."""

    def export(self, run: RunFolder, records: Provenance) -> list[str]:
        """Write ``model``, a Hugging Face folder."""
        del records
        with new_folder(run.path / "model") as staging, disk_errors():
            self.model.save_pretrained(staging)
            self._loaded.tokenizer.save_pretrained(str(staging))
        return ["model"]


class SparseAdaptation:
    """Few weights are trained in place; the result is a delta file, and the head if it is new."""

    def __init__(
        self,
        loaded: TaskModel,
        method: SparseMethod,
        *,
        run: RunFolder,
        calibration: Calibration,
        trial: TrialRun | None = None,
        seed: int,
    ) -> None:
        """Choose the weights, or read what an interrupted run chose, and attach.

        Args:
            loaded: The model, on its device.
            method: The settings.
            run: Where the choice is kept.
            calibration: Samples that the scores see.
            trial: How ``auto`` tries masks; without it, it is not to be asked for.
            seed: Of what is drawn.
        """
        self.model, self._loaded, self._method = loaded.model, loaded, method
        self._seed, self._calibration = seed, calibration
        self._wanted = method.selection.model_copy(
            update={"train_fully": (*method.selection.train_fully, *loaded.new_tensors)}
        )
        if not (run.path / SUPPORT).exists():
            self._choose(run, trial)
        self._record: dict[str, Any] = dict(read_json(run.path / SELECTION))
        self.preparation_seconds = float(self._record["seconds"])
        if self._record["auto"] is not None:
            chosen = {"score": self._record["selection"]["score"], "exponents": None}
            self._wanted = self._wanted.model_copy(update=chosen)
        support = Support.load(run.path / SUPPORT)
        self._files = CheckpointFiles(loaded.folder)
        self._check_stored(support)
        self._attachment = Attachment(self.model, support, gradient_path=method.gradient_path)
        self._updater = SparseAdamW(self._attachment.selected, method.optimizer, grow=self._grow_to)
        self._expansion: Expansion | None = None

    def _check_stored(self, support: Support) -> None:
        """Refuse, before training, what no delta file could be made of."""
        for name in support:
            if name in self._loaded.new_tensors:
                continue
            stored = stored_name(name, self._files.places, self.model.base_model_prefix)
            loaded = CODES[self.model.get_parameter(name).dtype]
            if stored not in self._files.places or self._files.dtype(stored) != loaded:
                found = self._files.places.get(stored)
                raise CheckpointError(
                    f"init_from: {self._loaded.folder} stores {name} as "
                    f"{found.dtype if found else 'another tensor'}, transformers loads {loaded}; "
                    "save the model again as transformers holds it, then go on from that"
                )

    def _choose(self, run: RunFolder, trial: TrialRun | None) -> None:
        wanted, table = self._wanted, None
        if self._method.auto is not None:
            assert trial is not None
            choice = choose_score(
                self.model,
                self._method.auto,
                trial,
                selection=wanted,
                optimizer=self._method.optimizer,
                calibration=self._calibration,
                seed=self._seed,
            )
            table = choice.table
            wanted = wanted.model_copy(update={"score": choice.score, "exponents": None})
        found = select(self.model, wanted, self._calibration, seed=self._seed)
        seconds = found.record["seconds"] + sum(line["seconds"] for line in table or ())
        write_json(
            run.path / SELECTION,
            {"schema": 1, "selection": found.record, "auto": table, "seconds": seconds},
        )
        found.support.save(run.path / SUPPORT)  # last: where it is, the choice is complete

    @property
    def selected(self) -> Mapping[str, Selected]:
        """The trained entries by tensor name."""
        return self._attachment.selected

    @property
    def updater(self) -> Updater:
        """See :class:`Adaptation`."""
        return self._updater

    @property
    def weights(self) -> TrainedWeights:
        """See :class:`Adaptation`: the updater's state holds all that changed."""
        return TrainedWeights({})

    @property
    def trained(self) -> list[nn.Parameter]:
        """See :class:`Adaptation`: those with a selected entry."""
        return [entry.weight for entry in self._attachment.selected.values()]

    @property
    def num_trained(self) -> int:
        """See :class:`Adaptation`."""
        return self._attachment.support.num_entries

    @property
    def optimizer_bytes(self) -> int:
        """See :class:`Adaptation`."""
        gradients = tensor_bytes(entry.values for entry in self._attachment.selected.values())
        return self._attachment.state_bytes - gradients

    def details(self) -> dict[str, Any]:
        """See :class:`Adaptation`: the score, the density reached, and the memory formula."""
        weights = [entry.weight for entry in self._attachment.selected.values()]
        beside = self._record["selection"]["trained_fully"]
        chosen = sum(
            entry.support.index.numel()
            for name, entry in self._attachment.selected.items()
            if name not in beside
        )
        formula = sparse_memory(
            num_weights=sum(p.numel() for p in self.model.parameters()),
            num_entries=self.num_trained,
            weight_bytes=weights[0].element_size(),
            largest_matrix=max(weight.numel() for weight in weights),
            device="cuda" if weights[0].is_cuda else "cpu",
        )
        return {
            "score": self._wanted.score,
            "density": chosen / self._record["selection"]["target_weights"],
            "support_id": self._attachment.support.support_id,
            "formula_bytes": {
                "weights": formula.weights,
                "state": formula.state,
                "workspace": formula.workspace,
                "libraries": formula.libraries,
            },
        }

    def watch(self, losses: Sequence[float]) -> None:
        """See :class:`Adaptation`."""
        if self._method.expansion is not None:
            self._expansion = Expansion(
                self.model,
                self._attachment,
                self._method.expansion,
                selection=self._wanted,
                calibration=self._calibration,
                seed=self._seed,
                losses=losses,
            )

    def observe(self, loss: float) -> None:
        """See :class:`Adaptation`: more weights are selected if that was a stall."""
        if self._expansion is not None:
            self._expansion.observe(loss)

    def _grow_to(self, indices: dict[str, Tensor]) -> None:
        """Select what a saved state of a later stage selects."""
        own = self._attachment.support
        if all(
            name in own.tensors and torch.equal(own.tensors[name].index, index)
            for name, index in indices.items()
        ):
            return
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        side = BLOCK_SIDES.get(self._wanted.granularity, 1)
        self._attachment.grow(
            Support(
                tensors={
                    name: TensorSupport(
                        shape=shapes[name],
                        index=index,
                        block=own.tensors[name].block if name in own.tensors else side,
                    )
                    for name, index in indices.items()
                }
            )
        )

    def export(self, run: RunFolder, records: Provenance) -> list[str]:
        """Write ``delta.safetensors``, and ``head.safetensors`` where the base has no such head."""
        selected, head = {}, {}
        for name, entry in self._attachment.selected.items():
            if name in self._loaded.new_tensors:
                head[name] = entry.weight.detach().cpu().contiguous()
                continue
            stored = stored_name(name, self._files.places, self.model.base_model_prefix)
            selected[stored] = SelectedEntries(
                indices=entry.support.index, original=entry.base.cpu(), new=entry.current().cpu()
            )
        full = records.model_copy(update={"selector": self._selector()})
        digests = self._files.digests()
        delta_from_entries(selected, base=digests, records=full).save(run.path / DELTA)
        written = [DELTA]
        if head:
            write_bytes(run.path / HEAD, save(head, metadata={"format": "pt"}))
            written.append(HEAD)
        return written

    def _selector(self) -> Selector:
        wanted, record = self._wanted, self._record["selection"]
        return Selector(
            score=wanted.score,
            exponents=wanted.exponents,
            normalize=wanted.normalize,
            rho=wanted.rho,
            granularity=wanted.granularity,
            density=wanted.share(),
            k_total=self.num_trained,
            n_samples=record["samples"],
            seed=self._seed,
            auto_table=self._record["auto"],
        )


def stored_name(name: str, stored: Mapping[str, Any], prefix: str) -> str:
    """The name under which a checkpoint holds a parameter: a bare trunk has no prefix."""
    without = name.removeprefix(f"{prefix}.")
    for candidate in (name, without, f"{prefix}.{name}"):
        if candidate in stored:
            return candidate
    return name


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def provenance(
    folder: Path,
    *,
    data_hash: str,
    recipe: dict[str, Any],
    seed: int,
    task: str,
    scores: Mapping[str, Mapping[str, Any]],
    base_scores: Mapping[str, Mapping[str, Any]] | None,
    num_items: int,
    cost: Cost,
) -> Provenance:
    """What a delta file says about where it came from."""
    made_by = environment()
    return Provenance(
        model_id=folder.name,
        config_sha256=hash_file(folder / "config.json"),
        train=Train(
            data_sha256=data_hash,
            recipe=recipe,
            seed=seed,
            code_commit=made_by["commit"],
            environment=made_by,
            cost=cost,
        ),
        eval=[
            Evaluation(
                task=task,
                metric=name,
                value=score["value"],
                ci=(score["low"], score["high"]),
                n=num_items,
                base_value=base_scores[name]["value"] if base_scores else None,
            )
            for name, score in scores.items()
        ],
    )
