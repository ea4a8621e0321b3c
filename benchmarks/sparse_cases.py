"""One case of the benchmark of sparse training: a model, a way to train it, its time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

WARMUP_STEPS = 5
TWO_LEVEL_COLUMNS = 0.25


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model with random weights."""

    kind: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "toy": Shape(kind="samara", width=64, layers=2, heads=4, kv_heads=2, ffn=160, vocabulary=256),
    "60m": Shape(
        kind="samara", width=512, layers=8, heads=8, kv_heads=8, ffn=1376, vocabulary=32000
    ),
    "130m": Shape(
        kind="samara", width=768, layers=12, heads=12, kv_heads=12, ffn=2048, vocabulary=32000
    ),
    "1b": Shape(
        kind="llama",
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        ffn=8192,
        vocabulary=128256,
        tied=True,
    ),
}
"""60m and 130m: recipes/llama-60m.yaml, llama-130m.yaml. 1b: the shape of Llama-3.2-1B."""
METHODS = ("full", "lora", "element", "column", "two_level", "block4", "row", "shira")
VARIANTS = ("eager", "checkpointed", "compiled", "compiled_checkpointed")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what is trained, how, and on what."""

    shape: str
    method: str
    variant: str
    device: str
    batch: int
    length: int
    density: float
    steps: int
    repeats: int

    @property
    def name(self) -> str:
        """A row's name."""
        return f"{self.shape} {self.batch}x{self.length} {self.method} {self.variant}"


def load_libraries() -> None:
    """Import what a case needs: a process that waits for its turn does this meanwhile."""
    import peft
    import transformers

    import samara.train.loop

    del peft, transformers, samara


# --- the model and what is trained of it ----------------------------------------------------------


def make_model(shape: Shape, device: str, length: int) -> Any:
    """Random weights; on CUDA in bfloat16, on CPU in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from samara.model.config import ModelConfig
    from samara.model.configuration import SamaraConfig
    from samara.model.modeling import SamaraForCausalLM

    with torch.device(device):
        if shape.kind == "llama":
            config = LlamaConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                intermediate_size=shape.ffn,
                max_position_embeddings=length,
                tie_word_embeddings=shape.tied,
            )
            model: Any = LlamaForCausalLM(config)
        else:
            design = ModelConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.width,
                num_hidden_layers=shape.layers,
                head_dim=shape.width // shape.heads,
                gqa_group_size=shape.heads // shape.kv_heads,
                ffn_dim=shape.ffn,
                max_position_embeddings=length,
                qk_norm=False,
                tie_word_embeddings=shape.tied,
            )
            model = SamaraForCausalLM(SamaraConfig.from_design(design))
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32)


def make_batch(shape: Shape, case: Case) -> dict[str, Any]:
    """Random tokens, one document a row."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = (case.batch, case.length)
    ids = torch.randint(shape.vocabulary, size, generator=generator)
    positions = torch.arange(case.length).expand(size).contiguous()
    return {"input_ids": ids, "targets": ids.roll(-1, dims=1), "position_ids": positions}


def equal_rank(model: Any, density: float) -> tuple[int, int]:
    """LoRA's rank on all linear layers, and the number of weights that it trains.

    The rank comes nearest to the density's share of the linear weights.
    """
    from samara.sparse.attach import linear_weights

    shapes = [use.module.weight.shape for use in linear_weights(model).values()]
    by_rank = sum(sum(shape) for shape in shapes)
    rank = max(1, round(density * sum(shape.numel() for shape in shapes) / by_rank))
    return rank, rank * by_rank


