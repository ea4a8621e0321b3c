"""Deltas of real trainings, weighed: bytes per changed weight, share of the base, SHiRA beside.

What ``benchmarks/delta.py --run`` and ``--checkpoints`` measure. A sparse fine-tuning gives the
file that it wrote. A SHiRA adapter is weighed as peft wrote it, and as a delta of the same change,
so that both formats hold one thing. Two checkpoints give the delta between them. What a task needs
beside the delta, as a new head, is the same for every method and left out.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samara.runs import model_folder, read_json
from samara.sparse.delta import Delta
from samara.sparse.delta_data import new_bits
from samara.sparse.delta_exchange import ADAPTER_WEIGHTS, delta_between, import_shira
from samara.sparse.tensor_bits import to_float32
from samara.sparse.tensor_files import CheckpointFiles


@dataclass(frozen=True, kw_only=True)
class RealSize:
    """One change of one model, as files.

    Attributes:
        name: The run's folder, or the two checkpoints'.
        method: How it was trained.
        dtype: Of the base's touched weights.
        base_bytes: Of the base's weights.
        trained: Numbers trained; None: not known, as between two checkpoints.
        nnz: Weights whose bits changed.
        sigma: Root mean square of their change.
        file_bytes: Of the delta file, everything included.
        record_bytes: Of these the header with its record: recipe, hashes, scores.
        index_bytes, value_bytes: Of these, what says where and what.
        adapter_bytes: The same change as peft wrote it; None: it is none of peft's.
    """

    name: str
    method: str
    dtype: str
    base_bytes: int
    trained: int | None
    nnz: int
    sigma: float
    file_bytes: int
    record_bytes: int
    index_bytes: int
    value_bytes: int
    adapter_bytes: int | None

    @property
    def bytes_per_nonzero(self) -> float:
        """Of the whole file."""
        return self.file_bytes / self.nnz


def measure_run(run: Path) -> RealSize:
    """Weigh what a finished fine-tuning wrote.

    Raises:
        SystemExit: If it is none, or made no change that a delta can hold.
    """
    path = run / "results.json"
    if not path.exists():
        raise SystemExit(f"--run {run}: holds no results.json; give a finished fine-tuning")
    results = read_json(path)
    base, method = Path(results["init_from"]), results["method"]
    adapter = None
    if method == "sparse":
        delta = Delta.load(run / "delta.safetensors")
    elif method == "shira":
        delta = import_shira(run / "adapter", base)
        adapter = (run / "adapter" / ADAPTER_WEIGHTS).stat().st_size
    elif method == "full":
        delta = delta_between(base, run / "model")
    else:
        raise SystemExit(f"--run {run}: {method} changes every weight of its layers; no delta")
    trained = results["trained_parameters"]
    return _weigh(run.name, method, delta, base, trained=trained, adapter_bytes=adapter)


def measure_checkpoints(base: Path, tuned: Path) -> RealSize:
    """Weigh the delta between two model folders."""
    folders = [model_folder(path) for path in (base, tuned)]
    name = f"{base.name} to {tuned.name}"
    return _weigh(name, "checkpoints", delta_between(*folders), folders[0])


def _weigh(
    name: str,
    method: str,
    delta: Delta,
    base: Path,
    *,
    trained: int | None = None,
    adapter_bytes: int | None = None,
) -> RealSize:
    files = CheckpointFiles(base)
    squares = 0.0
    for tensor in delta.tensors:
        before = files.read(tensor.name, tensor.indices)
        after = to_float32(new_bits(before, tensor, delta.mode), tensor.dtype)
        squares += float((after - to_float32(before, tensor.dtype)).double().square().sum())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.sdelta"
        delta.save(path)
        size, parts = path.stat().st_size, part_sizes(path)
    index, value = (
        sum(count for part, count in parts.items() if part.endswith(end))
        for end in (".idx", ".val")
    )
    return RealSize(
        name=name,
        method=method,
        dtype="/".join(sorted({tensor.dtype for tensor in delta.tensors})),
        base_bytes=sum(file.stat().st_size for file in base.glob("*.safetensors")),
        trained=trained,
        nnz=delta.nnz,
        sigma=math.sqrt(squares / delta.nnz),
        file_bytes=size,
        record_bytes=size - index - value,
        index_bytes=index,
        value_bytes=value,
        adapter_bytes=adapter_bytes,
    )


def part_sizes(path: Path) -> dict[str, int]:
    """Bytes of each part of a delta file."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118


def measure_real(runs: Sequence[Path], pairs: Sequence[Sequence[Path]]) -> list[dict[str, Any]]:
    """Weigh runs and pairs of checkpoints, print a line each, and give them as plain data."""
    found = [measure_run(run) for run in runs]
    found += [measure_checkpoints(base, tuned) for base, tuned in pairs]
    print(f"{'change':24}{'trained':>10}{'changed':>10}{'B':>10}{'B/nonzero':>11}{'of base':>9}")
    for row in found:
        trained = "-" if row.trained is None else f"{row.trained:,}"
        print(
            f"{row.name[:23]:24}{trained:>10}{row.nnz:>10,}{row.file_bytes:>10,}"
            f"{row.bytes_per_nonzero:>11.3f}{row.file_bytes / row.base_bytes:>9.2%}"
        )
        if row.adapter_bytes is not None:
            print(f"{'  as peft wrote it':44}{row.adapter_bytes:>10,}")
    return [{**asdict(row), "bytes_per_nonzero": row.bytes_per_nonzero} for row in found]
