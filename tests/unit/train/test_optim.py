from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from samara.errors import CheckpointError
from samara.model.modeling import SamaraForCausalLM
from samara.train.config import AdamW, Muon
from samara.train.optim import Optimizer, is_hidden_matrix

MakeModel = Callable[..., SamaraForCausalLM]

EMBEDDING = "model.embed_tokens.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
QUERY_NORM = "model.layers.0.self_attn.q_norm.weight"


def set_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def moved(model: nn.Module, step: Callable[[], None]) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def decays(make_model: MakeModel, config: AdamW | Muon, lr: float) -> dict[str, float]:
    """How much of each weight one step takes away when gradients are zero."""
    model = make_model(tie_word_embeddings=False)
    nn.init.ones_(model.lm_head.weight)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        nn.init.ones_(parameter)
    optimizer = Optimizer(model, config)
    optimizer.set_lr(lr)
    return {name: float(-d.mean()) for name, d in moved(model, optimizer.step).items()}


def test_matrices_decay_and_vectors_do_not(make_model: MakeModel) -> None:
    found = decays(make_model, AdamW(lr=1.0, weight_decay=0.1, decay="matrices"), lr=0.5)

    for name in (EMBEDDING, MATRIX, "lm_head.weight"):
        assert found[name] == pytest.approx(0.05, rel=1e-5)
    for name in (NORM, QUERY_NORM, "model.norm.weight"):
        assert found[name] == 0.0


def test_everything_decays_where_asked(make_model: MakeModel) -> None:
    found = decays(make_model, AdamW(lr=1.0, weight_decay=0.1, decay="all"), lr=0.5)

    assert list(found.values()) == pytest.approx([0.05] * len(found), rel=1e-5)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_muon_decays_by_lr_times_decay(make_model: MakeModel, adjust_lr: str) -> None:
    config = Muon(lr=0.5, weight_decay=0.1, adjust_lr=adjust_lr)

    found = decays(make_model, config, lr=0.5)

    for name in (EMBEDDING, MATRIX, "lm_head.weight"):
        assert found[name] == pytest.approx(0.05, rel=1e-5)
    assert found[NORM] == found[QUERY_NORM] == 0.0


@pytest.mark.parametrize("rank", [None, 4])
def test_muon_takes_hidden_matrices_only(make_model: MakeModel, rank: int | None) -> None:
    model = make_model(rank=rank, tie_word_embeddings=False)

    hidden = is_hidden_matrix(model)

    assert not hidden[EMBEDDING]
    assert not hidden["lm_head.weight"]
    assert not any(taken for name, taken in hidden.items() if "norm" in name)
    inside = [name for name in hidden if "_proj" in name]
    assert all(hidden[name] for name in inside)
    assert len(inside) == 2 * 7 * (2 if rank else 1)


def test_tied_head_is_no_hidden_matrix(make_model: MakeModel) -> None:
    hidden = is_hidden_matrix(make_model(tie_word_embeddings=True))

    assert not hidden[EMBEDDING]
    assert "lm_head.weight" not in hidden


