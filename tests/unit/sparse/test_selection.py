"""Scores, budgets and exact choice: against brute force on tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.config import validate
from samara.errors import CheckpointError, ConfigError, NonFiniteLossError
from samara.sparse.attach import linear_weights
from samara.sparse.budget import allocate
from samara.sparse.calibration import Calibration, GradientSums, gradient_sums
from samara.sparse.config import SelectionConfig, SparseConfig
from samara.sparse.scores import PRESETS, Score, family, low_rank_approximation, rms_normalized
from samara.sparse.selection import round_to_units, select, shared_inputs, target_names
from samara.sparse.support import Support
from samara.sparse.top_k import Scored, count_best, top_k
from samara.sparse.units import Units
from samara.train.objective import Sums

UNCLAMPED = (0.0, 1e9)


def samples(models, kind, number):
    return [models.batch(kind, rows=1, seed=s) for s in range(number)]


def calibration(models, kind, number=6):
    return Calibration(objective=models.objective(kind), samples=samples(models, kind, number))


def per_sample_gradients(models, kind, model, name, number):
    found = []
    for sample in samples(models, kind, number):
        model.requires_grad_(True)
        model.zero_grad()
        loss = models.objective(kind)(model, sample).loss
        (loss / int((sample["targets"] != -100).sum())).backward()
        found.append(model.get_parameter(name).grad.clone())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "bert", "samara_cola"])
def test_sums_are_those_of_single_backward_passes(models, kind):
    model = models.build(kind)
    names = [*linear_weights(model)][:3]
    if kind == "qwen2_tied":
        names.append("model.embed_tokens.weight")  # used twice in one backward pass
    flags = [p.requires_grad for p in model.parameters()]
    sums = gradient_sums(
        model, {n: model.get_parameter(n) for n in names}, calibration(models, kind)
    )
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for name in names:
        gradients = per_sample_gradients(models, kind, model, name, 6)
        torch.testing.assert_close(sums[name].mean, gradients.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            sums[name].fisher, gradients.square().mean(0), rtol=1e-4, atol=1e-7
        )


def test_the_mean_gradient_is_that_of_one_batch(models):
    model = models.build("llama")
    name = next(iter(linear_weights(model)))
    sums = gradient_sums(model, {name: model.get_parameter(name)}, calibration(models, "llama"))
    whole = {
        k: torch.cat([s[k] for s in samples(models, "llama", 6)])
        for k in samples(models, "llama", 1)[0]
    }
    loss = models.objective("llama")(model, whole).loss
    (loss / int((whole["targets"] != -100).sum())).backward()  # all rows have as many targets
    torch.testing.assert_close(
        sums[name].mean, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6
    )


def test_only_one_dense_gradient_lives_at_a_time(models):
    model = models.build("llama")
    weights = {n: model.get_parameter(n) for n in linear_weights(model)}
    alive = []

    class Watching:
        def __call__(self, model, batch):
            result = models.objective("llama")(model, batch)
            for weight in weights.values():
                weight.register_post_accumulate_grad_hook(
                    lambda _: alive.append(sum(w.grad is not None for w in weights.values()))
                )
            return result

    gradient_sums(
        model, weights, Calibration(objective=Watching(), samples=samples(models, "llama", 1))
    )
    assert alive == [0] * len(weights)


def test_on_a_cpu_statistics_are_taken_without_autocast(models):
    model, rows = models.build("llama"), samples(models, "llama", 3)
    name = "model.layers.0.mlp.up_proj.weight"
    weights, found = {name: model.get_parameter(name)}, []
    for precision in ("float32", "bfloat16"):
        given = Calibration(objective=models.objective("llama"), samples=rows, precision=precision)
        found.append(gradient_sums(model, weights, given)[name].mean)
    assert torch.equal(*found)


def test_samples_without_targets_are_left_out(models):
    model = models.build("llama")
    name = next(iter(linear_weights(model)))
    rows = samples(models, "llama", 2)
    empty = {**rows[0], "targets": torch.full_like(rows[0]["targets"], -100)}
    sums = gradient_sums(
        model,
        {name: model.get_parameter(name)},
        Calibration(objective=models.objective("llama"), samples=[rows[0], empty, rows[1]]),
    )
    assert sums[name].num_samples == 2


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_their_formula(models, name):
    model = models.build("llama")
    tensor = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(tensor)
    gradients = per_sample_gradients(models, "llama", model, tensor, 6)
    sums = gradient_sums(model, {tensor: weight}, calibration(models, "llama"))[tensor]
    g, fisher = gradients.mean(0).double(), gradients.square().mean(0).double()
    lam = 1e-3 * fisher.flatten().sort().values[(fisher.numel() - 1) // 2]
    w = weight.detach().double().abs()
    w = w + 1e-3 * w.square().mean().sqrt()
    a, b, c = PRESETS[name]
    expected = g.abs() ** a * (fisher + lam) ** b * w**c
    found = Score(name=name)(tensor, weight, sums)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)
    assert Score(name=name).needs_gradients == bool(a or b)
    if name == "newton":
        assert 0.0 <= float(found.min()) <= float(found.max()) <= 1.0 + 1e-6


def test_one_sample_makes_grad_fisher_and_grad_choose_alike(models):
    model = models.build("llama")
    chosen = [
        select(
            model,
            SelectionConfig(score=score, density=0.05, rho=0.0),
            calibration(models, "llama", 1),
            seed=0,
        ).support.support_id
        for score in ("grad", "grad_fisher", "fisher")
    ]
    assert len(set(chosen)) == 1


@pytest.mark.parametrize("score", [*PRESETS, "lift_x_grad_fisher"])
def test_scaling_the_loss_changes_no_mask(models, score):
    model = models.build("llama")

    class Scaled:
        def __call__(self, model, batch):
            result = models.objective("llama")(model, batch)
            return Sums(loss=8.0 * result.loss, nll=result.nll)

    config = SelectionConfig(score=score, density=0.05)
    plain = select(model, config, calibration(models, "llama"), seed=0)
    scaled = Calibration(objective=Scaled(), samples=samples(models, "llama", 6))
    assert select(model, config, scaled, seed=0).support.support_id == plain.support.support_id


@pytest.mark.parametrize("granularity", ["element", "two_level"])
@pytest.mark.parametrize("score", ["grad_fisher", "lift", "lift_x_grad_fisher", "random", "small"])
def test_exactly_k_entries_inside_the_targets(models, score, granularity):
    model = models.build("llama")
    config = SelectionConfig(score=score, num_entries=77, granularity=granularity)
    selection = select(model, config, calibration(models, "llama"), seed=3)
    assert selection.support.num_entries == selection.record["entries"] == 77
    assert set(selection.support) <= set(target_names(model, "without_qk"))
    for tensor in selection.support.tensors.values():
        assert (tensor.index.diff() > 0).all()
        assert int(tensor.index[-1]) < math.prod(tensor.shape)
    again = select(model, config, calibration(models, "llama"), seed=3)
    assert again.support.support_id == selection.support.support_id


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        *((kind, g) for kind in ("llama", "gpt2") for g in ("block4", "block16", "column", "row")),
        *(("samara_cola", g) for g in ("block4", "column", "row")),  # rank 4: no 16 x 16 block
    ],
)
def test_units_are_whole_and_within_the_budget(models, granularity, kind):
    model = models.build(kind)
    config = SelectionConfig(score="grad", density=0.3, granularity=granularity)
    selection = select(model, config, calibration(models, kind), seed=0)
    wanted = 0.3 * selection.record["target_weights"]
    assert 0.5 * wanted < selection.support.num_entries <= wanted
    linear = linear_weights(model)
    for name, tensor in selection.support.tensors.items():
        facing = 1 if type(linear[name].module).__name__ == "Linear" else 0
        units = Units(shape=tensor.shape, granularity=granularity, input_dim=facing)
        assert torch.equal(units.entries(units.unit_of(tensor.index)), tensor.index)


def test_random_depends_on_seed_and_name_alone():
    weight = torch.zeros(9, 5)
    score = Score(name="random", seed=1)
    assert torch.equal(score("a", weight, None), score("a", weight, None))
    assert not torch.equal(score("a", weight, None), score("b", weight, None))
    assert not torch.equal(
        score("a", weight, None), Score(name="random", seed=2)("a", weight, None)
    )
    values = score("a", torch.zeros(200, 200), None)
    assert float(values.min()) > 0.0
    assert float(values.max()) <= 1.0
    assert abs(float(values.mean()) - 0.5) < 0.01


def test_low_rank_approximation_is_the_truncated_svd():
    torch.manual_seed(0)
    weight = torch.randn(40, 3) @ torch.randn(3, 30) + 1e-3 * torch.randn(40, 30)
    u, s, vh = torch.linalg.svd(weight)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    for rank_width in (3, 20):  # randomised; exact
        found = low_rank_approximation(weight, rank=min(rank_width, 3), seed=0)
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)
    exact = low_rank_approximation(weight[:, :6], rank=6, seed=0)
    torch.testing.assert_close(exact, weight[:, :6], rtol=1e-4, atol=1e-5)


def test_two_level_with_all_columns_is_the_element_mask(models):
    model = models.build("llama")
    chosen = [
        select(
            model,
            SelectionConfig(score="grad", density=0.1, column_share=1.0, granularity=granularity),
            calibration(models, "llama"),
            seed=0,
        ).support.support_id
        for granularity in ("element", "two_level")
    ]
    assert chosen[0] == chosen[1]


def test_two_level_keeps_few_columns_shared_by_who_reads_the_same(models):
    model = models.build("llama")
    config = SelectionConfig(
        score="grad", density=0.05, column_share=0.25, granularity="two_level", targets="linear"
    )
    support = select(model, config, calibration(models, "llama"), seed=0).support
    columns = {n: set((t.index % t.shape[1]).tolist()) for n, t in support.tensors.items()}
    layer = "model.layers.0."
    for group in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        union = set().union(*(columns.get(f"{layer}{n}.weight", set()) for n in group))
        assert 0 < len(union) <= 4
    assert len(columns[f"{layer}mlp.down_proj.weight"]) <= 5


def test_who_reads_the_same_input_is_seen_by_running_a_sample(models):
    model = models.build("llama")
    groups = shared_inputs(model, target_names(model, "linear"), calibration(models, "llama"))
    short = [[n.split(".")[-2] for n in group] for group in groups]
    assert short == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_passes_in_groups_choose_the_same(models):
    model = models.build("llama")
    chosen = [
        select(
            model,
            SelectionConfig(density=0.05, accumulator_gigabytes=limit),
            calibration(models, "llama"),
            seed=0,
        ).support.support_id
        for limit in (8.0, 1e-9, 6e-6)
    ]
    assert len(set(chosen)) == 1


def test_candidates_recall_the_mask(models):
    model = models.build("llama")
    # Six texts in turn: the first eight samples speak for the rest, as they must.
    rows = [models.batch("llama", rows=1, seed=s % 6) for s in range(32)]
    learnable = Calibration(objective=models.objective("llama"), samples=rows)
    full, pruned = (
        select(
            model, SelectionConfig(density=0.02, candidates=candidates, rho=0.0), learnable, seed=0
        ).support
        for candidates in (None, 4.0)
    )
    common = sum(
        len(set(t.index.tolist()) & set(full.tensors[n].index.tolist()))
        for n, t in pruned.tensors.items()
        if n in full.tensors
    )
    assert pruned.num_entries == full.num_entries
    assert common >= 0.95 * full.num_entries


def test_bfloat16_sums_choose_nearly_the_same(models):
    model = models.build("llama")
    one, two = (
        select(
            model,
            SelectionConfig(density=0.1, accumulators=kind),
            calibration(models, "llama", 32),
            seed=0,
        ).support
        for kind in ("float32", "bfloat16")
    )
    common = sum(
        len(set(t.index.tolist()) & set(one.tensors[n].index.tolist()))
        for n, t in two.tensors.items()
    )
    assert common >= 0.95 * one.num_entries


def test_growing_keeps_what_is_selected(models):
    model = models.build("llama")
    for granularity in ("element", "column"):
        small = select(
            model,
            SelectionConfig(score="random", density=0.1, granularity=granularity),
            calibration(models, "llama"),
            seed=0,
        ).support
        large = select(
            model,
            SelectionConfig(score="grad", density=0.3, granularity=granularity),
            calibration(models, "llama"),
            seed=0,
            include=small,
        ).support
        for name, tensor in small.tensors.items():
            assert set(tensor.index.tolist()) <= set(large.tensors[name].index.tolist())
        assert large.including(small).support_id == large.support_id


def test_rho_one_is_the_global_choice_and_rho_zero_the_quota(models):
    model = models.build("llama")
    common = {"score": "magnitude", "density": 0.1, "normalize": "none", "clamp": UNCLAMPED}
    names = target_names(model, "without_qk")
    support = select(
        model, SelectionConfig(**common, rho=1.0), calibration(models, "llama"), seed=0
    ).support
    scores = {n: Score(name="magnitude")(n, model.get_parameter(n), None).flatten() for n in names}
    everything = torch.cat(list(scores.values()))
    threshold = everything.sort(descending=True).values[support.num_entries - 1]
    for name in names:
        expected = (scores[name] >= threshold).nonzero().flatten()
        found = support.tensors[name].index if name in support.tensors else expected[:0]
        assert torch.equal(found, expected)
    quota = select(model, SelectionConfig(**common, rho=0.0), calibration(models, "llama"), seed=0)
    for name in names:
        size = model.get_parameter(name).numel()
        assert abs(quota.support.tensors[name].index.numel() - 0.1 * size) <= 1.0


def test_a_matrix_without_gradients_gets_nothing(models):
    model = models.build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").zero_()
    # up_proj's gradient runs through down_proj; magnitude would take it, gradients do not.
    config = SelectionConfig(score="grad_fisher", density=0.1, rho=0.0)
    support = select(model, config, calibration(models, "llama"), seed=0).support
    assert "model.layers.0.mlp.up_proj.weight" not in support.tensors
    assert support.num_entries == round(
        0.1 * sum(model.get_parameter(n).numel() for n in target_names(model, "without_qk"))
    )


def test_tensors_trained_whole_stand_beside_the_budget(models):
    model = models.build("bert")
    config = SelectionConfig(num_entries=50, train_fully=("*LayerNorm*", "cls.*"))
    support = select(model, config, calibration(models, "bert"), seed=0).support
    whole = [n for n in support if "LayerNorm" in n or n.startswith("cls.")]
    sizes = sum(model.get_parameter(n).numel() for n in whole)
    assert "cls.predictions.transform.dense.weight" in whole
    assert support.num_entries == 50 + sizes


def test_targets(models):
    llama, gpt2, bert = models.build("llama"), models.build("gpt2"), models.build("bert")
    assert {n.split(".")[-2] for n in target_names(llama, "without_qk")} == {
        "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {n.split(".")[-2] for n in target_names(gpt2, "linear")} == {
        "c_attn", "c_proj", "c_fc",
    }  # fmt: skip
    assert not [n for n in target_names(bert, "without_qk") if ".query." in n or ".key." in n]
    assert target_names(llama, ["*embed_tokens*"]) == ["model.embed_tokens.weight"]
    with pytest.raises(ConfigError, match=r"targets: no matrix matches \*\.w_proj\.weight"):
        target_names(llama, ["*.w_proj.weight"])
    with pytest.raises(ConfigError, match="train_fully: no tensor matches nothing"):
        select(
            llama, SelectionConfig(train_fully=("nothing",)), calibration(models, "llama"), seed=0
        )
    with pytest.raises(ConfigError, match="num_entries: 999999 exceeds the"):
        select(llama, SelectionConfig(num_entries=999999), calibration(models, "llama"), seed=0)
    with pytest.raises(ConfigError, match="less than one column of 8 entries"):
        select(
            llama,
            SelectionConfig(num_entries=2, granularity="column", score="magnitude"),
            calibration(models, "llama"),
            seed=0,
        )
    with pytest.raises(ConfigError, match="two_level: needs a sample"):
        select(
            llama,
            SelectionConfig(granularity="two_level", score="magnitude"),
            calibration(models, "llama", 0),
            seed=0,
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"selection": {"score": "lift", "exponents": [1, 0, 0]}}, "score lift has none"),
        (
            {"selection": {"accumulators": "bfloat16", "num_samples": 300}},
            "lose samples beyond 256",
        ),
        ({"selection": {"clamp": [2, 3]}}, "must contain 1"),
        ({"selection": {"score": "gard"}}, r"selection\.score: .*did you mean 'grad'"),
        ({"expansion": {"densities": [0.02, 0.01]}}, "must rise from stage to stage"),
        ({"expansion": {"densities": [0.005]}}, r"0\.005 is no larger than selection\.density"),
    ],
)
def test_settings_that_contradict_themselves(data, message):
    with pytest.raises(ConfigError, match=message):
        validate(SparseConfig, data)


def test_supports_are_saved_and_refused_when_altered(models, tmp_path):
    model = models.build("llama")
    config = SelectionConfig(density=0.1, granularity="block4", score="magnitude")
    support = select(model, config, calibration(models, "llama"), seed=0).support
    support.save(tmp_path / "support.safetensors")
    loaded = Support.load(tmp_path / "support.safetensors")
    assert loaded.support_id == support.support_id
    assert {t.block for t in loaded.tensors.values()} == {4}
    data = bytearray((tmp_path / "support.safetensors").read_bytes())
    data[-8] ^= 1
    (tmp_path / "support.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="its support_id is not the recorded one"):
        Support.load(tmp_path / "support.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as a support"):
        Support.load(tmp_path / "none.safetensors")


# --- exact choice ---------------------------------------------------------------------------------

values = st.sampled_from([0.0, 1e-40, 1e-20, 0.5, 1.0, 1.0 + 2**-23, 2.0, 3e38, float("inf")])


@settings(max_examples=40, deadline=None)
@given(st.lists(values, min_size=1, max_size=60), st.integers(0, 60))
def test_top_k_takes_the_best_and_the_first_of_equals(scores, k):
    tensor = torch.tensor(scores, dtype=torch.float32)
    order = sorted(range(len(scores)), key=lambda i: (-float(tensor[i]), i))
    expected = sorted(i for i in order[:k] if tensor[i] > 0)
    assert top_k(tensor, k).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(values, min_size=1, max_size=15), min_size=1, max_size=5), st.integers(1, 80)
)
def test_counts_of_the_best_are_those_of_one_sorted_list(tensors, k):
    scored = [Scored(scores=torch.tensor(t, dtype=torch.float32)) for t in tensors]
    flat = [(float(v), i, j) for i, t in enumerate(scored) for j, v in enumerate(t.scores)]
    best = [x for x in sorted(flat, key=lambda x: (-x[0], x[1], x[2]))[:k] if x[0] > 0]
    expected = [sum(1 for x in best if x[1] == i) for i in range(len(tensors))]
    assert count_best(lambda: scored, k) == expected


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(NonFiniteLossError, match="not a finite number"):
        top_k(torch.tensor([1.0, float("nan")]), 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_budgets_sum_to_k_within_clamps(data):
    number = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.integers(1, 500), min_size=number, max_size=number))
    capacities = [data.draw(st.integers(0, s)) for s in sizes]
    floors = [data.draw(st.integers(0, c)) for c in capacities]
    total = data.draw(st.integers(max(1, sum(floors)), max(1, sum(sizes))))
    masses = [data.draw(st.integers(0, c)) for c in capacities]
    rho = data.draw(st.floats(0, 1))
    found = allocate(
        total,
        sizes=sizes,
        capacities=capacities,
        masses=masses,
        floors=floors,
        rho=rho,
        clamp=(0.1, 8.0),
    )
    assert sum(found) == min(total, sum(capacities))
    for count, floor, capacity in zip(found, floors, capacities, strict=True):
        assert floor <= count <= capacity


def test_clamps_hold_and_the_rest_goes_on_in_proportion():
    common = {"sizes": [100] * 4, "capacities": [100] * 4, "floors": [0] * 4, "rho": 1.0}
    masses = [40, 0, 0, 0]
    assert allocate(40, **common, masses=masses, clamp=UNCLAMPED) == [40, 0, 0, 0]
    assert allocate(40, **common, masses=masses, clamp=(0.1, 2.0)) == [20, 7, 7, 6]
    assert allocate(40, **{**common, "rho": 0.5}, masses=masses, clamp=UNCLAMPED) == [25, 5, 5, 5]


def test_fractions_of_units_are_given_out_again():
    assert round_to_units([10, 10, 10], [4, 4, 4], [100, 100, 100]) == [3, 2, 2]
    assert round_to_units([10, 10, 10], [4, 4, 4], [8, 100, 100]) == [2, 3, 2]


def test_scores_of_tiny_gradients_survive_float32():
    score = torch.tensor([[1e-30, 2e-30], [0.0, 3e-30]])
    normalized = rms_normalized(score)
    torch.testing.assert_close(normalized.square().mean(), torch.tensor(1.0))
    units = Units(shape=(2, 2), granularity="column", input_dim=1)
    torch.testing.assert_close(units.scores(score) * 1e30, torch.tensor([0.5**0.5, 6.5**0.5]))
    assert rms_normalized(torch.zeros(2, 2)).eq(0).all()


def test_the_floor_of_fisher_is_its_mean_where_most_is_zero():
    sums = GradientSums(torch.ones(1, 4), torch.float32)
    sums.add(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
    sums.num_samples = 1
    found = family((0.0, 1.0, 0.0), torch.ones(1, 4), sums)
    torch.testing.assert_close(found, torch.tensor([[0.004, 0.004, 0.004, 4.004]]))
