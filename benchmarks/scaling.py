r"""Training on several processes: tokens per second, and the bytes that a step sends.

    python benchmarks/scaling.py --json scaling-cpu.json    # toy size, 1 and 2 processes
    python benchmarks/scaling.py --device cuda --processes 1 2 4 --hidden-size 2048 --layers 24 \
        --vocab-size 32000 --batch 64 --micro-batch 8 --length 2048 --precision bfloat16

Every number of processes trains the same global batches from the same weights, through the real
loop. Bytes are counted where collectives are dispatched, in one step, and are those that a process
sends in a ring: (n - 1) / n of a gathered or scattered tensor, twice that of a summed one.
``predicted`` is the formula of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from record import Record, add_json_option
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from samara.data.rows import Batch
from samara.model.config import ColaConfig, LayerwiseScaling, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import TrainingState
from samara.train.config import AdamW
from samara.train.loop import Hooks, Update, train
from samara.train.objective import CausalLM
from samara.train.optim import Optimizer
from samara.train.parallel import Place, Workers, join_processes

FLOAT32 = 4
WARM_UP = 2
RING = {"allgather": 1, "reduce_scatter": 1, "allreduce": 2}
"""How often a ring sends (n - 1) / n of the whole tensor, by what an operator's name holds."""


class CountBytes(TorchDispatchMode):
    """Adds up what this process sends to the others while it is entered."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.share = (world_size - 1) / world_size
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            for kind, times in RING.items():
                if kind in name.replace("all_gather", "allgather"):
                    tensors = [t for t in torch.utils._pytree.tree_leaves(args) if _is_real(t)]
                    # Of an output and an input, one is the share of a process.
                    whole = max(t.numel() * t.element_size() for t in tensors)
                    self.bytes += times * self.share * whole
        return func(*args, **(kwargs or {}))


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def design_of(name: str, options: argparse.Namespace) -> ModelConfig:
    """A uniform dense model, or CoLA of a quarter of the rank on layer-wise widths."""
    low_rank = name == "cola"
    return ModelConfig(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        head_dim=min(64, options.hidden_size // 4),
        vocab_size=options.vocab_size,
        cola=ColaConfig(rank=options.hidden_size // 4) if low_rank else None,
        layerwise_scaling=LayerwiseScaling(alpha=(0.5, 1.0), beta=(0.5, 4.0)) if low_rank else None,
    )


def predicted_bytes(model: SamaraForCausalLM, place: Place, *, micro_batches: int) -> float:
    """What a process sends in a step, by the formula of docs/scaling.md.

    Args:
        model: Not wrapped yet.
        place: The processes.
        micro_batches: Of one process.
    """
    share = (place.world_size - 1) / place.world_size
    every = sum(p.numel() for p in model.parameters())
    layers = sum(p.numel() for p in model.model.layers.parameters())
    if place.parallel == "fsdp":  # layers: gathered in forward and in backward, gradients scattered
        return micro_batches * share * FLOAT32 * (3 * layers + 2 * (every - layers))
    return 2 * share * FLOAT32 * every


def measure(name: str, place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Train one design; the same row comes out in every process."""
    torch.manual_seed(0)
    model = SamaraForCausalLM(SamaraConfig.from_design(design_of(name, options)))
    if place.parallel != "fsdp":
        model.to(place.device)  # type: ignore[arg-type] # transformers wraps it untyped
    own = options.batch // place.world_size
    parameters = model.num_parameters()
    predicted = predicted_bytes(model, place, micro_batches=own // options.micro_batch)
    workers = Workers(model, place)
    shape = (WARM_UP + 1 + options.steps, place.world_size, own // options.micro_batch)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        options.vocab_size, (*shape, options.micro_batch, options.length), generator=generator
    )
    positions = torch.arange(options.length).expand(options.micro_batch, -1).contiguous()

    def batch(rows: torch.Tensor) -> Batch:
        return {"input_ids": rows, "targets": rows.roll(-1, 1), "position_ids": positions}

    optimizer, state, losses = Optimizer(model, AdamW(lr=1e-3)), TrainingState(), list[float]()
    seconds: list[float] = []
    counter = CountBytes(place.world_size)
    for step, rows in enumerate(ids[:, place.rank]):
        _synchronize(place)
        start = time.perf_counter()
        with counter if step == WARM_UP else torch.enable_grad():
            train(
                model,
                objective=CausalLM(),
                optimizer=optimizer,
                learning_rate=lambda _: 1e-3,
                batches=[[batch(micro) for micro in rows]],
                state=state,
                num_steps=step + 1,
                precision=options.precision,
                clip_grad_norm=1.0,
                workers=workers,
                hooks=Hooks(on_step=lambda _state, _lr, update: losses.append(_loss(update))),
            )
        _synchronize(place)
        if step > WARM_UP:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "design": name,
        "parallel": place.parallel,
        "processes": place.world_size,
        "parameters": parameters,
        "bytes_per_step": round(counter.bytes),
        "predicted_bytes": round(predicted),
        "step_seconds": median,
        "slowest_seconds": max(seconds),
        "tokens_per_second": options.batch * options.length / median,
        "loss": losses[-1],
        "peak_bytes": torch.cuda.max_memory_allocated() if place.device.type == "cuda" else None,
    }


def _loss(update: Update) -> float:
    return update.loss


def _synchronize(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    if distributed.is_initialized():
        distributed.barrier()


def work(options: argparse.Namespace) -> None:
    """One process of a case: the first one prints the row."""
    with join_processes(options.device, options.parallel) as place:
        for name in options.designs:
            row = measure(name, place, options)
            if place.is_first:
                print(json.dumps(row), flush=True)


def run_case(arguments: Sequence[str], *, parallel: str, processes: int) -> list[dict[str, Any]]:
    """All designs on so many processes of this machine, started as ``torchrun`` would."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, __file__, *arguments, "--parallel", parallel]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **{k: str(v) for k, v in {**shared, "RANK": r, "LOCAL_RANK": r}.items()},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{parallel} on {processes} processes failed")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    error = row["bytes_per_step"] / row["predicted_bytes"] - 1 if row["predicted_bytes"] else 0.0
    assert math.isfinite(row["loss"]), row
    return (
        f"{row['design']:6} {row['parallel']:5} {row['processes']:2} processes  "
        f"{row['bytes_per_step'] / 1e6:9.2f} MB a step ({error:+.1%} of the formula)  "
        f"{row['tokens_per_second']:10,.0f} tokens/s  loss {row['loss']:.5f}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; ``--parallel`` is for the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--designs", nargs="+", choices=("dense", "cola"), default=["dense", "cola"]
    )
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, over all processes")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help=argparse.SUPPRESS)
    add_json_option(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print a line per case; write them as JSON if asked to."""
    options = parse(arguments)
    if options.parallel is not None:
        work(options)
        return
    settings = {key: value for key, value in vars(options).items() if key != "parallel"}
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=options.device,
        settings=settings,
    )
    for processes in options.processes:
        for parallel in ("ddp", "fsdp"):
            for row in run_case(arguments, parallel=parallel, processes=processes):
                record.add(row)
                print(line(row), flush=True)
    record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
