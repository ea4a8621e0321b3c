"""Chunked cross-entropy against plain PyTorch, in float64 and under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from samara.model import cross_entropy
from samara.model.cross_entropy import linear_cross_entropy, per_token_nll

B, T, D, V = 2, 13, 6, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a chunk: 26 rows make six chunks, the last one short."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 5 * V)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, :4] = -100
    targets[1, -6:] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).flatten(0, 1)
    nll = functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    log_z = torch.logsumexp(logits, dim=-1)
    return nll, (log_z.square() * (targets.flatten() != -100)).sum()


@pytest.mark.parametrize(("scale", "z_loss"), [(1.0, 0.0), (0.3, 1e-2), (-2.0, 2.0)])
def test_values_and_gradients(scale: float, z_loss: float) -> None:
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    nll, z = plain(hidden, weight, targets)
    torch.testing.assert_close(result.nll_sum, nll, rtol=1e-12, atol=1e-12)
    if z_loss:
        torch.testing.assert_close(result.z_sum, z, rtol=1e-12, atol=1e-12)
    assert result.num_targets.item() == B * T - 10
    loss, expected = scale * result.loss_sum, scale * (nll + z_loss * z)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_without_z_loss_its_sum_is_zero() -> None:
    assert linear_cross_entropy(*inputs()).z_sum.item() == 0.0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_frozen(frozen: str) -> None:
    hidden, weight, targets = inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).loss_sum.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_backward_twice_gives_the_same_gradient() -> None:
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    loss = result.loss_sum
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_backward_frees_the_gradients_it_used() -> None:
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, targets)
    result.loss_sum.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.loss_sum.backward()


def test_the_parts_of_the_loss_are_for_reading_only() -> None:
    result = linear_cross_entropy(*inputs(), z_loss=0.1)
    assert result.loss_sum.requires_grad
    assert not result.nll_sum.requires_grad
    assert not result.z_sum.requires_grad


def test_all_targets_ignored() -> None:
    hidden, weight, targets = inputs()
    result = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), z_loss=1.0)
    assert result.nll_sum.item() == result.z_sum.item() == result.num_targets.item() == 0
    result.loss_sum.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(torch.float32)
    result = linear_cross_entropy(hidden * 1e4, weight, targets)
    result.loss_sum.backward()
    assert torch.isfinite(result.nll_sum)
    assert torch.isfinite(hidden.grad).all()


def test_autocast_rounds_the_products_only() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_cross_entropy(hidden, weight, targets, z_loss=0.1)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float().flatten(0, 1)
    nll = functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    assert result.nll_sum.dtype == torch.float32
    torch.testing.assert_close(result.nll_sum, nll, rtol=1e-6, atol=1e-5)
    result.loss_sum.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact_hidden, exact_weight, _ = inputs()
    nll, z = plain(exact_hidden, exact_weight, targets)
    (nll + 0.1 * z).backward()
    assert (hidden.grad - exact_hidden.grad).norm() < 0.02 * exact_hidden.grad.norm()
    assert (weight.grad - exact_weight.grad).norm() < 0.02 * exact_weight.grad.norm()


def test_half_precision_model_gets_gradients_of_its_dtype() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets).loss_sum.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_logits_are_never_whole() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)
            )
            return out

    hidden, weight, targets = inputs()
    with Watch():
        linear_cross_entropy(hidden, weight, targets, z_loss=0.1).loss_sum.backward()
    assert max(sizes) <= max(5 * V, B * T * D)


@pytest.mark.parametrize("autocast", [False, True])
def test_per_token_nll(autocast: bool) -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll = per_token_nll(hidden, weight, targets)
        total = linear_cross_entropy(hidden, weight, targets).nll_sum
    assert nll.shape == targets.shape
    assert nll.dtype == torch.float32
    assert not nll.requires_grad
    assert not nll[targets == -100].any()
    torch.testing.assert_close(nll.sum(), total.detach())


def test_per_token_nll_of_nothing() -> None:
    assert per_token_nll(
        torch.zeros(0, 3, D), torch.zeros(V, D), torch.zeros(0, 3).long()
    ).shape == (0, 3)
