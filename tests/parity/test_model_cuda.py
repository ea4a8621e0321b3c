"""The CUDA path: FlexAttention on packed rows, CoLA-M, torch.compile. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy, per_token_nll
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import (
    SamaraForCausalLM,
    SamaraPreTrainedModel,
    set_activation_checkpointing,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB = 512
# Documents end inside blocks of 128, on their edges, and span several; 700 is no multiple of 128.
DOCUMENTS = ((256, 1, 300, 143), (700,), (128, 128, 444), (5,) * 140)


def make_model(*, low_rank: bool, dtype: torch.dtype = torch.float32) -> SamaraForCausalLM:
    return SamaraForCausalLM(make_config(low_rank=low_rank)).to("cuda", dtype)


def make_config(*, low_rank: bool, attention: str = "causal") -> SamaraConfig:
    torch.manual_seed(0)
    return SamaraConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=2,
        head_dim=64,
        num_query_heads=[3, 6],
        num_kv_heads=[1, 2],
        ffn_dims=[256, 512],
        ranks=[64, 64] if low_rank else None,
        attention=attention,
    )


def packed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (len(DOCUMENTS), 701), generator=generator)
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS]
    return tokens[:, :-1].cuda(), tokens[:, 1:].cuda(), torch.stack(positions).cuda()


def loss_and_gradients(
    model: SamaraForCausalLM, *, autocast: bool, forward: Any = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, targets, positions = packed_batch()
    run = model.model if forward is None else forward
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        hidden = run(input_ids=ids, position_ids=positions).last_hidden_state
        result = linear_cross_entropy(hidden, model.lm_head.weight, targets, z_loss=1e-4)
    loss = result.loss_sum / result.num_targets
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("low_rank", [False, True])
def test_packed_rows_equal_separate_documents(low_rank: bool) -> None:
    model = make_model(low_rank=low_rank)
    ids, targets, positions = packed_batch()
    with torch.no_grad():
        hidden = model.model(input_ids=ids, position_ids=positions).last_hidden_state
        packed = per_token_nll(hidden, model.lm_head.weight, targets)
        for row, lengths in enumerate(DOCUMENTS[:3]):
            start = 0
            for length in lengths:
                span = slice(start, start + length)
                alone = model.model(input_ids=ids[row : row + 1, span]).last_hidden_state
                nll = per_token_nll(alone, model.lm_head.weight, targets[row : row + 1, span])
                torch.testing.assert_close(packed[row : row + 1, span], nll, atol=1e-3, rtol=1e-3)
                start += length


def test_flex_gradients_equal_the_masked_formula() -> None:
    """FlexAttention in float32 against float64, which takes SDPA with an explicit mask."""
    loss, gradients = loss_and_gradients(make_model(low_rank=True), autocast=False)
    exact, expected = loss_and_gradients(make_model(low_rank=True).double(), autocast=False)
    assert abs(loss.item() - exact.item()) < 1e-4
    for name, gradient in gradients.items():
        assert relative(gradient.double(), expected[name]) < 5e-3, name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["layer", "cola_m"])
def test_checkpointing_changes_no_gradient(mode: str, autocast: bool) -> None:
    model = make_model(low_rank=True)
    loss, gradients = loss_and_gradients(model, autocast=autocast)
    again, _ = loss_and_gradients(model, autocast=autocast)
    assert torch.equal(loss, again)
    set_activation_checkpointing(model, mode)
    other_loss, other = loss_and_gradients(model, autocast=autocast)
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        # Atomic additions inside kernels may reorder sums from run to run.
        assert relative(other[name], gradient) < 1e-5, name


@pytest.mark.parametrize("mode", ["none", "layer", "cola_m"])
def test_compiled_model_agrees(mode: str) -> None:
    model = make_model(low_rank=True)
    loss, gradients = loss_and_gradients(model, autocast=True)
    set_activation_checkpointing(model, mode)
    compiled = torch.compile(model.model, dynamic=False)
    other_loss, other = loss_and_gradients(model, autocast=True, forward=compiled)
    assert abs(loss.item() - other_loss.item()) < 2e-2
    for name, gradient in gradients.items():
        assert relative(other[name], gradient) < 5e-2, name


@pytest.mark.parametrize("attention", ["bidirectional", "prefix"])
def test_other_rules_by_flex_equal_the_masked_formula(attention: str) -> None:
    """Values and gradients in float32 against float64, which takes SDPA with an explicit mask."""
    ids, _, positions = packed_batch()
    options = {"position_ids": positions}
    if attention == "prefix":
        options["prefix_length"] = torch.tensor([300, 129, 0, 700], device="cuda")
    results = []
    for dtype in (torch.float32, torch.float64):
        model: SamaraPreTrainedModel
        if attention == "prefix":
            model = SamaraForCausalLM(make_config(low_rank=True))
        else:
            model = SamaraForMaskedLM(make_config(low_rank=True, attention=attention))
        model.to("cuda", dtype)
        hidden = model.model(input_ids=ids, **options).last_hidden_state
        hidden.square().mean().backward()
        gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach().double(), gradients))
    (hidden, gradients), (exact, expected) = results
    assert relative(hidden, exact) < 1e-3
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 5e-3, name


def test_generation_with_static_cache() -> None:
    model = make_model(low_rank=False).eval()
    ids = packed_batch()[0][:2, :9]
    dynamic = model.generate(ids, max_new_tokens=6, do_sample=False)
    static = model.generate(
        ids, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(dynamic, static)
