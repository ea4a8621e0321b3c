"""Decoding on a CPU: CoLA against dense at equal width, number formats, layouts, threads.

    python benchmarks/inference_cpu.py                                # widths, this CPU
    python benchmarks/inference_cpu.py --sizes 1b/6 --formats bfloat16 int8 --modes compiled
    python benchmarks/inference_cpu.py --json inference_cpu.json      # whole after every size
    python benchmarks/inference_cpu.py --smoke                        # does it run at all

Sizes and designs are those of ``benchmarks/inference.py``; batch 1, static cache. Formats: the
precision of all weights, or ``int8``: bfloat16 with the projections in int8. Layouts: ``stored``,
the weights as they are saved; ``decoding``, rearranged by ``samara.model.weight_layout`` (it
changes nothing in int8, which has that layout only).

The machine may have other work. So all cases of a size are alive together and take turns, every
second round in the opposite order, and the fastest round counts. On one thread the time is the
processor's, which waiting does not lengthen; on several it is the clock's, since threads that wait
for each other are busy. ``load`` is the machine's load average when the row was made.

``error`` is the root mean square difference of the logits from those of the same weights in
float32, in standard deviations of a position's logits; ``agreement`` the share of positions at
which both have the same likeliest token.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.config as dynamo
from inference import SIZES, make_model
from record import Record, add_json_option
from torch import Tensor
from transformers import StaticCache

from samara.model.quantization import quantize_int8, weight_bytes
from samara.model.weight_layout import lay_out_for_decoding

DESIGNS = ("uniform", "cola", "layer-wise")
FORMATS = ("float32", "bfloat16", "int8")
LAYOUTS = ("stored", "decoding")
MODES = ("static", "compiled")


class Case:
    """One model that decodes in one way."""

    def __init__(self, model: Any, facts: dict[str, Any], prompt: Tensor, new_tokens: int) -> None:
        self.model, self.facts, self.prompt, self.new_tokens = model, facts, prompt, new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
        self.step: Any = model
        if facts["mode"] == "compiled":
            self.step = torch.compile(model.__call__, fullgraph=True, dynamic=False)
        self.prefill_seconds: list[float] = []
        self.token_seconds: list[float] = []

    @torch.no_grad()
    def decode(self, *, keep: bool) -> None:
        """Read the prompt and write; keep the times or not."""
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.cache.reset()
        start = now()
        token = self._following(self.model, self.prompt)
        first = now()
        for _ in range(self.new_tokens - 1):
            token = self._following(self.step, token)
        end = now()
        if keep:
            self.prefill_seconds.append(first - start)
            self.token_seconds.append((end - first) / (self.new_tokens - 1))

    def _following(self, call: Any, ids: Tensor) -> Tensor:
        logits: Tensor = call(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def row(self) -> dict[str, Any]:
        """What was found."""
        return {
            **self.facts,
            "threads": torch.get_num_threads(),
            "prefill_tokens_per_second": self.prompt.numel() / min(self.prefill_seconds),
            "decode_seconds_per_token": min(self.token_seconds),
            "slowest_round": max(self.token_seconds) / min(self.token_seconds),
            "load": os.getloadavg()[0],
        }


@torch.no_grad()
def against_exact(model: Any, exact_tv: Tensor, ids: Tensor) -> dict[str, float]:
    """How far a model's logits are from the float32 model's (t, v)."""
    found_tv = model(input_ids=ids).logits[0].float()
    difference = (found_tv - exact_tv).square().mean().sqrt() / exact_tv.std(dim=-1).mean()
    same = (found_tv.argmax(-1) == exact_tv.argmax(-1)).float().mean()
    return {"error": float(difference), "agreement": float(same)}


def make_cases(options: argparse.Namespace, size_name: str) -> Iterator[Case]:
    """All models of a size, each in every way asked for."""
    size = SIZES[size_name]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.vocab_size, (1, options.prompt_length), generator=draw)
    for design in options.designs:
        exact: Any = make_model(size, design, device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            exact_tv = exact(input_ids=ids).logits[0]
        for number_format in options.formats:
            for layout in options.layouts:
                if number_format == "int8" and layout != options.layouts[-1]:
                    continue
                model = copy.deepcopy(exact)
                if number_format != "float32":
                    model.to(torch.bfloat16)
                if number_format == "int8":
                    quantize_int8(model)
                elif layout == "decoding":
                    lay_out_for_decoding(model)
                facts = {
                    "size": size_name,
                    "design": design,
                    "format": number_format,
                    "layout": "decoding" if number_format == "int8" else layout,
                    "parameters": exact.num_parameters(),
                    "weights_bytes": weight_bytes(model),
                    **against_exact(model, exact_tv, ids),
                }
                for mode in options.modes:
                    yield Case(model, {**facts, "mode": mode}, ids, options.new_tokens)


def measure(options: argparse.Namespace, size_name: str) -> Iterator[dict[str, Any]]:
    """Rows of one size: the cases take turns."""
    cases = list(make_cases(options, size_name))
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in cases:
            case.prefill_seconds, case.token_seconds = [], []
            case.decode(keep=False)
        for number in range(options.repeats):
            for case in cases if number % 2 == 0 else reversed(cases):
                case.decode(keep=True)
        for case in cases:
            yield case.row()


HEADER = (
    f"{'size':8}{'design':12}{'format':10}{'layout':10}{'mode':10}{'threads':>7}{'weights MB':>11}"
    f"{'prefill/s':>10}{'ms/token':>9}{'slowest':>8}{'error':>9}{'agree':>7}{'load':>6}"
)


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    return (
        f"{row['size']:8}{row['design']:12}{row['format']:10}{row['layout']:10}{row['mode']:10}"
        f"{row['threads']:7}{row['weights_bytes'] / 1e6:11.1f}"
        f"{row['prefill_tokens_per_second']:10.0f}{row['decode_seconds_per_token'] * 1e3:9.2f}"
        f"{row['slowest_round']:8.2f}{row['error']:9.4f}{row['agreement']:7.2f}{row['load']:6.1f}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; --smoke lays its own values under what is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=("192", "384", "768", "350m/6", "1b/6")
    )
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=("uniform", "cola"))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=("static",))
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=4)
    add_json_option(parser)
    parser.add_argument("--smoke", action="store_true", help="toy size, a second")
    if "--smoke" in arguments:
        parser.set_defaults(
            sizes=("toy",), designs=DESIGNS, prompt_length=8, new_tokens=4, repeats=2
        )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print a row per case; write them as JSON if asked to."""
    options = parse(arguments)
    threads_before, limit_before = torch.get_num_threads(), dynamo.recompile_limit
    # Each model compiles the same code once more.
    dynamo.recompile_limit = max(limit_before, 64)
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device="cpu",
        settings=vars(options),
    )
    print(HEADER, flush=True)
    try:
        for size_name in options.sizes:
            for row in measure(options, size_name):
                record.add(row)
                print(line(row), flush=True)
            gc.collect()
    finally:
        torch.set_num_threads(threads_before)
        dynamo.recompile_limit = limit_before
    record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
