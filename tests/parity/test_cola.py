"""CoLA's linear against the formula and its hand-written backward; CoLA-M against CoLA."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from samara.errors import ConfigError
from samara.model.cola import LowRankLinear
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing

HIDDEN, LAYERS, LENGTH, BATCH, RANK = 48, 3, 40, 2, 12


def make_model(activation: str = "low_rank_only", **fields: Any) -> SamaraForCausalLM:
    torch.manual_seed(0)
    design: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "head_dim": 16,
        "num_query_heads": [2, 4, 4],
        "num_kv_heads": [1, 2, 4],
        "ffn_dims": [80, 112, 144],  # no width equals another, so shapes name projections
        "ranks": [RANK] * LAYERS,
        "cola_activation": activation,
    }
    return SamaraForCausalLM(SamaraConfig(**(design | fields)))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 50, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: SamaraForCausalLM, *, autocast: bool = False) -> Tensor:
    ids, targets = batch()
    positions = (torch.arange(LENGTH) % 15).expand(BATCH, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.model(ids, position_ids=positions).last_hidden_state
        return linear_cross_entropy(hidden, model.lm_head.weight, targets).loss_sum


@pytest.mark.parametrize("keep", [False, True])
def test_linear_and_its_written_out_backward(keep: bool) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(7, 11, 3).double()
    layer.keep_pre_activation = keep
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(2, 5, 11, dtype=torch.float64)
    y = layer(x)
    a, b = layer.cola_a.detach(), layer.cola_b.detach()
    rows, grad_rows = x.detach().flatten(0, 1), grad_y.flatten(0, 1)
    u = rows @ a
    sigmoid = 1 / (1 + torch.exp(-u))
    z = u * sigmoid
    torch.testing.assert_close(y.flatten(0, 1), z @ b, rtol=1e-13, atol=1e-13)
    grad_u = (grad_rows @ b.T) * sigmoid * (1 + u * (1 - sigmoid))
    grads = torch.autograd.grad(y, (x, layer.cola_a, layer.cola_b), grad_y)
    expected = ((grad_u @ a.T).view_as(x), rows.T @ grad_u, z.T @ grad_rows)
    for gradient, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)


def test_all_seven_projections_are_low_rank() -> None:
    for layer in make_model().model.layers:
        kinds = Counter(type(module) for module in layer.modules())
        assert kinds[LowRankLinear] == 7
        assert kinds[torch.nn.Linear] == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation", ["low_rank_only", "both"])
@pytest.mark.parametrize("mode", ["layer", "cola_m"])
def test_checkpointing_is_bit_equal(mode: Any, activation: str, autocast: bool) -> None:
    plain, other = make_model(activation), make_model(activation)
    set_activation_checkpointing(other, mode)
    loss, other_loss = loss_of(plain, autocast=autocast), loss_of(other, autocast=autocast)
    assert torch.equal(loss, other_loss)
    loss.backward()
    other_loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


def test_mixed_dense_and_low_rank_layers_are_bit_equal() -> None:
    ranks = [0, {"q_proj": 5, "down_proj": 7}, 6]
    plain, other = make_model(ranks=ranks), make_model(ranks=ranks)
    set_activation_checkpointing(other, "cola_m")
    loss_of(plain).backward()
    loss_of(other).backward()
    for mine, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


class Recorder(TorchDispatchMode):
    """Counts products by the shape of their right side, and follows every new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products["mm", tuple(args[1].shape)] += 1
        elif func is torch.ops.samara.low_rank_down.default:
            self.products["down", tuple(args[1].shape)] += 1
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return out

    def living_bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def test_cola_m_recomputes_five_products_with_b_and_none_with_a() -> None:
    counts = {}
    for mode in ("none", "cola_m"):
        model = make_model()
        set_activation_checkpointing(model, mode)
        loss = loss_of(model)
        with Recorder() as recorder:
            loss.backward()
        counts[mode] = recorder.products
    repeated = counts["cola_m"] - counts["none"]
    assert not any(kind == "down" for kind, _ in repeated)
    expected: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for layer in make_model().model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        # B of q, k, v, gate, up; not of o and down, whose outputs no gradient needs
        for projection in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            ffn.gate_proj,
            ffn.up_proj,
        ):
            expected["mm", tuple(projection.cola_b.shape)] += 1
    assert repeated == expected
    assert repeated.total() == 5 * LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cola_m_keeps_2d_plus_7r(dtype: torch.dtype) -> None:
    """Everything alive after forward, to the byte: per token and layer 2d + 7r numbers."""
    model = make_model().to(dtype)
    set_activation_checkpointing(model, "cola_m")
    ids, _ = batch()
    with Recorder() as recorder:
        hidden = model.model(ids).last_hidden_state
    living = recorder.living_bytes()
    tokens, size = BATCH * LENGTH, dtype.itemsize
    rotary = 2 * LENGTH * 16 * 4  # shared by all layers
    last = tokens * HIDDEN * size  # the stream that leaves the last layer
    # The final norm outside the layers: its result before and after the weight, one scale a row;
    # in bfloat16 the first is rounded and it keeps its input (counted as `last`) for backward.
    norm = tokens * (2 * HIDDEN * size + 4)
    per_layer = tokens * (2 * HIDDEN + 7 * RANK) * size
    last_unless_kept = last if dtype == torch.bfloat16 else 0
    assert hidden.dtype == dtype
    assert living == LAYERS * per_layer + rotary + norm + last_unless_kept


