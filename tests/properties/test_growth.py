"""Whatever grows into whatever: the labels are true, names and moments fit, everything learns."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from samara.growth.axes import AxisMap, query_heads, tiled
from samara.growth.grow_state import Grown, grow
from samara.growth.operator_config import OperatorConfig
from samara.growth.parameters import grown_parameters
from samara.growth.plan import check_growth, copied_design, deeper_design, layer_widths
from samara.growth.state import GrowthState
from samara.measure.budget import budget
from samara.model.config import PROJECTIONS, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import named_weights
from samara.train.config import AdamW, Muon
from samara.train.optim import Optimizer

VOCAB = 11
BETAS = (0.9, 0.999)
checked = settings(max_examples=20, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """One growth to try."""

    source: ModelConfig
    target: ModelConfig
    operator: OperatorConfig


@st.composite
def designs(draw: st.DrawFn) -> ModelConfig:
    """Any small model: dense, low-rank or mixed; uniform or not; MHA, GQA, MQA; tied or not."""
    layers = draw(st.integers(1, 3))

    def per_layer(values: st.SearchStrategy[Any]) -> Any:
        return (
            tuple(draw(values) for _ in range(layers))
            if draw(st.booleans())
            else (draw(values),) * layers
        )

    kv_heads = per_layer(st.integers(1, 2))
    groups = per_layer(st.integers(1, 2))
    rank = st.integers(1, 3) | st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(1, 3))
    cola = None
    if draw(st.booleans()):
        activation = draw(st.sampled_from(["low_rank_only", "both"]))
        cola = {"rank": per_layer(rank), "activation": activation}
    return ModelConfig.model_validate(
        {
            "hidden_size": draw(st.sampled_from([4, 6])),
            "num_hidden_layers": layers,
            "head_dim": draw(st.sampled_from([2, 4])),
            "num_kv_heads": kv_heads,
            "num_query_heads": tuple(k * g for k, g in zip(kv_heads, groups, strict=True)),
            "ffn_dim": per_layer(st.integers(1, 4)),
            "cola": cola,
            "qk_norm": draw(st.booleans()),
            "tie_word_embeddings": draw(st.booleans()),
            "vocab_size": VOCAB,
        }
    ).expand()


@st.composite
def depths(draw: st.DrawFn, layers: int) -> tuple[dict[str, Any], int]:
    """A depth operator that fits, and the number of layers it gives."""
    kind = draw(
        st.sampled_from(
            "stack interpose block first last middle solar llama_pro random_top "
            "random_interleaved average map".split()
        )
    )
    more = draw(st.integers(0, 3))
    length = draw(st.integers(1, layers))
    match kind:
        case "block":
            start = draw(st.integers(0, layers - length))
            return {"kind": kind, "start": start, "length": length}, layers + length
        case "first" | "last":
            return {"kind": kind, "length": length}, layers + length
        case "middle" | "llama_pro":
            divisor = draw(st.sampled_from([n for n in range(1, layers + 1) if layers % n == 0]))
            given_length = {"length": divisor} if kind == "middle" else {}
            return {"kind": kind, **given_length}, layers + divisor
        case "solar":
            overlap = layers - 2 * draw(st.integers(0, (layers - 1) // 2))
            return {"kind": kind, "overlap": overlap}, layers + overlap
        case "map":
            entry = st.integers(0, layers - 1).map(str) | st.just("new")
            starred = st.tuples(entry, st.sampled_from(["", "*"])).map("".join)
            entries = draw(st.lists(starred, min_size=layers, max_size=layers + more))
            return {"kind": kind, "layers": entries}, len(entries)
        case _:
            return {"kind": kind}, layers + more


@st.composite
def cases(draw: st.DrawFn, *, widens: bool = True, **fixed: Any) -> Case:
    """A growth that is allowed."""
    source = draw(designs())
    depth, layers = draw(depths(source.num_hidden_layers))
    width = fixed.get("width") or draw(st.sampled_from(["duplicate", "zero_pad", "random"]))
    options = {
        "depth": depth,
        "new_layers": draw(st.sampled_from(["keep", "zero"])),
        "width": width,
        "noise": draw(st.sampled_from([0.0, 0.5])) if width == "duplicate" else 0.0,
        **fixed,
    }
    operator = OperatorConfig.model_validate(options)
    if operator.depth.kind == "average":
        widths = [layer_widths(source, layer) for layer in range(source.num_hidden_layers)]
        assume(all(w == widths[0] for w in widths))
    target = deeper_design(source, operator, num_hidden_layers=layers)
    if widens and draw(st.booleans()):
        target = draw(widened(target, width=width))
    return Case(source=source, target=target, operator=operator)


@st.composite
def widened(draw: st.DrawFn, design: ModelConfig, *, width: str) -> ModelConfig:
    """The design with some axes wider, each layer for itself."""
    layers = [layer_widths(design, layer) for layer in range(design.num_hidden_layers)]
    kv_heads = tuple(w.kv_heads + draw(st.integers(0, 2)) for w in layers)
    groups = tuple(w.group_size + draw(st.integers(0, 1)) for w in layers)
    d = design.hidden_size
    update: dict[str, Any] = {
        "hidden_size": draw(
            st.sampled_from([d, 2 * d, 3 * d] if width == "duplicate" else [d, d + 3])
        ),
        "num_kv_heads": kv_heads,
        "num_query_heads": tuple(k * g for k, g in zip(kv_heads, groups, strict=True)),
        "ffn_dim": tuple(w.ffn + draw(st.integers(0, 4)) for w in layers),
    }
    if design.cola is not None:
        more = draw(st.integers(0, 2))
        ranks = tuple({n: r + more for n, r in w.ranks.items() if r} for w in layers)
        update["cola"] = design.cola.model_copy(update={"rank": ranks})
    return design.model_copy(update=update)


def random_model(design: ModelConfig) -> SamaraForCausalLM:
    """A model whose every parameter, gains too, is anything."""
    torch.manual_seed(0)
    model = SamaraForCausalLM(SamaraConfig.from_design(design)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def model_of(state: GrowthState) -> SamaraForCausalLM:
    """Load strictly: the same names, the same shapes."""
    model = SamaraForCausalLM(SamaraConfig.from_design(state.design)).double()
    wanted = named_weights(model)
    assert wanted.keys() == state.weights.keys()
    with torch.no_grad():
        for name, weight in wanted.items():
            assert weight.shape == state.weights[name].shape, name
            weight.copy_(state.weights[name])
    return model


def state_of(model: SamaraForCausalLM, optimizer: Optimizer | None = None) -> GrowthState:
    return GrowthState(
        design=model.config.to_design(),
        weights={name: weight.detach() for name, weight in named_weights(model).items()},
        optimizer=None if optimizer is None else optimizer.state_dict(),
        betas=None if optimizer is None else BETAS,
    )


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (2, 6), generator=generator) for _ in range(count)]


def logits(model: SamaraForCausalLM) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(batches(1)[0]).logits
    return result


def gather_moments(model: SamaraForCausalLM, config: AdamW | Muon, *, steps: int = 3) -> Optimizer:
    """An optimizer that has seen the gradients of some batches and moved nothing."""
    optimizer = Optimizer(model, config)
    optimizer.set_lr(0.0)
    for ids in batches(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def grown_without_moments(case: Case, *, seed: int = 0) -> Grown:
    operator = case.operator.model_copy(update={"moments": "reset"})
    return grow(
        state_of(random_model(case.source)), target=case.target, operator=operator, seed=seed
    )


@settings(checked, max_examples=40)
@given(cases())
def test_the_label_is_true(case: Case) -> None:
    before, grown = logits(random_model(case.source)), grown_without_moments(case)
    after = logits(model_of(grown.state))
    match grown.exactness:
        case "exact":
            assert torch.equal(after, before)
        case "tolerance":
            torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
        case "changes":
            assert not torch.allclose(after, before, rtol=1e-6, atol=1e-6)


@checked
@given(cases(widens=False, new_layers="zero"))
def test_zeroed_new_layers_leave_the_model_bit_for_bit(case: Case) -> None:
    if case.operator.depth.kind != "map":
        assert grown_without_moments(case).exactness == "exact"


@checked
@given(cases())
def test_names_counts_and_storage(case: Case) -> None:
    source = state_of(random_model(case.source))
    copies = {name: weight.clone() for name, weight in source.weights.items()}
    operator = case.operator.model_copy(update={"moments": "reset"})
    grown = grow(source, target=case.target, operator=operator, seed=0)
    model = model_of(grown.state)
    count = sum(weight.numel() for weight in grown.state.weights.values())
    assert count == budget(grown.state.design).parameters.total == model.num_parameters()
    assert all(torch.equal(copies[name], weight) for name, weight in source.weights.items())
    places = [w.untyped_storage().data_ptr() for w in grown.state.weights.values()]
    sources = {w.untyped_storage().data_ptr() for w in source.weights.values()}
    assert len(set(places)) == len(places)
    assert not sources & set(places)
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert is_tied == case.source.tie_word_embeddings
    assert [layer.self_attn.layer for layer in model.model.layers] == [*range(len(grown.layer_map))]


@checked
@given(cases(widens=False))
def test_depth_growth_permutes_the_lists_and_saves_them(case: Case) -> None:
    grown = grown_without_moments(case)
    assert grown.state.design == copied_design(case.source, grown.layer_map)
    for position, layer in enumerate(grown.layer_map.layers):
        if layer.sources:
            old = layer_widths(case.source, layer.sources[0])
            assert layer_widths(grown.state.design, position) == old
    model = model_of(grown.state)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        loaded = load_model(Path(folder))
    assert loaded.config.to_design() == grown.state.design
    assert torch.equal(logits(loaded), logits(model))


@checked
@given(cases())
def test_the_grown_model_caches_layer_by_layer(case: Case) -> None:
    model, ids = model_of(grown_without_moments(case).state).eval(), batches(1)[0]
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        cached = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(cached, model(ids).logits, rtol=1e-9, atol=1e-9)


@checked
@given(cases())
def test_a_seed_decides_everything(case: Case) -> None:
    first, again = (grown_without_moments(case, seed=3).state.weights for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


OPTIMIZERS = {
    "adamw": AdamW(lr=1e-3, betas=BETAS),
    "muon": Muon(lr=1e-3, adamw_betas=BETAS),
}


@checked
@given(cases(width="duplicate", noise=0.0, moments="map"), st.sampled_from([*OPTIMIZERS]))
def test_mapped_moments_are_those_the_larger_model_would_have(case: Case, name: str) -> None:
    """The oracle: the same batches through the grown model give the moments that were mapped."""
    model = random_model(case.source)
    state = state_of(model, gather_moments(model, OPTIMIZERS[name]))
    grown = grow(state, target=case.target, operator=case.operator, seed=0)
    assume(grown.exactness != "changes")
    assert grown.state.optimizer is not None
    oracle = gather_moments(model_of(grown.state), OPTIMIZERS[name]).state_dict()
    assert grown.state.optimizer.keys() <= oracle.keys()
    for key, value in grown.state.optimizer.items():
        torch.testing.assert_close(value, oracle[key], rtol=1e-8, atol=1e-14)
    zeroed = [i for i, layer in enumerate(grown.layer_map.layers) if layer.zero_output]
    fresh = {key.split(".")[2] for key in oracle.keys() - grown.state.optimizer.keys()}
    assert fresh == {str(position) for position in zeroed}


@checked
@given(cases(width="zero_pad", moments="map"))
def test_moments_of_old_units_are_mapped_and_those_of_new_ones_zero(case: Case) -> None:
    model = random_model(case.source)
    state = state_of(model, gather_moments(model, OPTIMIZERS["adamw"]))
    grown = grow(state, target=case.target, operator=case.operator, seed=0)
    assume(grown.exactness != "changes")
    assert grown.state.optimizer is not None
    oracle = gather_moments(model_of(grown.state), OPTIMIZERS["adamw"]).state_dict()
    for key, value in grown.state.optimizer.items():
        if not key.endswith("step"):
            assert torch.isfinite(value).all()
            torch.testing.assert_close(
                value, torch.where(value == 0, 0.0, oracle[key]), rtol=1e-8, atol=1e-14
            )
            assert not key.endswith("exp_avg_sq") or (value >= 0).all()


@checked
@given(
    cases(),
    st.sampled_from(["map", "copy", "zero", "reset"]),
    st.sampled_from([*OPTIMIZERS]),
)
def test_the_optimizer_takes_the_state_and_trains_every_parameter(
    case: Case, moments: str, name: str
) -> None:
    model = random_model(case.source)
    state = state_of(model, gather_moments(model, OPTIMIZERS[name]))
    operator = case.operator.model_copy(update={"moments": moments})
    grown = grow(state, target=case.target, operator=operator, seed=0)
    assert grown.state.optimizer is not None
    assert (grown.state.optimizer == {}) == (moments == "reset") or not any(
        layer.sources for layer in grown.layer_map.layers
    )
    larger = model_of(grown.state)
    optimizer = Optimizer(larger, OPTIMIZERS[name])
    optimizer.load_state_dict(grown.state.optimizer)
    owned = [p for o in optimizer._optimizers for g in o.param_groups for p in g["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(larger.parameters()))
    loss = larger(batches(1)[0], labels=batches(1)[0]).loss
    loss.backward()
    for position, is_new in enumerate(grown.layer_map.is_new):
        if is_new:
            gradients = [p.grad for p in larger.model.layers[position].parameters()]
            assert any((g is not None) and bool(g.any()) for g in gradients), position
    before = {n: p.detach().clone() for n, p in larger.named_parameters()}
    optimizer.set_lr(1e-3)
    optimizer.step()
    for n, p in larger.named_parameters():
        assert torch.isfinite(p).all()
        assert not p.grad.any() or not torch.equal(before[n], p), n


@checked
@given(cases(), st.sampled_from(["map", "copy", "zero"]), st.sampled_from([1e-9, 1.0, 1e9]))
def test_no_new_entry_moves_by_more_than_lr_at_first(case: Case, moments: str, size: float) -> None:
    model = random_model(case.source)
    state = state_of(model, gather_moments(model, OPTIMIZERS["adamw"]))
    assert state.optimizer is not None
    old = {
        k: torch.full_like(v, 20_000) if k.endswith(".step") else v
        for k, v in state.optimizer.items()
    }
    state = replace(state, optimizer=old)
    operator = case.operator.model_copy(update={"moments": moments})
    grown = grow(state, target=case.target, operator=operator, seed=0)
    larger = model_of(grown.state)
    optimizer = Optimizer(larger, AdamW(lr=1e-3, betas=BETAS, weight_decay=0.0))
    assert grown.state.optimizer is not None
    optimizer.load_state_dict(grown.state.optimizer)
    torch.manual_seed(2)
    for parameter in larger.parameters():
        parameter.grad = size * torch.randn_like(parameter)
    optimizer.set_lr(1e-3)
    optimizer.step()
    plan = check_growth(case.source, case.target, operator)
    after = named_weights(larger)
    for grown_parameter in grown_parameters(case.source, plan, operator):
        rule, name = grown_parameter.rule, grown_parameter.name
        moved = (after[name].detach() - grown.state.weights[name]).abs()
        new = torch.ones_like(moved, dtype=torch.bool) if rule is None else rule.new_entries
        assert (moved[new.expand_as(moved)] <= 1e-3 * (1 + 1e-5)).all(), name


@checked
@given(cases(width="zero_pad"))
def test_every_new_unit_can_learn(case: Case) -> None:
    """Of each silent unit, what reads or writes it has a gradient at once."""
    grown = grown_without_moments(case)
    larger = model_of(grown.state)
    for ids in batches(3):
        larger(ids, labels=ids).loss.backward()
    plan = check_growth(case.source, case.target, case.operator)
    for position, layer in enumerate(plan.layer_map.layers):
        if not layer.sources or layer.zero_output:
            continue
        old, new = layer_widths(case.source, layer.sources[0]), layer_widths(plan.design, position)
        block = larger.model.layers[position]
        for unit in range(old.ffn, new.ffn):
            down = block.mlp.down_proj
            reads = down.cola_a.grad[unit] if new.ranks["down_proj"] else down.weight.grad[:, unit]
            assert reads.any(), (position, unit)
        for projection, rank in new.ranks.items():
            part = block.self_attn if projection[0] in "qkvo" else block.mlp
            for unit in range(old.ranks[projection], rank):
                reads = getattr(part, projection).cola_b.grad[unit]
                # Scores of a lone first position have no gradient; three batches have more.
                assert reads.any(), (position, projection, unit)


@checked
@given(st.integers(1, 8), st.integers(0, 9))
def test_shares_of_a_source_sum_to_one(old: int, more: int) -> None:
    axis = tiled(old, old + more)
    shares = torch.zeros(old, dtype=torch.float64).index_add(0, axis.index, 1 / axis.multiplicity)
    torch.testing.assert_close(shares, torch.ones(old, dtype=torch.float64))


@checked
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 4), st.integers(0, 4))
def test_query_heads_stay_with_their_keys(kv: int, more: int, group: int, wider: int) -> None:
    keys: AxisMap = tiled(kv, kv + more)
    queries = query_heads(keys, old_group=group, new_group=group + wider, repeat=True)
    for head, source in enumerate(queries.index.tolist()):
        assert source // group == keys.index[head // (group + wider)]
    assert set(queries.index.tolist()) == set(range(kv * group))
