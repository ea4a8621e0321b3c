"""Speed and memory of inference by design, norm kernel, cache and batch size.

    python benchmarks/inference.py                                    # small models, this CPU
    python benchmarks/inference.py --size 270m --device cuda --precision bfloat16
    python benchmarks/inference.py --json inference.json              # whole after every case
    python benchmarks/inference.py --smoke                            # does it run at all

Designs of one size class: ``layer-wise`` (OpenELM), ``uniform`` (of equal parameters), ``cola``
(the uniform one, low-rank), ``llama`` (the uniform one as transformers' LlamaForCausalLM).

Modes: ``dynamic`` cache, ``static`` cache, ``compiled`` (static cache and a compiled decoding step;
on CUDA in mode reduce-overhead: CUDA graphs). Prefill is never compiled: its length changes.

Norms: OpenELM's authors found their models slower than their size says, and the reason in RMSNorm
written as a chain of small kernels (arXiv 2404.14619). ``naive`` is that chain,
``ours`` the model as it is; Llama has the chain of transformers.

Timed are the model's own steps: prefill and the first token (``first``), then one token at a time,
the fastest of some repetitions. ``ops`` are the operators that one uncompiled step launches, views
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from record import Record, add_json_option
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from samara.measure.budget import budget
from samara.model.config import ColaConfig, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.layers import RMSNorm
from samara.model.modeling import SamaraForCausalLM
from samara.model.quantization import quantize_int8, weight_bytes

DESIGNS = ("layer-wise", "uniform", "cola", "llama")
MODES = ("dynamic", "static", "compiled")
NORMS = ("ours", "naive")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size class; the layer-wise design gives its parameters."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    head_dim: int = 64
    ffn_dim_divisor: int = 256
    ffn_dim: int | None = None
    """Of the uniform design, with a key-value head per query head; None: chosen."""

    def layer_wise(self) -> ModelConfig:
        """OpenELM's rule at this size."""
        return ModelConfig.model_validate(
            {
                **self._shared(),
                "gqa_group_size": 4,
                "layerwise_scaling": {"alpha": [0.5, 1.0], "beta": [0.5, 4.0]},
            }
        )

    def uniform(self) -> ModelConfig:
        """Equal layers, the FFN width chosen for the parameters of the layer-wise design."""
        if self.ffn_dim is not None:
            return ModelConfig.model_validate({**self._shared(), "ffn_dim": self.ffn_dim})
        wanted = budget(self.layer_wise().expand()).parameters.total

        def distance(design: ModelConfig) -> int:
            return abs(budget(design.expand()).parameters.total - wanted)

        widths = range(16, 4 * self.hidden_size + 1, 16)
        return min((self._uniform(width) for width in widths), key=distance)

    def _uniform(self, ffn_dim: int) -> ModelConfig:
        return ModelConfig.model_validate(
            {**self._shared(), "gqa_group_size": 4, "ffn_dim": ffn_dim}
        )

    def _shared(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "ffn_dim"}


SIZES = {
    "toy": Size(
        hidden_size=64, num_hidden_layers=2, vocab_size=128, head_dim=16, ffn_dim_divisor=16
    ),
    "small": Size(hidden_size=512, num_hidden_layers=8, vocab_size=8192, ffn_dim_divisor=64),
    "270m": Size(hidden_size=1280, num_hidden_layers=16, vocab_size=32000),
    # CoLA's shapes (arXiv 2502.10940): a sixth of the layers and of the vocabulary, so that the
    # head has its share; and the like at smaller widths.
    "1b/6": Size(hidden_size=2048, num_hidden_layers=4, vocab_size=5344, ffn_dim=5472),
    "350m/6": Size(hidden_size=1024, num_hidden_layers=4, vocab_size=5344, ffn_dim=2736),
    "768": Size(hidden_size=768, num_hidden_layers=4, vocab_size=4096, ffn_dim=2048),
    "384": Size(hidden_size=384, num_hidden_layers=4, vocab_size=2048, ffn_dim=1024),
    "192": Size(hidden_size=192, num_hidden_layers=4, vocab_size=1024, ffn_dim=512),
}


