"""Every path to the selected gradient is autograd's, on every device; what each of them keeps."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from samara.sparse import gradients
from samara.sparse.attach import Attachment
from samara.sparse.gradients import KeptInput, make_plan, tap
from samara.sparse.support import Support, TensorSupport
from samara.sparse.units import Units

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
ROWS, COLUMNS, TOKENS = 48, 80, 37
EVERYTHING = dict.fromkeys(gradients.DOTS_SHARE, 1.0)


def support_of(granularity, facing=1, *, share=0.1):
    """A support; ``two_level``: single entries in a quarter of the columns."""
    shape, generator = (ROWS, COLUMNS), torch.Generator().manual_seed(0)
    if granularity == "two_level":
        width = shape[facing]
        inside = torch.zeros(shape, dtype=torch.bool)
        chosen = torch.randperm(width, generator=generator)[: width // 4]
        inside.index_fill_(facing, chosen, True)
        places = inside.flatten().nonzero().flatten()
        drawn = torch.randperm(places.numel(), generator=generator)[: int(share * inside.numel())]
        return TensorSupport(shape=shape, index=places[drawn].sort().values)
    units = Units(shape=shape, granularity=granularity, input_dim=facing)
    number = units.scores(torch.rand(shape)).numel()
    kept = torch.randperm(number, generator=generator)[: max(1, int(share * number))]
    return TensorSupport(shape=shape, index=units.entries(kept.sort().values), block=units.block)


def layer(support, facing, *, device, dtype):
    """A frozen linear map, its input and the gradient of its output."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, weight.shape[facing], generator=generator, dtype=torch.float64)
    outer = torch.randn(TOKENS, weight.shape[1 - facing], generator=generator, dtype=torch.float64)
    return tuple(t.to(device=device, dtype=dtype) for t in (weight, x, outer))


def gradient_of(support, facing, *, device, dtype):
    """The selected gradient by a tap, and the plan that gave it."""
    weight, x, outer = layer(support, facing, device=device, dtype=dtype)
    index = support.index.to(device=device, dtype=torch.int32)
    plan = make_plan(support, input_dim=facing, positions=index)
    exact = torch.promote_types(dtype, torch.float32)
    values = weight.flatten().index_select(0, index).to(exact).requires_grad_(True)
    output = tap(x @ (weight.T if facing else weight), x, values, plan)
    (grad,) = torch.autograd.grad((output * outer).sum(), values)
    return grad.cpu(), plan


def autograd_of(support, facing, *, device, dtype):
    weight, x, outer = layer(support, facing, device=device, dtype=dtype)
    weight.requires_grad_(True)
    (grad,) = torch.autograd.grad(((x @ (weight.T if facing else weight)) * outer).sum(), weight)
    return grad.flatten().cpu()[support.index]


GRANULARITIES = ("element", "two_level", "column", "row", "block4", "block16")


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("facing", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_path_gives_autograds_gradient(
    monkeypatch, device, granularity, facing, dots, alignment
):
    monkeypatch.setattr(gradients, "DOTS_SHARE", EVERYTHING if dots else {})
    monkeypatch.setattr(gradients, "ALIGNMENT", {"cpu": alignment, "cuda": alignment})
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 4 * 9 * COLUMNS if not dots else 2**20)
    support = support_of(granularity, facing)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found, plan = gradient_of(support, facing, device=device, dtype=dtype)
        expected = autograd_of(support, facing, device=device, dtype=dtype)
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)
        for taken in (plan.inputs, plan.outputs):
            assert taken is None or taken.numel() % alignment == 0


