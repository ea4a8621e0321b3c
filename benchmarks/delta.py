"""Delta files: bytes per changed weight, and the time to load, apply, revert and swap them.

    python benchmarks/delta.py                       # sizes, then times on a model of 1.2 B weights
    python benchmarks/delta.py --layers 2            # the same with an eighth of the layers
    python benchmarks/delta.py --json delta.json     # with commit and machine
    python benchmarks/delta.py --run runs/finetune   # the file of a real training, and no others
    python benchmarks/delta.py --checkpoints llama-1b llama-1b-tuned

Sizes: a 4096 x 4096 bfloat16 matrix of N(0, 0.02), a uniform random support, updates of N(0, sigma)
added in float32 and rounded; entries whose bits did not change are not in the file and not counted.
The whole file counts, header and hashes included. Times: the linear layers and the embedding of
Llama-3.2-1B, 0.5 % of the linear weights, on this machine's CPU, median of the repetitions.
``identity`` hashes all weights and happens once per model; ``load`` reads and checks a file.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from delta_real import measure_real, part_sizes
from torch import Tensor, nn

from samara.runs import environment, write_json
from samara.sparse.delta import Delta, SelectedEntries, delta_from_entries
from samara.sparse.delta_apply import delta_stack
from samara.sparse.delta_records import Mode
from samara.sparse.tensor_bits import TensorDigest, digests, model_tensors

SIDE = 4096
WEIGHT_SIGMA = 0.02
DENSITIES = (0.0005, 0.001, 0.005, 0.01, 0.02, 0.05)
SIGMAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
MODES: tuple[Mode, ...] = ("ulp", "xor", "overwrite")
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
EMBEDDING = (128256, 2048)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One file's size."""

    mode: str
    density: float
    sigma: float
    nnz: int
    changed_share: float
    file_bytes: int
    bytes_per_nonzero: float
    index_bytes_per_nonzero: float
    value_bytes_per_nonzero: float


def random_support(shape: tuple[int, ...], density: float, draw: torch.Generator) -> Tensor:
    """Distinct ascending positions, uniform over a tensor."""
    size = torch.Size(shape).numel()
    wanted = round(density * size)
    found = torch.randint(0, size, (int(wanted * 1.1) + 64,), generator=draw).unique()
    return found[torch.randperm(len(found), generator=draw)[:wanted]].sort().values


def updated(original: Tensor, sigma: float, draw: torch.Generator) -> Tensor:
    """Weights after an update of N(0, sigma), rounded once."""
    step = torch.randn(original.shape, generator=draw) * sigma
    return (original.float() + step).to(original.dtype)