def make_model(size: Size, design: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with the weights of seed 0."""
    torch.manual_seed(0)
    plan = size.layer_wise() if design == "layer-wise" else size.uniform()
    if design == "cola":
        plan = plan.model_copy(update={"cola": ColaConfig(rank=size.hidden_size // 4)})
    config = SamaraConfig.from_design(plan)
    with device:
        model: Any = (
            LlamaForCausalLM(_llama(config)) if design == "llama" else SamaraForCausalLM(config)
        )
    return model.to(dtype).train(False)


def _llama(config: SamaraConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
    )


def naive_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """The formula of RMSNorm operator by operator: same numbers, many kernels."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return normed.type_as(x) * norm.weight


@contextlib.contextmanager
def norm_kernel(kind: str) -> Iterator[None]:
    """Run the models' norms with another kernel for a while."""
    own = RMSNorm.forward
    if kind == "naive":
        RMSNorm.forward = naive_norm
    try:
        yield
    finally:
        RMSNorm.forward = own


class CountOperators(TorchDispatchMode):
    """Counts operators that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every case has to do."""

    prompt_length: int
    new_tokens: int
    repeats: int
    vocab_size: int


@torch.no_grad()
def measure(model: Any, mode: str, *, batch: int, work: Work) -> dict[str, float | int | None]:
    """Time prefill and decoding of one model."""
    device = model.device
    length = work.prompt_length + work.new_tokens
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, work.vocab_size, (batch, work.prompt_length), generator=draw)
    prompt = prompt.to(device)
    static = StaticCache(config=model.config, max_cache_len=length)
    step: Callable[..., Any] = model
    if mode == "compiled":
        torch.compiler.reset()
        kind = "reduce-overhead" if device.type == "cuda" else "default"
        step = torch.compile(model.__call__, fullgraph=True, dynamic=False, mode=kind)

    def synchronize() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def following(call: Callable[..., Any], ids: Tensor, cache: Any) -> Tensor:
        logits = call(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def once() -> tuple[float, float, Any]:
        cache: Any = DynamicCache(config=model.config) if mode == "dynamic" else static
        if mode != "dynamic":
            cache.reset()
        start = synchronize()
        token = following(model, prompt, cache)
        first = synchronize()
        for _ in range(work.new_tokens - 1):
            if mode == "compiled":
                torch.compiler.cudagraph_mark_step_begin()
            token = following(step, token, cache)
        return first - start, synchronize() - first, cache

    start = synchronize()
    once()
    warm_up = synchronize() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [once() for _ in range(work.repeats)]
    first = min(prefill for prefill, _, _ in times)
    decode = min(seconds for _, seconds, _ in times)
    cache = times[-1][2]
    return {
        "weights_bytes": weight_bytes(model),
        "cache_bytes": sum(
            x.numel() * x.element_size()
            for layer in cache.layers
            for x in (layer.keys, layer.values)
        ),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "warm_up_seconds": warm_up,
        "first_token_seconds": first,
        "prefill_tokens_per_second": prompt.numel() / first,
        "decode_tokens_per_second": batch * (work.new_tokens - 1) / decode,
        "total_tokens_per_second": batch * length / (first + decode),
    }


@torch.no_grad()
def count_operators(model: Any) -> int:
    """Operators of one decoding step, dynamic cache, uncompiled."""
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    with CountOperators() as counter:
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return counter.count


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure what is asked for, a row at a time."""
    size, device = SIZES[options.size], torch.device(options.device)
    work = Work(
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        vocab_size=size.vocab_size,
    )
    for design in options.designs:
        model: Any = make_model(
            size, design, device=device, dtype=getattr(torch, options.precision)
        )
        num_parameters = model.num_parameters()
        if options.quantize == "int8":
            quantize_int8(model)
        for norm in ("transformers",) if design == "llama" else options.norms:
            with norm_kernel(norm):
                row = {
                    "design": design,
                    "norm": norm,
                    "parameters": num_parameters,
                    "operators": count_operators(model),
                }
                for mode in options.modes:
                    for batch in options.batch:
                        result = measure(model, mode, batch=batch, work=work)
                        yield {**row, "mode": mode, "batch": batch, **result}
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


HEADER = (
    f"{'design':11}{'norm':13}{'mode':10}{'batch':>5}{'params M':>10}{'weights MB':>11}"
    f"{'cache MB':>9}{'peak MB':>9}{'ops':>6}{'first ms':>9}{'prefill/s':>11}{'decode/s':>10}"
    f"{'total/s':>10}"
)


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return (
        f"{row['design']:11}{row['norm']:13}{row['mode']:10}{row['batch']:5}"
        f"{row['parameters'] / 1e6:10.1f}{row['weights_bytes'] / 1e6:11.1f}"
        f"{row['cache_bytes'] / 1e6:9.2f}{peak:>9}{row['operators']:6}"
        f"{row['first_token_seconds'] * 1e3:9.1f}{row['prefill_tokens_per_second']:11.0f}"
        f"{row['decode_tokens_per_second']:10.1f}{row['total_tokens_per_second']:10.1f}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; --smoke lays its own values under what is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="of the CPU; left out: as torch chooses")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=DESIGNS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=NORMS)
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 32))
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    add_json_option(parser)
    parser.add_argument("--smoke", action="store_true", help="toy size, a second")
    if "--smoke" in arguments:
        parser.set_defaults(
            size="toy",
            modes=("dynamic", "static"),
            batch=(1, 2),
            prompt_length=8,
            new_tokens=4,
            repeats=1,
        )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print a row per case; write them as JSON if asked to."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=options.device,
        settings=vars(options),
    )
    print(HEADER, flush=True)
    for row in cases(options):
        record.add(row)
        print(line(row), flush=True)
    record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
