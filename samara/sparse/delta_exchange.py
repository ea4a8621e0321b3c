"""Deltas from elsewhere and to elsewhere: peft's SHiRA, two checkpoints, a merged checkpoint.

All work on folders, one tensor at a time; no pickle is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from samara.errors import CheckpointError, ConfigError, ShapeMismatch
from samara.model.interchange.convert import refuse_occupied
from samara.model.interchange.provenance import FILE as PROVENANCE
from samara.model.interchange.provenance import Origin, find_making, write_provenance
from samara.runs import hash_file, new_folder, read_json
from samara.sparse.delta import Delta, SelectedEntries, delta_from_entries
from samara.sparse.delta_apply import check_base, check_order, write_all
from samara.sparse.delta_checkpoint import ASIDE, STATE_FOLDER, checkpoint_state, plan_writes
from samara.sparse.delta_codec import Bits, Indices
from samara.sparse.delta_data import WORDS, DeltaData, check_publishable, check_usable
from samara.sparse.delta_records import Mode, Provenance
from samara.sparse.tensor_bits import DTYPES, TensorDigest, num_entries, to_float32
from samara.sparse.tensor_files import CheckpointFiles

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
SHIRA_WEIGHT, SHIRA_INDICES = ".shira_weight", ".shira_indices"


# --- in -----------------------------------------------------------------------------------------


def import_shira(
    adapter: Path, base: Path, *, records: Provenance | None = None, mode: Mode = "ulp"
) -> Delta:
    """The delta of a SHiRA adapter (arXiv 2406.13175) as peft saves it.

    The adapter's float32 values are added to the base's weights in float32 and rounded once to the
    base's type.

    Args:
        adapter: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: The model folder that it was trained on.
        records: Origin, evaluation, audit, licence.
        mode: How values are stored.

    Raises:
        CheckpointError: If the adapter is of another kind, or not whole.
        ShapeMismatch: If it does not fit the base.
    """
    adapter = Path(adapter)
    config = read_json(adapter / ADAPTER_CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "SHIRA":
        raise CheckpointError(
            f"{adapter}: is a {kind} adapter; only SHIRA changes single weights and can be imported"
        )
    files = _bare(base)
    selected = {}
    for module, values, positions in _shira_tensors(adapter / ADAPTER_WEIGHTS):
        name = f"{module}.weight"
        selected[name] = _added(files, name, values, positions)
    return delta_from_entries(
        selected, base=files.digests(), records=_with_base(records, files), mode=mode
    )


def _shira_tensors(path: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module, values (k,) and row and column numbers (2, k) of each adapted matrix."""
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            for name in names:
                if not name.endswith((SHIRA_WEIGHT, SHIRA_INDICES)):
                    raise CheckpointError(f"{path}: holds {name}, which is no part of SHiRA")
                if name.endswith(SHIRA_INDICES):
                    continue
                module = name.removesuffix(SHIRA_WEIGHT)
                if module + SHIRA_INDICES not in names:
                    raise CheckpointError(f"{path}: {name} has no indices; save the adapter again")
                positions = file.get_tensor(module + SHIRA_INDICES)
                yield module.removeprefix(ADAPTER_PREFIX), file.get_tensor(name), positions
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error})") from None


def _added(files: CheckpointFiles, name: str, values: Tensor, positions: Tensor) -> SelectedEntries:
    shape, dtype = files.shape(name), files.dtype(name)
    # On Windows peft saves the positions as float32.
    row, col = positions.to(torch.int64)
    fits = len(shape) == 2 and (row < shape[0]).all() and (col < shape[1]).all()
    if not fits or dtype not in WORDS or len(values) != len(row):
        raise ShapeMismatch(
            f"{name}: is {dtype} {list(shape)} in the base, the adapter has positions up to "
            f"{[int(row.max()), int(col.max())]}; it was trained on another model"
        )
    flat, order = (row * shape[1] + col).sort()
    original = to_float32(files.read(name, flat.numpy()), dtype)
    new = original + values[order].to(torch.float32)
    kind = DTYPES[dtype]
    return SelectedEntries(indices=flat, original=original.to(kind), new=new.to(kind))


def delta_between(
    base: Path,
    tuned: Path,
    *,
    density: float | None = None,
    records: Provenance | None = None,
    mode: Mode = "ulp",
) -> Delta:
    """The delta between two checkpoint folders.

    Args:
        base: The model folder to start from.
        tuned: A model folder of the same design.
        density: None: every entry that differs, exactly. Else keep only this share of each
            tensor's entries, those that moved furthest: the delta is then not the whole difference.
        records: Origin, evaluation, audit, licence.
        mode: How values are stored.

    Raises:
        ShapeMismatch: If the two do not hold the same tensors.
        ConfigError: If ``density`` is not above 0 and at most 1.
    """
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density: {density} is not above 0 and at most 1")
    files, other = _bare(base), CheckpointFiles(tuned)
    digests, tuned_digests = files.digests(), other.digests()
    _check_same_tensors(files, other, digests, tuned_digests)
    selected = {}
    for name in sorted(digests):
        if digests[name] != tuned_digests[name]:
            selected[name] = _difference(files, other, name, density)
    return delta_from_entries(
        selected,
        base=digests,
        records=_with_base(records, files),
        mode=mode,
        tuned=tuned_digests if density is None else None,
    )