def random_support(model: Any, granularity: Any, total: int, batch: dict[str, Any]) -> Any:
    """A support of ``total`` entries (or less by part of a unit) drawn at random.

    Time and memory do not depend on which entries a score prefers, only on their shape. Targets are
    those of the default selection; every matrix gets its share by size.
    """
    import torch

    from samara.sparse.attach import input_dim, linear_weights
    from samara.sparse.calibration import Calibration
    from samara.sparse.selection import shared_inputs, target_names
    from samara.sparse.support import Support, TensorSupport
    from samara.sparse.units import Units
    from samara.train.objective import CausalLM

    linear, device = linear_weights(model), model.device
    names = target_names(model, "without_qk")
    shapes = {name: tuple(linear[name].module.weight.shape) for name in names}
    share = total / sum(rows * columns for rows, columns in shapes.values())
    columns: dict[str, torch.Tensor] = {}
    if granularity == "two_level":
        sample = {key: tensor[:1, :8] for key, tensor in batch.items()}
        seen = Calibration(objective=CausalLM(), samples=[sample])
        for group in shared_inputs(model, names, seen):
            width = shapes[group[0]][1]
            drawn = torch.randperm(width, device=device)[: round(TWO_LEVEL_COLUMNS * width)]
            columns.update(dict.fromkeys(group, drawn.sort().values))
    tensors = {}
    for name, shape in shapes.items():
        rows, width = shape
        units = Units(shape=shape, granularity=granularity, input_dim=input_dim(linear[name]))
        wanted = max(1, int(share * rows * width / units.size))
        if name in columns:
            own = columns[name]
            drawn = torch.randperm(rows * own.numel(), device=device)[:wanted].sort().values
            index = drawn // own.numel() * width + own[drawn % own.numel()]
        else:
            drawn = torch.randperm(rows * width // units.size, device=device)[:wanted]
            index = units.entries(drawn.sort().values)
        tensors[name] = TensorSupport(shape=shape, index=index.cpu(), block=units.block)
    return Support(tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model made ready.

    Attributes:
        model: What the loop trains.
        updater: Updates what is trained.
        weights_bytes: Of the model before anything was put on it.
        added_bytes: What the method keeps beside these, gradients and moments left out.
        moments_bytes: Of the update; known after the first one.
        own: Tensors that backward refers to and that are in one of the two.
        tile_bytes: The largest piece of a dense gradient.
    """

    model: Any
    updater: Any
    weights_bytes: int
    added_bytes: int
    moments_bytes: Callable[[], int]
    own: tuple[Any, ...] = ()
    tile_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        """Of what is trained."""
        return _bytes(self.updater.parameters)


def prepare(case: Case, batch: dict[str, Any]) -> Trained:
    """Build the model and put the method on it."""
    import torch

    torch.manual_seed(0)
    model = make_model(SHAPES[case.shape], case.device, case.length)
    set_checkpointing(model, on=case.variant.endswith("checkpointed"))
    rank, total = equal_rank(model, case.density)
    if case.method in ("full", "lora", "shira"):
        return _with_fused_adamw(model, case.method, rank)
    return _sparse(model, case.method, total, batch)


def set_checkpointing(model: Any, *, on: bool) -> None:
    """Keep of each layer its input alone, and recompute the rest; or keep all."""
    from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing

    if isinstance(model, SamaraForCausalLM):
        set_activation_checkpointing(model, "layer" if on else "none")
    elif on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _with_fused_adamw(model: Any, method: str, rank: int) -> Trained:
    """Full fine-tuning, or an adapter of peft in the weights' own dtype, which is its fastest."""
    import peft
    import torch

    from samara.sparse.attach import linear_weights
    from samara.train.config import AdamW
    from samara.train.optim import Optimizer

    weights = _bytes(model.parameters())
    if method != "full":
        targets = [name.rpartition(".")[0] for name in linear_weights(model)]
        if method == "lora":
            settings: Any = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        else:
            settings = peft.ShiraConfig(r=rank, target_modules=targets)
            settings.mask_fn = _mask
        with torch.device(model.device):
            adapted = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        model = adapted.get_base_model()
    optimizer = Optimizer(model, AdamW(lr=1e-4))
    return Trained(
        model=model,
        updater=optimizer,
        weights_bytes=weights,
        added_bytes=_bytes(model.parameters()) - weights,
        moments_bytes=lambda: _bytes(optimizer.state_dict().values()),
        own=tuple(model.parameters()),
    )


def _mask(base_layer: Any, r: int, **_: Any) -> Any:
    """SHiRA's random mask, drawn on the device: peft's own takes minutes at a billion weights."""
    import torch

    weight = base_layer.weight
    mask = torch.zeros(weight.numel(), device=weight.device)
    chosen = torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]
    mask[chosen] = 1.0
    return mask.view(weight.shape)


def _sparse(model: Any, granularity: str, total: int, batch: dict[str, Any]) -> Trained:
    import torch

    from samara.sparse.attach import Attachment
    from samara.sparse.config import SparseAdamWConfig
    from samara.sparse.gradients import WORKSPACE_BYTES
    from samara.sparse.update import SparseAdamW

    support = random_support(model, granularity, total, batch)
    attachment = Attachment(model, support)
    entries = attachment.selected.values()
    own: list[Any] = [*model.parameters()]
    for part in (*entries, *attachment.plans.values()):
        own += [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
    moments = sum(_bytes([entry.exp_avg, entry.exp_avg_sq]) for entry in entries)
    gradients = _bytes(entry.values for entry in entries)
    return Trained(
        model=model,
        updater=SparseAdamW(attachment.selected, SparseAdamWConfig(lr=1e-4)),
        weights_bytes=_bytes(model.parameters()),
        added_bytes=attachment.state_bytes - moments - gradients,
        moments_bytes=lambda: moments,
        own=tuple(own),
        tile_bytes=min(WORKSPACE_BYTES, max(_bytes([entry.weight]) for entry in entries)),
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- measuring ------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Train, and return the figures of a case; runs in a process of its own."""
    import torch

    from samara.train.parallel import compile_model, uncompiled

    batch = make_batch(SHAPES[case.shape], case)
    peak = _settled_meter(case, torch.device(case.device))
    trained = prepare(case, batch)
    if case.variant.startswith("compiled"):
        compile_model(trained.model)
    start = time.perf_counter()
    train_steps(trained, batch, WARMUP_STEPS, case.device)
    warmup = time.perf_counter() - start
    if case.device == "cuda":
        peak.restart()  # compilation tries kernels out
    repeats = [
        train_steps(trained, batch, case.steps, case.device)[1:] for _ in range(case.repeats)
    ]
    found = {
        **_speed(repeats, case.batch * case.length),
        "warmup_seconds": warmup,
        "peak_bytes": peak.peak(),
        "trained": sum(p.numel() for p in trained.updater.parameters),
        "weights_bytes": trained.weights_bytes,
        "added_bytes": trained.added_bytes,
        "moments_bytes": trained.moments_bytes(),
        "gradient_bytes": trained.gradient_bytes,
    }
    set_checkpointing(trained.model, on=False)
    with uncompiled(trained.model):
        found["flops_per_step"] = _flops(trained, batch)
        kept = _kept_bytes(trained, batch)
    return {**found, **_prediction(case, trained, kept)}


def _settled_meter(case: Case, device: Any) -> Any:
    """A meter of memory that starts when all is loaded: on CPU a tiny model has trained once."""
    from samara.train.memory import PeakMemory

    if device.type == "cpu":
        tiny = replace(case, shape="toy", batch=1, length=8, variant="eager")
        batch = make_batch(SHAPES["toy"], tiny)
        train_steps(prepare(tiny, batch), batch, 1, "cpu")
    return PeakMemory(device)


def train_steps(trained: Trained, batch: dict[str, Any], steps: int, device: str) -> list[float]:
    """Train through the real loop; seconds of each step, of the processor on CPU.

    A step ends where the loop has read its loss, so the first one lacks the update before it.
    """
    from samara.train.checkpoint import TrainingState
    from samara.train.loop import Hooks, train
    from samara.train.objective import CausalLM

    clock = time.perf_counter if device == "cuda" else time.process_time
    times = [clock()]
    train(
        trained.model,
        objective=CausalLM(),
        optimizer=trained.updater,
        learning_rate=lambda _: 1e-4,
        batches=[[batch]] * steps,
        state=TrainingState(),
        num_steps=steps,
        clip_grad_norm=1.0,
        hooks=Hooks(on_step=lambda *_: times.append(clock()), log_every=None),
    )
    return [after - before for before, after in pairwise(times)]


def _speed(repeats: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """Tokens per second: the median of all steps, quartiles, and each repetition's median."""
    low, middle, high = statistics.quantiles([s for steps in repeats for s in steps], n=4)
    return {
        "tokens_per_second": tokens / middle,
        "quartiles": [tokens / high, tokens / low],
        "by_repeat": [tokens / statistics.median(steps) for steps in repeats],
        "step_seconds": middle,
    }


def _pass(trained: Trained, batch: dict[str, Any]) -> Any:
    from samara.train.objective import CausalLM

    model = trained.model
    return CausalLM()(model, {key: tensor.to(model.device) for key, tensor in batch.items()}).loss


def _flops(trained: Trained, batch: dict[str, Any]) -> int:
    """Of the products of one forward and backward pass, nothing recomputed."""
    from samara.measure.flop_counter import flop_counter

    with flop_counter() as counter:
        _pass(trained, batch).backward()
    trained.updater.zero_grad()
    return int(counter.get_total_flops())


def _kept_bytes(trained: Trained, batch: dict[str, Any]) -> int:
    """What forward leaves for backward, each storage once; weights and state left out."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    own = {tensor.untyped_storage().data_ptr() for tensor in trained.own}
    seen: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        is_sparse = tensor.layout == torch.sparse_coo
        for part in (tensor._values(), tensor._indices()) if is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _pass(trained, batch)
    del loss
    return sum(seen.values())


def _prediction(case: Case, trained: Trained, kept: int) -> dict[str, Any]:
    """The parts of the formula, and its sum.

    Compiled layers recompute as they like, and have none. Under checkpointing each layer's input is
    kept, and of one layer all.
    """
    from samara.measure.memory import CUBLAS_HANDLES, CUBLAS_WORKSPACE
    from samara.sparse.memory import logits_bytes

    shape = SHAPES[case.shape]
    if case.variant.endswith("checkpointed"):
        stream = case.batch * case.length * shape.width * trained.model.dtype.itemsize
        kept = shape.layers * stream + kept // shape.layers
    logits = logits_bytes(
        tokens=case.batch * case.length,
        vocabulary=shape.vocabulary,
        device="cuda" if case.device == "cuda" else "cpu",
        element_size=trained.model.dtype.itemsize,
    )
    work = max(trained.tile_bytes, logits)
    if case.device == "cuda":
        work += CUBLAS_HANDLES * CUBLAS_WORKSPACE
    fixed = trained.weights_bytes + trained.added_bytes + trained.moments_bytes()
    # Gradients of all weights come as the activations go.
    beside = max if case.method == "full" else lambda *parts: sum(parts)
    total = fixed + beside(trained.gradient_bytes, kept + work)
    is_compiled = case.variant.startswith("compiled")
    return {
        "kept_bytes": kept,
        "workspace_bytes": work,
        "predicted_bytes": None if is_compiled else total,
    }
