"""Ages of moments: no first update of a new entry beyond lr, and the old ones as they were."""

from __future__ import annotations

import pytest
import torch

from samara.growth.axes import TensorRule, extended, tiled
from samara.growth.moments import first_update, grow_optimizer, highest_safe_age, restate
from samara.growth.operator_config import OperatorConfig
from samara.growth.parameters import GrownParameter

GRADIENTS = [1e-12, 1e-3, 1.0, 1e6]


def update_of(state, gradient, *, betas, lr=1e-3):
    """What torch's own AdamW does with one gradient, over lr."""
    parameter = torch.zeros_like(state["exp_avg"], requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=0.0, weight_decay=0.0)
    optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach() / lr


def aged(moment: float, variance: float, *, step: int, size: int = 4):
    return {
        "exp_avg": torch.full((size,), moment, dtype=torch.float64),
        "exp_avg_sq": torch.full((size,), variance, dtype=torch.float64),
        "step": torch.tensor(float(step)),
    }


def test_the_bound_is_the_one_of_the_reference_table():
    assert first_update(0, (0.9, 0.999)) == pytest.approx(1.0)
    assert first_update(10**6, (0.9, 0.999)) == pytest.approx(3.162, abs=1e-3)
    assert first_update(10**6, (0.9, 0.95)) == pytest.approx(0.447, abs=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.8, 0.99), (0.0, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("age", [0, 1, 7, 100, 1000, 50_000])
def test_no_gradient_moves_a_zero_entry_beyond_lr(betas, age):
    safe = highest_safe_age(age, betas)
    assert 0 <= safe <= age
    zero = aged(0.0, 0.0, step=safe, size=len(GRADIENTS))
    moved = update_of(zero, torch.tensor(GRADIENTS, dtype=torch.float64), betas=betas)
    assert (moved.abs() <= 1 + 1e-6).all()


def test_the_age_is_kept_where_it_does_no_harm():
    assert highest_safe_age(50_000, (0.9, 0.95)) == 50_000
    assert highest_safe_age(50, (0.9, 0.999)) == 50
    assert highest_safe_age(50_000, (0.9, 0.999)) == 104


def test_a_kept_age_would_move_a_zero_entry_by_three_times_lr():
    moved = update_of(aged(0.0, 0.0, step=50_000), torch.ones(4).double(), betas=(0.9, 0.999))
    assert moved.abs().max().item() == pytest.approx(3.162, abs=1e-3)


def test_an_age_of_zero_would_break_the_bias_correction_of_copied_moments():
    moved = update_of(aged(0.1, 1.0, step=0), torch.full((4,), 0.1).double(), betas=(0.9, 0.999))
    assert moved.abs().max().item() == pytest.approx(0.032, abs=1e-3)


def test_restated_moments_move_old_entries_as_before():
    betas = (0.9, 0.999)
    old = aged(0.1, 1.0, step=20_000)
    young = restate(old, betas=betas)
    assert young["step"].item() == 104
    gradient = torch.full((4,), 0.1, dtype=torch.float64)
    before, after = (update_of(state, gradient, betas=betas) for state in (old, young))
    torch.testing.assert_close(before, torch.full_like(before, -0.1), rtol=1e-3, atol=0)
    torch.testing.assert_close(after, before, rtol=6e-3, atol=0)


RULE = TensorRule(outputs=extended(2, 3))
DUPLICATES = TensorRule(outputs=tiled(2, 4))
STATE = {
    "w.exp_avg": torch.tensor([0.1, 0.2]),
    "w.exp_avg_sq": torch.tensor([1.0, 4.0]),
    "w.step": torch.tensor(5000.0),
}


def grown(rule, *, moments="map", betas=(0.9, 0.999), state=STATE, **layer):
    parameter = GrownParameter(name="w2", sources=("w",), rule=rule, **layer)
    operator = OperatorConfig(moments=moments)
    return grow_optimizer([parameter], state, operator=operator, betas=betas)


def test_a_tensor_with_new_entries_is_given_a_safe_age():
    state = grown(RULE)
    assert state["w2.step"].item() == 104
    assert state["w2.exp_avg"][2] == state["w2.exp_avg_sq"][2] == 0
    torch.testing.assert_close(state["w2.exp_avg"][:2], STATE["w.exp_avg"], rtol=1e-4, atol=0)
    bias_corrected = state["w2.exp_avg_sq"][:2] / (1 - 0.999**104) * (1 - 0.999**5000)
    torch.testing.assert_close(bias_corrected, STATE["w.exp_avg_sq"])
    assert grown(RULE, betas=(0.9, 0.95))["w2.step"].item() == 5000


def test_policies_on_copies():
    mapped, copied = grown(DUPLICATES), grown(DUPLICATES, moments="copy")
    torch.testing.assert_close(mapped["w2.exp_avg"], torch.tensor([0.05, 0.1, 0.05, 0.1]))
    torch.testing.assert_close(mapped["w2.exp_avg_sq"], torch.tensor([0.25, 1, 0.25, 1]))
    assert copied["w2.exp_avg"].tolist() == pytest.approx([0.1, 0.2, 0.1, 0.2])
    assert copied["w2.exp_avg_sq"].tolist() == [1, 4, 1, 4]
    assert mapped["w2.step"].item() == copied["w2.step"].item() == 5000
    fresh = grown(DUPLICATES, moments="zero")
    assert (fresh["w2.exp_avg"][2:] == 0).all()
    assert (fresh["w2.exp_avg"][:2] > 0).all()
    assert fresh["w2.step"].item() == 104
    assert grown(DUPLICATES, moments="reset") == {}


def test_new_layers_start_afresh_where_no_moments_are_theirs():
    assert grown(None) == {}
    assert grown(DUPLICATES, is_new=True, has_zero_output=True) == {}
    assert grown(DUPLICATES, is_new=True, moments="zero") == {}
    assert grown(DUPLICATES, is_new=True).keys() == {"w2.exp_avg", "w2.exp_avg_sq", "w2.step"}
    assert grown(DUPLICATES, state={}) == {}


def test_a_mean_of_layers_has_the_mean_of_their_moments():
    state = {**STATE, "v.exp_avg": torch.tensor([0.3, 0.4]), "v.exp_avg_sq": torch.tensor([3.0, 4])}
    state["v.step"] = torch.tensor(5000.0)
    parameter = GrownParameter(
        name="w2", sources=("w", "v"), rule=TensorRule(outputs=extended(2, 2)), is_new=True
    )
    result = grow_optimizer([parameter], state, operator=OperatorConfig(), betas=(0.9, 0.999))
    torch.testing.assert_close(result["w2.exp_avg"], torch.tensor([0.2, 0.3]))
    assert result["w2.exp_avg_sq"].tolist() == [2, 4]
    assert result["w2.step"].item() == 5000


def test_muon_keeps_a_momentum_and_no_age():
    state = {"w.momentum_buffer": torch.tensor([[1.0], [2.0]])}
    rule = TensorRule(outputs=tiled(2, 4), inputs=tiled(1, 1))
    result = grown(rule, state=state)
    assert result["w2.momentum_buffer"].tolist() == [[0.5], [1], [0.5], [1]]