def test_muon_state_shows_the_routing(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = Optimizer(model, Muon(lr=0.01))
    set_gradients(model)
    optimizer.step()

    state = optimizer.state_dict()

    assert {key for key in state if key.startswith(MATRIX)} == {f"{MATRIX}.momentum_buffer"}
    for name in (EMBEDDING, NORM):
        assert {key.removeprefix(name) for key in state if key.startswith(name)} == {
            ".exp_avg",
            ".exp_avg_sq",
            ".step",
        }


def test_adamw_equals_torch_run_by_hand(make_model: MakeModel) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = Optimizer(ours, AdamW(lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1))
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-8,
        fused=True,
    )
    for step in range(3):
        lr = 1e-2 / (step + 1)
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        optimizer.set_lr(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        optimizer.step()
        reference.step()

    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adamw_equals_the_formula(make_model: MakeModel) -> None:
    model = make_model(dtype=torch.float64)
    config = AdamW(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = Optimizer(model, config)
    weights = dict(model.named_parameters())[MATRIX]
    expected, m, v = weights.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        set_gradients(model, seed=step)
        g = weights.grad.clone()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * update
        optimizer.set_lr(1e-2)
        optimizer.step()

    torch.testing.assert_close(weights.detach(), expected, rtol=1e-12, atol=1e-14)


def test_muon_keeps_the_ratio_of_the_two_peaks(make_model: MakeModel) -> None:
    model = make_model()
    config = Muon(lr=0.02, adamw_lr=0.005, adamw_betas=(0.0, 0.0), weight_decay=0.0)
    optimizer = Optimizer(model, config)
    set_gradients(model)
    optimizer.set_lr(0.01)  # half of the peak

    change = moved(model, optimizer.step)

    # With betas of 0 AdamW moves every weight by its learning rate.
    assert change[NORM].abs().max() == pytest.approx(0.0025, rel=1e-4)
    assert change[EMBEDDING].abs().max() == pytest.approx(0.0025, rel=1e-4)


def muon_step_size(rows: int, columns: int, *, stored_in_out: bool, config: Muon) -> float:
    """Spectral size of one Muon step on a matrix, over the learning rate."""
    from samara.model.cola import LowRankLinear

    class OneMatrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if stored_in_out:
                self.inner = LowRankLinear(rows, 3, columns)
            else:
                self.inner = nn.Linear(columns, rows, bias=False)

        def get_output_embeddings(self) -> None:
            return None

    torch.manual_seed(0)
    model = OneMatrix()
    matrix = model.inner.cola_a if stored_in_out else model.inner.weight
    optimizer = Optimizer(model, config)
    set_gradients(model)
    optimizer.set_lr(0.1)
    before = matrix.detach().clone()
    optimizer.step()
    change = matrix.detach() - before
    # An orthogonal update has every singular value 1; Newton-Schulz gives 0.7 to 1.2.
    return float(torch.linalg.svdvals(change).mean()) / 0.1


@pytest.mark.parametrize("stored_in_out", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (16, 64)])
def test_muon_original_scales_by_out_over_in(rows: int, columns: int, stored_in_out: bool) -> None:
    config = Muon(lr=0.1, weight_decay=0.0, adjust_lr="original")
    fan_out, fan_in = (columns, rows) if stored_in_out else (rows, columns)

    found = muon_step_size(rows, columns, stored_in_out=stored_in_out, config=config)

    assert found == pytest.approx(math.sqrt(max(1.0, fan_out / fan_in)), rel=0.2)


@pytest.mark.parametrize("stored_in_out", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (16, 64)])
def test_muon_match_rms_depends_on_the_longer_side(
    rows: int, columns: int, stored_in_out: bool
) -> None:
    config = Muon(lr=0.1, weight_decay=0.0, adjust_lr="match_rms_adamw")

    found = muon_step_size(rows, columns, stored_in_out=stored_in_out, config=config)

    assert found == pytest.approx(0.2 * math.sqrt(64), rel=0.2)


@pytest.mark.parametrize("config", [AdamW(lr=0.01), Muon(lr=0.01)])
def test_state_by_name_continues_exactly(make_model: MakeModel, config: AdamW | Muon) -> None:
    straight, split = make_model(), make_model()
    optimizer, first = Optimizer(straight, config), Optimizer(split, config)
    for seed in range(2):
        for model, own in ((straight, optimizer), (split, first)):
            set_gradients(model, seed)
            own.step()
    second = Optimizer(split, config)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for model, own in ((straight, optimizer), (split, second)):
        set_gradients(model, seed=2)
        own.step()

    for a, b in zip(straight.parameters(), split.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loaded_state_is_a_copy(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = Optimizer(model, AdamW(lr=0.01))
    set_gradients(model)
    optimizer.step()
    saved = {k: v.clone() for k, v in optimizer.state_dict().items()}
    optimizer.load_state_dict(saved)
    kept = saved[f"{MATRIX}.exp_avg"].clone()
    optimizer.step()

    assert torch.equal(saved[f"{MATRIX}.exp_avg"], kept)


def test_a_parameter_without_state_starts_afresh(make_model: MakeModel) -> None:
    model = make_model()
    optimizer = Optimizer(model, AdamW(lr=0.01))
    set_gradients(model)
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state_dict().items() if not k.startswith(MATRIX)}

    optimizer.load_state_dict(state)

    assert optimizer.state_dict().keys() == state.keys()
    optimizer.step()
    assert optimizer.state_dict()[f"{MATRIX}.step"] == 1


def test_frozen_parameters_are_left_alone(make_model: MakeModel) -> None:
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = Optimizer(model, AdamW(lr=0.01, weight_decay=0.1))
    set_gradients(model)

    change = moved(model, optimizer.step)

    assert change[EMBEDDING].abs().max() == 0.0
    assert change[MATRIX].abs().max() > 0.0


def test_unknown_state_is_refused(make_model: MakeModel) -> None:
    optimizer = Optimizer(make_model(), AdamW(lr=0.01))

    with pytest.raises(CheckpointError, match=r"model.other.exp_avg belongs to no trainable"):
        optimizer.load_state_dict({"model.other.exp_avg": torch.zeros(2)})


def test_state_of_another_optimizer_is_refused(make_model: MakeModel) -> None:
    optimizer = Optimizer(make_model(), AdamW(lr=0.01))

    with pytest.raises(CheckpointError, match=r"of another optimizer; this one keeps step, exp"):
        optimizer.load_state_dict({f"{MATRIX}.momentum_buffer": torch.zeros(24, 16)})


def test_state_of_another_shape_is_refused(make_model: MakeModel) -> None:
    optimizer = Optimizer(make_model(), AdamW(lr=0.01))

    with pytest.raises(CheckpointError, match=r"shape \(2, 2\), the parameter \(24, 16\)"):
        optimizer.load_state_dict({f"{MATRIX}.exp_avg": torch.zeros(2, 2)})
