"""What dropping layers saves: time of a step and peak of memory, against training without it.

    python benchmarks/layer_dropout.py                  # small models on this machine's CPU
    python benchmarks/layer_dropout.py --device cuda    # BERT-base and its like on a GPU
    python benchmarks/layer_dropout.py --json layer_dropout-cpu.json    # whole after every case

Every case trains in a process of its own, on random tokens, through the real loop. Beside layer
dropout stand the other ways to the same memory: activation checkpointing, and freezing the lower
half of the layers. The figures are

* ``step_seconds``: median time of a step after warm-up; of the processor on CPU, where a shared
  machine spoils the clock, of the clock on CUDA;
* ``peak_bytes``: on CUDA the peak of allocated tensor bytes. On CPU the peak of resident memory
  above that of the process when all is loaded and a tiny model has trained once; model and
  optimizer are in it. glibc gives freed blocks back (``MALLOC_MMAP_THRESHOLD_``), as in
  ``benchmarks/memory.py``;
* ``saved_bytes``: the most that a forward leaves for backward, each storage once, parameters left
  out (``torch.autograd.graph.saved_tensors_hooks``). Not measured under checkpointing, which keeps
  its inputs out of sight of the hooks.

A budgeted gate runs the same number of layers in every pass; independent gates have the same mean,
and the peak is that of the worst pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from markdown_parts import error
from record import Record, add_json_option

MMAP_THRESHOLD = "131072"
WARMUP_STEPS = 3
SAVED_STEPS = 4
LABELS = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes that a device is measured at."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    rows: int
    length: int


SIZES = {
    "toy": Size(layers=4, width=32, heads=2, vocabulary=64, rows=2, length=16),
    "small": Size(layers=12, width=256, heads=4, vocabulary=4096, rows=16, length=128),
    "base": Size(layers=12, width=768, heads=12, vocabulary=30522, rows=32, length=256),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train."""

    name: str
    layer_dropout: dict[str, Any] | None = None
    checkpointing: bool = False
    frozen: float = 0.0
    """Share of the layers, from the bottom, that are not trained."""


METHODS = (
    Method(name="all layers"),
    *(
        Method(name=f"dropout {rate}, {gate}", layer_dropout={"rate": rate, "gate": gate})
        for rate, gate in (
            (0.25, "budgeted"),
            (0.5, "budgeted"),
            (0.75, "budgeted"),
            (0.5, "bernoulli"),
        )
    ),
    Method(name="checkpointing", checkpointing=True),
    Method(name="dropout 0.5, checkpointing", layer_dropout={"rate": 0.5}, checkpointing=True),
    Method(name="lower half frozen", frozen=0.5),
)
MODELS = ("bert-lora", "llama-lora", "samara")


# --- one case, in a process of its own ----------------------------------------------------------


def make_model(name: str, size: Size) -> Any:
    """A model with random weights; of those of transformers, LoRA (rank 8) and head are trained."""
    import peft
    import transformers

    from samara.model.config import ModelConfig
    from samara.model.configuration import SamaraConfig
    from samara.model.modeling import SamaraForCausalLM

    width, heads = size.width, size.heads
    shape = {
        "vocab_size": size.vocabulary,
        "hidden_size": width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max(64, size.length),
    }
    if name == "samara":
        design = ModelConfig(
            vocab_size=size.vocabulary,
            hidden_size=width,
            num_hidden_layers=size.layers,
            head_dim=width // heads,
        )
        return SamaraForCausalLM(SamaraConfig.from_design(design))
    if name == "bert-lora":
        bert = transformers.BertConfig(**shape, intermediate_size=4 * width, num_labels=LABELS)
        model: Any = transformers.BertForSequenceClassification(bert)
        lora = peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    else:
        llama = transformers.LlamaConfig(
            **shape, intermediate_size=8 * width // 3, num_key_value_heads=heads
        )
        model = transformers.LlamaForCausalLM(llama)
        lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).base_model.model


def prepare(model: Any, method: Method) -> None:
    """Freeze and checkpoint as the method says."""
    from samara.train.layer_stack import find_layers

    layers = find_layers(model).layers
    if method.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method.frozen:
        for layer in layers[: int(method.frozen * len(layers))]:
            layer.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)


def classify(model: Any, batch: Any) -> Any:
    """The objective of a classifier: one target a row."""
    import torch

    from samara.train.objective import Sums

    logits = model(input_ids=batch["input_ids"]).logits
    nll = torch.nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="sum")
    return Sums(loss=nll, nll=nll)