def measure_size(mode: Mode, density: float, sigma: float, *, side: int) -> Size:
    """Write one delta file and weigh it."""
    draw = torch.Generator().manual_seed(0)
    indices = random_support((side, side), density, draw)
    original = (torch.randn(len(indices), generator=draw) * WEIGHT_SIGMA).bfloat16()
    new = updated(original, sigma, draw)
    # Only the touched entries bear on the size, so the rest of the matrix is not made.
    base = {"weight": TensorDigest(dtype="BF16", shape=(side, side), sha256="0" * 64)}
    entries = SelectedEntries(indices=indices, original=original, new=new)
    delta = delta_from_entries(
        {"weight": entries}, base=base, tuned=base, mode=mode, keep_original=False
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.sdelta"
        delta.save(path)
        size, parts = path.stat().st_size, part_sizes(path)
    return Size(
        mode=mode,
        density=density,
        sigma=sigma,
        nnz=delta.nnz,
        changed_share=delta.nnz / len(indices),
        file_bytes=size,
        bytes_per_nonzero=size / delta.nnz,
        index_bytes_per_nonzero=parts["weight.idx"] / delta.nnz,
        value_bytes_per_nonzero=parts["weight.val"] / delta.nnz,
    )


class Weights(nn.Module):
    """The tensors of a Llama-3.2-1B with so many layers, bfloat16, without the code around them."""

    def __init__(self, layers: int, embedding: tuple[int, int]) -> None:
        super().__init__()
        shapes = {"embed_tokens": embedding}
        for layer in range(layers):
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
        torch.manual_seed(0)
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(std=WEIGHT_SIGMA)
            self.register_parameter(name.replace(".", "_"), nn.Parameter(weight, False))


def synthetic_delta(
    model: Weights, identity: dict[str, TensorDigest], *, density: float, seed: int
) -> Delta:
    """A delta on every linear layer, with updates of 1e-3."""
    draw = torch.Generator().manual_seed(seed)
    selected = {}
    for name, weight in model.named_parameters():
        if "proj" in name:
            indices = random_support(tuple(weight.shape), density, draw)
            original = weight.view(-1)[indices]
            new = updated(original, 1e-3, draw)
            selected[name] = SelectedEntries(indices=indices, original=original, new=new)
    return delta_from_entries(selected, base=identity)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """How long a call took; on a machine that others use as well, ``cpu`` is the steadier one."""

    wall: float
    cpu: float


def seconds(work: Callable[[], Any]) -> Seconds:
    """Time a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def median(times: list[Seconds]) -> Seconds:
    """The medians of wall and processor time."""
    return Seconds(
        wall=statistics.median(t.wall for t in times), cpu=statistics.median(t.cpu for t in times)
    )


def measure_times(layers: int, repetitions: int, embedding: tuple[int, int]) -> dict[str, Any]:
    """Time the life of two deltas on a model in memory."""
    model = Weights(layers, embedding)
    tensors = model_tensors(model).tensors
    found: dict[str, list[Seconds]] = {"load": [], "apply": [], "swap": [], "revert": []}
    identity: dict[str, TensorDigest] = {}
    found["identity"] = [seconds(lambda: identity.update(digests(tensors)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.sdelta"
        synthetic_delta(model, identity, density=0.005, seed=1).save(path)
        size, other = path.stat().st_size, synthetic_delta(model, identity, density=0.005, seed=2)
        stack, first = delta_stack(model, base_root=other.record.base.tensors_root), other
        for _ in range(repetitions):
            found["load"].append(seconds(lambda: Delta.load(path)))
            first = Delta.load(path)
            found["apply"].append(seconds(lambda delta=first: stack.apply(delta)))
            found["swap"].append(seconds(lambda: stack.swap(other)))
            found["revert"].append(seconds(stack.revert))
    after = digests(tensors)
    assert after == identity, "the model came back changed"
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "nnz": first.nnz,
        "file_bytes": size,
        "bytes_per_nonzero": size / first.nnz,
        "threads": torch.get_num_threads(),
        "seconds": {name: asdict(median(times)) for name, times in found.items()},
        "all_seconds": {name: [asdict(t) for t in times] for name, times in found.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of the timed model (16)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="a finished fine-tuning; repeatable"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs=2,
        action="append",
        default=[],
        metavar=("BASE", "TUNED"),
        help="two model folders; repeatable",
    )
    parser.add_argument("--note", help="what these trainings are, for the page")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    spoken = [word for word in given if word not in ("--note", options.note)]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/delta.py", *spoken]),
        "environment": environment(),
    }
    if options.run or options.checkpoints:
        result["real"] = measure_real(options.run, options.checkpoints)
        result["note"] = options.note
    else:
        result |= measure_synthetic(options)
    if options.json:
        write_json(options.json, result)


def measure_synthetic(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes of made updates, and times on a model in memory."""
    side = 512 if options.smoke else SIDE
    sizes = [
        measure_size(mode, density, sigma, side=side)
        for mode in MODES
        for density in (DENSITIES[-1:] if options.smoke else DENSITIES)
        for sigma in (SIGMAS[-1:] if options.smoke else SIGMAS)
    ]
    print(f"{'mode':10}{'density':>9}{'sigma':>9}{'B/nonzero':>11}{'index':>8}{'value':>8}")
    for row in sizes:
        print(
            f"{row.mode:10}{row.density:9.2%}{row.sigma:9.0e}{row.bytes_per_nonzero:11.3f}"
            f"{row.index_bytes_per_nonzero:8.3f}{row.value_bytes_per_nonzero:8.3f}"
        )
    times = measure_times(
        1 if options.smoke else options.layers,
        2 if options.smoke else options.repetitions,
        (64, 8) if options.smoke else EMBEDDING,
    )
    print(f"{times['parameters']:,} weights, {times['nnz']:,} changed by {times['file_bytes']:,} B")
    for name, value in times["seconds"].items():
        print(f"{name:10}{value['wall']:9.4f} s, {value['cpu']:.4f} s of the processor")
    return {"sizes": [asdict(row) for row in sizes], "times": times}


if __name__ == "__main__":
    main()
