"""Tokens per second of forward and backward, by design and by activation checkpointing.

    python benchmarks/model_speed.py --device cuda --hidden-size 2048 --layers 24 --batch 16

Prints one JSON line per variant: seconds of one step (median), tokens/s, peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from record import Record, add_json_option

from samara.model.config import ColaConfig, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing


def main() -> None:
    """Measure the variants asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    add_json_option(parser)
    options = parser.parse_args()
    record = Record(
        options.json,
        script=__file__,
        arguments=sys.argv[1:],
        device=options.device,
        settings=vars(options),
    )
    for design in ("dense", "cola"):
        modes = ("none", "layer") if design == "dense" else ("none", "layer", "cola_m")
        for mode in modes:
            row = {"design": design, "checkpointing": mode, **measure(options, design, mode)}
            record.add(row)
            print(json.dumps(row), flush=True)
    record.finish()


def measure(options: argparse.Namespace, design: str, mode: Any) -> dict[str, float]:
    """Time training steps without an optimizer on packed random rows."""
    torch.manual_seed(0)
    d, device = options.hidden_size, torch.device(options.device)
    config = SamaraConfig.from_design(
        ModelConfig(
            hidden_size=d,
            num_hidden_layers=options.layers,
            vocab_size=options.vocab_size,
            cola=ColaConfig(rank=d // 4) if design == "cola" else None,
        )
    )
    with device:
        model = SamaraForCausalLM(config)
    set_activation_checkpointing(model, mode)
    body = torch.compile(model.model, dynamic=False) if options.compile else model.model
    shape = (options.batch, options.length)
    ids = torch.randint(0, options.vocab_size, shape, device=device)
    positions = (torch.arange(options.length, device=device) % 200).expand(shape)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = body(input_ids=ids, position_ids=positions).last_hidden_state
            result = linear_cross_entropy(hidden, model.lm_head.weight, ids)
        (result.loss_sum / result.num_targets).backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "seconds": round(median, 4),
        "tokens_per_second": round(ids.numel() / median),
        "peak_gib": round(peak, 2),
    }


if __name__ == "__main__":
    main()