def _check_same_tensors(
    files: CheckpointFiles,
    other: CheckpointFiles,
    digests: dict[str, TensorDigest],
    tuned: dict[str, TensorDigest],
) -> None:
    for name in sorted(digests.keys() ^ tuned.keys()):
        where = files.folder if name in digests else other.folder
        raise ShapeMismatch(f"{name}: only {where} has it; the two are different models")
    for name, digest in digests.items():
        found = tuned[name]
        if (digest.dtype, digest.shape) != (found.dtype, found.shape):
            raise ShapeMismatch(
                f"{name}: is {found.dtype} {list(found.shape)} in {other.folder}, "
                f"{digest.dtype} {list(digest.shape)} in {files.folder}; give both in one type"
            )
        if digest.dtype not in WORDS and digest != found:
            raise ShapeMismatch(
                f"{name}: is {digest.dtype} and differs; a delta holds {', '.join(WORDS)}"
            )


def _difference(
    files: CheckpointFiles, other: CheckpointFiles, name: str, density: float | None
) -> SelectedEntries:
    dtype, size = files.dtype(name), num_entries(files.shape(name))
    entire = np.arange(size)
    before, after = files.read(name, entire), other.read(name, entire)
    indices: Indices = np.flatnonzero(before != after)
    if density is not None:
        moved = (to_float32(after, dtype) - to_float32(before, dtype)).abs().numpy()[indices]
        # Stable, so that of equal moves the lowest positions stay.
        furthest = np.argsort(-moved, kind="stable")[: max(1, round(density * size))]
        indices = np.sort(indices[furthest])
    return SelectedEntries(
        indices=torch.from_numpy(indices),
        original=_typed(before[indices], dtype),
        new=_typed(after[indices], dtype),
    )


def _typed(bits: Bits, dtype: str) -> Tensor:
    signed = torch.from_numpy(bits.view(np.dtype(f"<i{bits.dtype.itemsize}")))
    return signed.view(DTYPES[dtype])


def _bare(folder: Path) -> CheckpointFiles:
    """A folder that carries no delta: its hashes are those of a base."""
    state = checkpoint_state(folder)
    if state.stack or state.pending:
        raise CheckpointError(
            f"{folder}: carries deltas; take them off first (`samara delta revert {folder}`)"
        )
    return CheckpointFiles(folder)


def _with_base(records: Provenance | None, files: CheckpointFiles) -> Provenance:
    """Add what the base's folder says about itself."""
    records = records or Provenance()
    config = files.folder / "config.json"
    known: dict[str, Any] = {
        "model_id": records.model_id or "/".join(files.folder.resolve().parts[-2:]),
        "config_sha256": records.config_sha256 or (hash_file(config) if config.exists() else None),
    }
    return records.model_copy(update=known)


# --- out ----------------------------------------------------------------------------------------


def export_checkpoint(deltas: Sequence[DeltaData], base: Path, out: Path) -> list[str]:
    """Write a plain checkpoint folder with deltas merged in: for tools that know no deltas.

    Args:
        deltas: In the order they belong on each other.
        base: The model folder they were made for; it is not changed.
        out: The folder to make; must not hold anything.

    Returns:
        Warnings, one line each.

    Raises:
        LicenseDenied: If a licence record forbids giving the result away.
        DeltaError: If a delta does not fit.
        ResourceError: If the disk is full.
    """
    warnings = [warning for delta in deltas if (warning := check_publishable(delta))]
    for delta in deltas:
        check_usable(delta)
    refuse_occupied(Path(out))
    files = _bare(base)
    making = find_making(files.folder).then("delta export", [Origin.of(files.folder, format="hf")])
    with new_folder(Path(out)) as staging:
        left_out = shutil.ignore_patterns(STATE_FOLDER, PROVENANCE, ASIDE, ".*")
        shutil.copytree(files.folder, staging, ignore=left_out, dirs_exist_ok=True)
        copy = CheckpointFiles(staging)
        applied: list[str] = []
        root = files.root()
        for delta in deltas:
            check_order(delta, on=applied)
            if delta.mode != "additive":
                check_base(delta, root)
            copy.check_not_tied([tensor.name for tensor in delta.tensors])
            write_all(plan_writes(copy, delta))
            applied.append(delta.id)
        write_provenance(staging, making)
    return warnings
