"""Predicted against measured memory of training.

    python benchmarks/memory.py                  # three shapes and more on this machine's CPU
    python benchmarks/memory.py --device cuda    # the same on a GPU
    python benchmarks/memory.py --json memory-cpu.json    # whole after every case

Every case trains in a process of its own, through the real loop, three optimizer steps. On CUDA
the measured figure is the peak of allocated tensor bytes. On CPU it is the peak of resident memory
above that of the process when all is loaded and a tiny model has trained once, measured twice:

* ``measured``: glibc gives freed blocks back to the system (``MALLOC_MMAP_THRESHOLD_``), so that
  resident memory is what tensors take; this is what :mod:`samara.measure.memory` predicts;
* ``default heap``: glibc as it comes. Its heap keeps freed blocks that the fragments between them
  make useless for the next tensor, so a process takes more, and not the same in every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from record import Record, add_json_option

STEPS = 3
MMAP_THRESHOLD = "131072"

UNIFORM = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "head_dim": 32,
    "gqa_group_size": 2,
    "ffn_dim": 640,
    "vocab_size": 4096,
}
LLAMA = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "ffn_dim": 1376,
    "vocab_size": 8192,
    "qk_norm": False,
    "tie_word_embeddings": False,
}
COLA = {**LLAMA, "cola": {"rank": 128, "activation": "both"}}
LAYER_WISE = {
    "hidden_size": 320,
    "num_hidden_layers": 8,
    "head_dim": 32,
    "gqa_group_size": 2,
    "ffn_dim_divisor": 32,
    "layerwise_scaling": {"alpha": [0.5, 1.0], "beta": [0.5, 4.0]},
    "vocab_size": 16384,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training set-up."""

    name: str
    design: dict[str, Any]
    micro_batch_size: int = 8
    sequence_length: int = 256
    precision: str = "float32"
    optimizer: str = "adamw"
    activation_checkpointing: str = "none"
    micro_batches: int = 1
    z_loss: float = 0.0
    layer_dropout: float = 0.0
    """Share of the layers that a budgeted gate leaves out."""


CASES = (
    Case(name="uniform", design=UNIFORM),
    Case(name="llama", design=LLAMA),
    Case(name="cola", design=COLA),
    Case(name="uniform bf16", design=UNIFORM, precision="bfloat16", micro_batches=2, z_loss=1e-4),
    Case(name="layer-wise bf16", design=LAYER_WISE, precision="bfloat16"),
    Case(name="llama checkpointed", design=LLAMA, activation_checkpointing="layer"),
    Case(name="cola CoLA-M", design=COLA, activation_checkpointing="cola_m"),
    Case(name="uniform, half of the layers", design=UNIFORM, layer_dropout=0.5),
    Case(name="layer-wise, half of the layers", design=LAYER_WISE, layer_dropout=0.5),
    Case(
        name="llama Muon, long rows",
        design=LLAMA,
        optimizer="muon",
        micro_batch_size=1,
        sequence_length=1024,
    ),
)