def make_batch(name: str, size: Size) -> dict[str, Any]:
    """Random tokens, and what is to be said of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (size.rows, size.length)
    ids = torch.randint(2, size.vocabulary, shape, generator=generator)
    if name == "bert-lora":
        return {"input_ids": ids, "targets": ids[:, 0] % LABELS}
    positions = torch.arange(size.length).expand(shape).contiguous()
    return {"input_ids": ids, "targets": ids.roll(-1, dims=1), "position_ids": positions}


class SavedBytes:
    """An objective that notes the most bytes that a forward leaves for backward."""

    def __init__(self, objective: Callable[[Any, Any], Any]) -> None:
        self.objective, self.most = objective, 0

    def __call__(self, model: Any, batch: Any) -> Any:
        """Run the objective under hooks."""
        from torch.autograd.graph import saved_tensors_hooks

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = self.objective(model, batch)
        self.most = max(self.most, sum(seen.values()))
        return result


def train_case(
    name: str, method: Method, size: Size, device: str, *, steps: int, saved: bool
) -> dict[str, Any]:
    """Train; return times of steps, layers that ran, and bytes kept for backward."""
    import torch

    from samara.train.checkpoint import TrainingState
    from samara.train.config import AdamW
    from samara.train.layer_dropout import LayerCosts, dropping_layers
    from samara.train.layer_rates import LayerDropoutConfig
    from samara.train.loop import Costs, Hooks, train
    from samara.train.objective import CausalLM
    from samara.train.optim import Optimizer

    torch.manual_seed(0)
    model = make_model(name, size).to(device)
    prepare(model, method)
    fields = method.layer_dropout
    config = None if fields is None else LayerDropoutConfig.model_validate(fields)
    # A token costs 1 per layer: the loop's FLOPs then count the layers that ran.
    costs = LayerCosts(rest=Costs(), layers=(Costs(flops_per_token=1.0),) * size.layers)
    objective: Any = classify if name == "bert-lora" else CausalLM()
    optimizer = Optimizer(model, AdamW(lr=1e-4))
    state, batch = TrainingState(), make_batch(name, size)
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = [clock()]

    def run(objective: Any, until: int) -> None:
        with dropping_layers(model, config, seed=0, costs=costs) as around_pass:
            train(
                model,
                objective=objective,
                optimizer=optimizer,
                learning_rate=lambda _: 1e-4,
                batches=[[batch]] * (until - state.step),
                state=state,
                num_steps=until,
                precision="bfloat16" if device == "cuda" else "float32",
                clip_grad_norm=1.0,
                costs=costs((1.0,) * size.layers),
                hooks=Hooks(around_pass=around_pass, on_step=lambda *_: times.append(clock())),
            )

    run(objective, WARMUP_STEPS + steps)
    measured = [after - before for before, after in pairwise(times)]
    active = state.flops / state.tokens
    watched = SavedBytes(objective)
    if saved:
        run(watched, state.step + SAVED_STEPS)
    return {
        "step_seconds": statistics.median(measured[WARMUP_STEPS:]),
        "mean_active_layers": active,
        "saved_bytes": watched.most or None,
    }


def measure(name: str, method: Method, size: Size, device: str, steps: int) -> dict[str, Any]:
    """One case: time and peak first, then what is kept for backward, which hooks slow down."""
    import torch

    from samara.train.memory import PeakMemory

    train_case(name, method, SIZES["toy"], device, steps=1, saved=False)
    peak = PeakMemory(torch.device(device))
    found = train_case(name, method, size, device, steps=steps, saved=False)
    found["peak_bytes"] = peak.peak()
    if not method.checkpointing:
        watched = train_case(name, method, size, device, steps=1, saved=True)
        found["saved_bytes"] = watched["saved_bytes"]
    return found


def in_fresh_process(
    name: str, method: Method, *, size: str, device: str, steps: int
) -> dict[str, Any]:
    """Measure a case where nothing ran before."""
    case = json.dumps([name, METHODS.index(method)])
    command = [sys.executable, __file__, "--device", device, "--size", size]
    done = subprocess.run(
        [*command, "--steps", str(steps), "--case", case],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- all cases ----------------------------------------------------------------------------------


def line(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """A row of the printed table."""
    saved = "–" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 1e6:,.0f} MB"
    time_ratio = row["step_seconds"] / reference["step_seconds"]
    return (
        f"{row['model']:10}  {row['method']:26} {row['mean_active_layers']:5.1f} layers  "
        f"{1000 * row['step_seconds']:7.0f} ms ({time_ratio:.2f}x)  "
        f"peak {row['peak_bytes'] / 1e6:7,.0f} MB "
        f"({error(row['peak_bytes'], reference['peak_bytes'])})  kept {saved}"
    )


def main(arguments: Sequence[str]) -> None:
    """Print a line per case; write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="left out: small; on cuda base")
    parser.add_argument("--steps", type=int, default=20, help="measured, after three to warm up")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    add_json_option(parser)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = options.size or ("base" if options.device == "cuda" else "small")
    if options.case is not None:
        name, index = json.loads(options.case)
        found = measure(name, METHODS[index], SIZES[size], options.device, options.steps)
        print(json.dumps(found))
        return
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=options.device,
        settings={
            "device": options.device,
            "size": {"name": size, **asdict(SIZES[size])},
            "steps": options.steps,
            "models": list(options.models),
        },
    )
    for name in options.models:
        reference: dict[str, Any] = {}
        for method in METHODS:
            found = in_fresh_process(
                name, method, size=size, device=options.device, steps=options.steps
            )
            row = {"model": name, "method": method.name, **found}
            reference = reference or row
            record.add(row)
            print(line(row, reference), flush=True)
    record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