@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_no_further_from_the_truth_than_autograd(
    monkeypatch, device, granularity, dots
):
    monkeypatch.setattr(gradients, "DOTS_SHARE", EVERYTHING if dots else {})
    support = support_of(granularity)
    rounded = [
        t.to(torch.bfloat16).double() for t in layer(support, 1, device="cpu", dtype=torch.float64)
    ]
    truth = (rounded[2].T @ rounded[1]).flatten()[support.index]
    found, _ = gradient_of(support, 1, device=device, dtype=torch.bfloat16)
    eager = autograd_of(support, 1, device=device, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    allowed = (eager.double() - truth).abs().max()
    assert (found.double() - truth).abs().max() <= 1.05 * allowed


def test_dots_are_taken_for_few_entries_on_a_cpu_and_counted():
    left, right = torch.randn(16, 200), torch.randn(16, 100)
    bounds = torch.tensor([0, 0])

    def flops(index):
        with FlopCounterMode(display=False) as counter:
            found = gradients.selected_entries(
                left, right, index, bounds.new_tensor([0, len(index)]), 200, 100, len(index)
            )
        expected = (left.T @ right).flatten()[index.long()]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return counter.get_total_flops()

    few, many = (torch.arange(0, 20000, step).int() for step in (200, 100))
    assert flops(few) == 2 * 16 * 100  # 0.5 % of the entries
    assert flops(many) == 2 * 16 * 200 * 100
    assert not gradients.takes_dots(left.bfloat16(), right.bfloat16(), few)
    assert not gradients.takes_dots(left.to("meta"), right.to("meta"), few)


def test_dots_keep_to_the_workspace(monkeypatch):
    left, right, few = torch.randn(16, 200), torch.randn(16, 100), torch.arange(9).int()
    assert gradients.takes_dots(left, right, few)
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 4 * 16 * 300 - 1)
    assert not gradients.takes_dots(left, right, few)


def test_small_blocks_take_the_whole_product_where_a_tile_costs_as_much(monkeypatch):
    support = support_of("block4", share=0.02)
    assert gradients.make_plan(support, input_dim=1, positions=support.index.int()).block == 4
    monkeypatch.setattr(gradients, "LEAST_TILE", {"cpu": 64})
    assert gradients.make_plan(support, input_dim=1, positions=support.index.int()).block == 1


@pytest.mark.parametrize(("height", "width", "tile"), [(4096, 8192, 4096), (4096, 14336, 2304)])
def test_tiles_begin_at_aligned_rows(height, width, tile):
    assert gradients._tile_rows(height, width) == tile


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_an_input_is_kept_once_in_the_dtype_of_the_product(device):
    kept, source = KeptInput(None), torch.randn(3, 5, device=device, requires_grad=True)
    assert kept.take(source).data_ptr() == source.data_ptr()
    with torch.autocast(device, dtype=torch.bfloat16):
        copy = kept.take(source)
        assert copy.dtype == torch.bfloat16
        assert kept.take(source) is copy
        assert kept.take(source + 0) is not copy
        assert kept.take(source.double()).dtype == torch.float64
    assert not copy.requires_grad


def test_a_slice_is_shared_while_backward_needs_it_and_no_longer():
    kept, source = KeptInput(torch.tensor([0, 2], dtype=torch.int32)), torch.randn(3, 5)
    saved = kept.take(source)
    assert kept.take(source) is saved
    assert torch.equal(saved, source[:, [0, 2]])
    del saved
    assert kept._copy() is None


def test_under_checkpointing_no_slice_outlives_its_layer(models):
    model, batch = models.build("llama"), models.batch("llama")
    names = [f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1)]
    support = Support(
        tensors={n: TensorSupport(shape=(16, 20), index=torch.arange(0, 320, 20)) for n in names}
    )
    objective = models.objective("llama")
    with Attachment(model, support) as attachment:
        objective(model, batch).loss.backward()
        plain = {name: e.values.grad.clone() for name, e in attachment.selected.items()}
        for entry in attachment.selected.values():
            entry.values.grad = None
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = objective(model, batch).loss
        (kept,) = attachment._kept.values()
        assert kept._copy() is None
        loss.backward()
        assert kept._copy() is None
        for name, entry in attachment.selected.items():
            torch.testing.assert_close(entry.values.grad, plain[name])


def test_a_tap_composes_with_checkpoint_of_torch():
    support = support_of("two_level")
    weight, x, outer = layer(support, 1, device="cpu", dtype=torch.float32)
    plan = make_plan(support, input_dim=1, positions=support.index.int())
    values = weight.flatten()[support.index].requires_grad_(True)
    kept = KeptInput(plan.inputs)

    def pass_through(x):
        return tap(x @ weight.T, x, values, plan, kept)

    output = checkpoint(pass_through, x, use_reentrant=False)
    (grad,) = torch.autograd.grad((output * outer).sum(), values)
    torch.testing.assert_close(grad, autograd_of(support, 1, device="cpu", dtype=torch.float32))
