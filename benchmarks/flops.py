"""Predicted parameters and FLOPs against the real models: their tensors, and torch's FLOP counter.

    python benchmarks/flops.py                          # the shipped sizes
    python benchmarks/flops.py recipes/cola-60m.yaml --length 512

Every model is made of fake tensors: the counter sees shapes, no number is computed, and no machine
is too small. Attention is counted as its plain products (the whole square).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import Record, add_json_option
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samara.designs import design_inputs
from samara.measure.budget import budget
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.modeling import SamaraForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "openelm-270m",
    "openelm-1_1b",
    "openelm-3b",
    "llama-60m",
    "llama-1b",
    "llama-7b",
    "cola-60m",
    "cola-1b",
    "cola-7b",
)


def count(design: ModelConfig, *, rows: int, length: int) -> dict[str, int]:
    """Parameters and training FLOPs of the model as torch sees them."""
    with FakeTensorMode():
        model = SamaraForCausalLM(SamaraConfig.from_design(design))
        ids = torch.zeros(rows, length, dtype=torch.int64)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            hidden = model.model(input_ids=ids).last_hidden_state
            linear_cross_entropy(hidden, model.lm_head.weight, ids).loss_sum.backward()
    return {"parameters": model.num_parameters(), "flops": counter.get_total_flops()}


def compare(path: Path, *, rows: int, length: int) -> dict[str, Any]:
    """A recipe's design, predicted and counted."""
    (item,) = design_inputs([path], [])
    costs = budget(item.model)
    counted = count(item.model, rows=rows, length=length)
    return {
        "name": item.name,
        "parameters": {"predicted": costs.parameters.total, "measured": counted["parameters"]},
        "training_flops_per_token": {
            "predicted": costs.flops_per_token(length).training,
            "measured": counted["flops"] / (rows * length),
        },
    }


def main(arguments: Sequence[str]) -> None:
    """Print a line per design; write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path, help="left out: the shipped sizes")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    recipes = options.recipes or [ROOT / "recipes" / f"{name}.yaml" for name in SHIPPED]
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device="cpu",
        settings={"rows": options.rows, "length": options.length},
    )
    for path in recipes:
        row = compare(path, rows=options.rows, length=options.length)
        record.add(row)
        parameters, flops = row["parameters"], row["training_flops_per_token"]
        print(
            f"{row['name']:16} parameters {parameters['predicted']:>14,} of "
            f"{parameters['measured']:>14,}   FLOPs per token {flops['predicted']:>17,} of "
            f"{flops['measured']:>19,.1f}",
            flush=True,
        )
    record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