def test_cola_m_in_autocast_keeps_float32_streams_and_bfloat16_pre_activations() -> None:
    model = make_model()
    set_activation_checkpointing(model, "cola_m")
    ids, _ = batch()
    recorder = Recorder()
    with torch.autocast("cpu", torch.bfloat16), recorder:
        hidden = model.model(ids).last_hidden_state
    tokens = BATCH * LENGTH
    per_layer = tokens * (2 * HIDDEN * 4 + 7 * RANK * 2)
    fixed = 2 * LENGTH * 16 * 4 + tokens * (2 * HIDDEN * 4 + 4)
    assert hidden.dtype == torch.float32
    assert recorder.living_bytes() == LAYERS * per_layer + fixed


def test_layer_checkpointing_keeps_d() -> None:
    model = make_model()
    set_activation_checkpointing(model, "layer")
    ids, _ = batch()
    with Recorder() as recorder:
        hidden = model.model(ids).last_hidden_state
    tokens = BATCH * LENGTH
    fixed = 2 * LENGTH * 16 * 4 + tokens * (2 * HIDDEN * 4 + 4)
    assert hidden.requires_grad
    assert recorder.living_bytes() == LAYERS * tokens * HIDDEN * 4 + fixed


@pytest.mark.parametrize("mode", ["none", "cola_m"])
def test_flop_formula_of_the_paper(mode: Any) -> None:
    """48 n d r + 18 n r (d + d_ff) a layer, forward and backward, attention apart.

    CoLA-M adds the five products with B: 2 n r (3 d + 2 d_ff).
    """
    model = make_model(
        num_query_heads=[3] * LAYERS, num_kv_heads=[3] * LAYERS, ffn_dims=[80] * LAYERS
    )
    set_activation_checkpointing(model, mode)
    with FlopCounterMode(display=False) as counter:
        model.model(batch()[0]).last_hidden_state.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    n = BATCH * LENGTH
    expected = LAYERS * (48 * n * HIDDEN * RANK + 18 * n * RANK * (HIDDEN + 80))
    if mode == "cola_m":
        expected += LAYERS * 2 * n * RANK * (3 * HIDDEN + 2 * 80)
    names = ("aten.mm", "samara.low_rank_down")
    assert sum(flops for name, flops in counted.items() if str(name) in names) == expected


def test_no_grad_checkpoints_nothing() -> None:
    model = make_model()
    set_activation_checkpointing(model, "cola_m")
    with torch.no_grad():
        assert not loss_of(model).requires_grad


def test_dense_model_refuses_cola_m() -> None:
    with pytest.raises(ConfigError, match="cola_m needs a model with low-rank projections"):
        set_activation_checkpointing(make_model(ranks=None), "cola_m")


def test_hugging_face_switch() -> None:
    model = make_model()
    modes = lambda: [layer.activation_checkpointing for layer in model.model.layers]  # noqa: E731
    model.gradient_checkpointing_enable()
    assert modes() == ["layer"] * 3
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert modes() == ["layer", "none", "layer"]
    model.gradient_checkpointing_disable()
    assert modes() == ["none"] * 3
    assert not model.is_gradient_checkpointing
