"""The gradient of selected entries is autograd's, whatever the module, the support and the path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.sparse import gradients
from samara.sparse.attach import Attachment, input_dim, linear_weights
from samara.sparse.support import Support, TensorSupport, whole
from samara.sparse.units import Units

KINDS = ("llama", "qwen2_tied", "gpt2", "bert", "roberta", "deberta", "samara", "samara_cola")
GRANULARITIES = ("element", "block4", "block16", "column", "row")


def reference(model, objective, batch, names):
    """Dense gradients by plain autograd."""
    model.requires_grad_(True)
    model.zero_grad()
    objective(model, batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if name in names}
    model.zero_grad()
    return found


def sparse(model, objective, batch, support, path="auto", repeats=1):
    with Attachment(model, support, gradient_path=path) as attachment:
        for _ in range(repeats):
            objective(model, batch).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        return {n: e.values.grad for n, e in attachment.selected.items()}, dict(attachment.plans)


def random_units(shape, facing, granularity, *, share=0.3, seed=0):
    units = Units(shape=shape, granularity=granularity, input_dim=facing)
    number = units.scores(torch.rand(shape)).numel()
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(number, generator=generator)[: max(1, int(share * number))]
    index = units.entries(kept.sort().values)
    return TensorSupport(shape=shape, index=index, block=units.block)


def compare(found, dense, support):
    for name, tensor in support.tensors.items():
        expected = dense[name].flatten()[tensor.index]
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_of_every_model_in_every_granularity(models, kind, granularity):
    model, objective, batch = models.build(kind), models.objective(kind), models.batch(kind)
    linear = linear_weights(model)
    support = Support(
        tensors={
            name: random_units(
                tuple(getattr(use.module, use.attribute).shape), input_dim(use), granularity
            )
            for name, use in linear.items()
        }
    )
    dense = reference(model, objective, batch, set(linear))
    for path in ("auto", "dense"):
        found, plans = sparse(model, objective, batch, support, path)
        assert (len(plans) == len(linear)) == (path == "auto")
        compare({n: g for n, g in found.items() if g is not None}, dense, support)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "bert", "roberta"])
def test_embeddings_heads_biases_and_norms(models, kind):
    model, objective, batch = models.build(kind), models.objective(kind), models.batch(kind)
    batch["input_ids"][0, 2] = 1  # RoBERTa's padding, which gets no gradient
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    dense = reference(model, objective, batch, set(names))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in names.items():
        number = torch.Size(shape).numel()
        index = torch.randperm(number, generator=generator)[: max(1, number // 3)].sort().values
        tensors[name] = TensorSupport(shape=shape, index=index)
    support = Support(tensors=tensors)
    found, _ = sparse(model, objective, batch, support)
    compare(found, dense, support)


def test_an_embedding_is_tapped_and_a_tied_one_takes_the_dense_path(models):
    for kind, name, tapped in (
        ("llama", "model.embed_tokens.weight", True),
        ("qwen2_tied", "model.embed_tokens.weight", False),
    ):
        model, objective, batch = models.build(kind), models.objective(kind), models.batch(kind)
        support = Support(tensors={name: whole(tuple(model.get_parameter(name).shape))})
        dense = reference(model, objective, batch, {name})
        found, plans = sparse(model, objective, batch, support)
        assert (name in plans) == tapped
        compare(found, dense, support)


def test_a_tied_weight_that_two_modules_call_gets_the_sum(models):
    model, objective, batch = models.build("bert"), models.objective("bert"), models.batch("bert")
    first, second = model.bert.encoder.layer
    second.attention.self.value.weight = first.attention.self.value.weight
    name = "bert.encoder.layer.0.attention.self.value.weight"
    support = Support(tensors={name: random_units((16, 16), 1, "element")})
    dense = reference(model, objective, batch, {name})
    found, _ = sparse(model, objective, batch, support)
    compare(found, dense, support)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    tokens=st.integers(1, 6),
    granularity=st.sampled_from(GRANULARITIES),
    facing=st.integers(0, 1),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
)
def test_a_tap_gives_autograds_gradient(shape, tokens, granularity, facing, share, seed):
    rows, columns = (8 * size - (seed % 2) for size in shape)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, requires_grad=True)
    inputs = (rows, columns)[facing]
    x = torch.randn(2, tokens, inputs, generator=generator, requires_grad=True)
    y = x @ (weight.T if facing else weight)
    outer = torch.randn(y.shape, generator=generator)
    dense, dx = torch.autograd.grad((y * outer).sum(), (weight, x), retain_graph=True)
    support = random_units((rows, columns), facing, granularity, share=share, seed=seed)
    plan = gradients.make_plan(support, input_dim=facing, positions=support.index.int())
    values = weight.detach().flatten()[support.index].requires_grad_(True)
    frozen = weight.detach()
    tapped = gradients.tap(x @ (frozen.T if facing else frozen), x, values, plan)
    assert torch.equal(tapped, y)
    found, found_dx = torch.autograd.grad((tapped * outer).sum(), (values, x))
    torch.testing.assert_close(found, dense.flatten()[support.index], rtol=1e-5, atol=1e-5)
    assert torch.equal(found_dx, dx)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 7])
@pytest.mark.parametrize("facing", [0, 1])
def test_tiles_agree_with_the_whole_product(monkeypatch, num_tiles, facing):
    monkeypatch.setattr(gradients, "WORKSPACE_BYTES", 4 * 6 * (7 // num_tiles))
    support = random_units((7, 6), facing, "element", share=0.9)
    plan = gradients.make_plan(support, input_dim=facing, positions=support.index.int())
    left, right = torch.randn(5, 7), torch.randn(5, 6)
    found = gradients.selected_entries(
        left, right, plan.index, plan.bounds, plan.tile_rows, plan.width, support.index.numel()
    )
    expected = (left.T @ right).flatten()[support.index]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_whole_columns_are_one_product_without_positions(models):
    support = random_units((12, 8), 1, "column", share=0.5)
    plan = gradients.make_plan(support, input_dim=1, positions=support.index.int())
    assert plan.inputs is not None
    assert plan.inputs.numel() == 4
    assert plan.index.numel() == 0
    assert plan.outputs is None


def test_the_input_slice_is_all_that_is_kept(models):
    model, batch = models.build("llama"), models.batch("llama", rows=3, length=11)
    name = "model.layers.1.mlp.down_proj.weight"
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    for granularity, width in (("column", 6), ("element", 20)):
        kept.clear()
        support = Support(tensors={name: random_units((16, 20), 1, granularity)})
        with (
            Attachment(model, support),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            models.objective("llama")(model, batch)
        assert kept[0] == (3, 11, width)


def test_layers_that_read_the_same_input_share_the_slice(models):
    model, batch = models.build("llama"), models.batch("llama")
    layer = "model.layers.1.self_attn."
    tensors = {
        f"{layer}{n}_proj.weight": TensorSupport(
            shape=(width, 16), index=torch.arange(0, width * 16, 16) + 3
        )
        for n, width in (("q", 16), ("k", 8), ("v", 8))
    }
    dense = reference(model, models.objective("llama"), batch, set(tensors))
    kept = {}

    def pack(tensor):
        if tensor.shape[-1] == 1 and tensor.shape[0] == 2:
            kept[tensor.data_ptr()] = kept.get(tensor.data_ptr(), 0) + 1
        return tensor

    support = Support(tensors=tensors)
    with (
        Attachment(model, support) as attachment,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        for _ in range(2):
            models.objective("llama")(model, batch).loss.backward()
        found = {n: e.values.grad / 2 for n, e in attachment.selected.items()}
    assert max(kept.values()) >= 3
    compare(found, dense, support)


def test_nothing_is_kept_below_the_lowest_selected_layer(models):
    model, batch = models.build("llama"), models.batch("llama")
    graphs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _a, output: graphs.append(output.requires_grad))
    name = "model.layers.1.mlp.up_proj.weight"
    with Attachment(model, Support(tensors={name: whole((20, 16))})):
        models.objective("llama")(model, batch)
    assert graphs == [False, True]


def test_micro_batches_accumulate_like_one_batch(models):
    model, batch = models.build("llama"), models.batch("llama", rows=8)
    names = list(linear_weights(model))
    shapes = {n: tuple(model.get_parameter(n).shape) for n in names}
    support = Support(tensors={n: random_units(s, 1, "element") for n, s in shapes.items()})
    objective = models.objective("llama")
    at_once, _ = sparse(model, objective, batch, support)
    with Attachment(model, support) as attachment:
        for row in range(8):
            objective(model, {k: t[row : row + 1] for k, t in batch.items()}).loss.backward()
        for name, entry in attachment.selected.items():
            torch.testing.assert_close(entry.values.grad, at_once[name], rtol=1e-5, atol=1e-6)


def test_double_precision_by_gradcheck():
    torch.manual_seed(0)
    weight = torch.randn(5, 6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    for granularity in ("element", "column", "row"):
        support = random_units((5, 6), 1, granularity, share=0.5)
        plan = gradients.make_plan(support, input_dim=1, positions=support.index.int())

        def layer(values, x, support=support, plan=plan):
            with torch.no_grad():
                current = weight.flatten().index_copy(0, support.index, values).view(5, 6)
            return gradients.tap(x @ current.T, x, values, plan)

        values = weight.flatten()[support.index].clone().requires_grad_(True)
        assert torch.autograd.gradcheck(layer, (values, x.clone().requires_grad_(True)))