def train_case(case: Case, device: str, design: dict[str, Any], *, steps: int) -> None:
    """Train a design on random tokens, through the real loop."""
    import torch

    from samara.model.config import ModelConfig
    from samara.model.configuration import SamaraConfig
    from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing
    from samara.train.checkpoint import TrainingState
    from samara.train.config import AdamW, Muon
    from samara.train.layer_dropout import dropping_layers
    from samara.train.layer_rates import LayerDropoutConfig
    from samara.train.loop import Costs, Hooks, train
    from samara.train.objective import CausalLM
    from samara.train.optim import Optimizer

    torch.manual_seed(0)
    model = SamaraForCausalLM(SamaraConfig.from_design(ModelConfig.model_validate(design)))
    model.to(device)
    set_activation_checkpointing(model, case.activation_checkpointing)
    optimizer = AdamW(lr=1e-3) if case.optimizer == "adamw" else Muon(lr=1e-3)
    shape = (case.micro_batch_size, case.sequence_length)
    ids = torch.randint(0, design["vocab_size"], shape)
    # Documents of 100 tokens: attention gets the mask of packed rows.
    positions = torch.arange(case.sequence_length).remainder(100).expand(shape).contiguous()
    batch = {
        "input_ids": ids,
        "targets": ids.roll(-1, dims=1),
        "position_ids": positions,
        "document_ids": torch.zeros(shape, dtype=torch.int64),
    }
    dropout = LayerDropoutConfig(rate=case.layer_dropout)
    with dropping_layers(
        model, dropout if case.layer_dropout else None, seed=0, costs=lambda _: Costs()
    ) as around_pass:
        train(
            model,
            objective=CausalLM(z_loss=case.z_loss),
            optimizer=Optimizer(model, optimizer),
            learning_rate=lambda _: 1e-3,
            batches=[[batch] * case.micro_batches] * steps,
            state=TrainingState(),
            num_steps=steps,
            precision=case.precision,
            clip_grad_norm=1.0,
            hooks=Hooks(around_pass=around_pass),
        )


def measure(case: Case, device: str) -> int:
    """Peak bytes of a case; runs in a process of its own."""
    import torch

    from samara.train.memory import PeakMemory

    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 64}
    if case.activation_checkpointing == "cola_m":
        tiny["cola"] = {"rank": 8}
    train_case(case, device, tiny, steps=1)
    peak = PeakMemory(torch.device(device))
    train_case(case, device, case.design, steps=STEPS)
    return peak.peak()


def predict(case: Case, device: str) -> int:
    """Peak bytes of a case, in closed form."""
    from samara.measure.memory import training_memory
    from samara.model.config import ModelConfig
    from samara.train.layer_rates import LayerDropoutConfig

    design = ModelConfig.model_validate(case.design)
    rates = LayerDropoutConfig(rate=case.layer_dropout).rates(design.num_hidden_layers)
    return training_memory(
        design,
        micro_batch_size=case.micro_batch_size,
        sequence_length=case.sequence_length,
        precision=case.precision,
        optimizer=case.optimizer,
        activation_checkpointing=case.activation_checkpointing,
        accumulates=case.micro_batches > 1,
        device=device,
        active_layers=rates.active_layers,
    ).total


def in_fresh_process(index: int, device: str, **environment: str) -> int:
    """Measure one case where nothing ran before."""
    command = [sys.executable, __file__, "--device", device, "--case", str(index)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return int(done.stdout)


def measured(index: int, device: str) -> dict[str, int]:
    """The peaks of a case, by what they are called in a row."""
    if device == "cuda":
        return {"measured": in_fresh_process(index, "cuda")}
    return {
        "measured": in_fresh_process(index, "cpu", MALLOC_MMAP_THRESHOLD_=MMAP_THRESHOLD),
        "default_heap": in_fresh_process(index, "cpu"),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    heap = f"  default heap {row['default_heap'] / 1e6:7.0f}" if "default_heap" in row else ""
    return (
        f"{row['name']:30} predicted {row['predicted'] / 1e6:7.0f} MB  "
        f"measured {row['measured'] / 1e6:7.0f} MB  "
        f"{row['predicted'] / row['measured'] - 1:+6.1%}{heap}"
    )


def main(arguments: Sequence[str]) -> None:
    """Print a line per case; write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases; left out: all")
    add_json_option(parser)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        print(measure(CASES[options.case], options.device))
        return
    names = [case.name for case in CASES]
    unknown = [name for name in options.only or () if name not in names]
    if unknown:
        parser.error(f"--only {unknown[0]}: no such case; there are {', '.join(names)}")
    settings = {"device": options.device, "steps": STEPS, "only": options.only}
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=options.device,
        settings=settings,
    )
    for index, case in enumerate(CASES):
        if options.only and case.name not in options.only:
            continue
        predicted = predict(case, options.device)
        row = {**asdict(case), "predicted": predicted, **measured(index, options.device)}
        record.add(row)
        print(line(row), flush=True)
    record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
