"""Load what ``finetune`` made: the base model with its delta, adapter, or the model itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from samara.adapt.methods import DELTA, HEAD
from samara.adapt.models import TaskModel, load_task_model
from samara.adapt.peft_methods import ADAPTER
from samara.adapt.results import RESULTS
from samara.errors import CheckpointError
from samara.runs import read_json
from samara.sparse.delta import Delta
from samara.sparse.delta_apply import delta_stack
from samara.sparse.tensor_files import CheckpointFiles


def load_finetuned(run: Path, *, base: Path | None = None) -> TaskModel:
    """The adapted model of a finished run, ready to be used, on the CPU.

    Args:
        run: The run folder.
        base: The model it was made from, where that has moved.

    Raises:
        CheckpointError: If the run is not finished, or the base is gone.
        DeltaError: If the base is not the one that the delta was made for.
    """
    if not (run / RESULTS).exists():
        raise CheckpointError(f"{run}: holds no {RESULTS}, so no fine-tuning finished there")
    results = read_json(run / RESULTS)
    labels, method = results["labels"], results["method"]
    if method == "full":
        return load_task_model(run / "model", labels=labels, dtype=None, seed=0)
    loaded = load_task_model(base or results["init_from"], labels=labels, dtype=None, seed=0)
    if method == "sparse":
        _put_head(loaded, run)
        # The head is no part of the base, and may differ: the folder says what the base is.
        stack = delta_stack(loaded.model, base_root=CheckpointFiles(loaded.folder).root())
        stack.apply(Delta.load(run / DELTA))
        return loaded
    import peft

    peft.PeftModel.from_pretrained(loaded.model, str(run / ADAPTER))
    return loaded


def _put_head(loaded: TaskModel, run: Path) -> None:
    if not loaded.new_tensors:
        return
    head = load_file(run / HEAD)
    with torch.no_grad():
        for name in loaded.new_tensors:
            loaded.model.get_parameter(name).copy_(head[name])
