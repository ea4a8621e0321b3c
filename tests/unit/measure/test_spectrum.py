"""Effective ranks: known spectra, streams equal to the whole, what is found in models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import silu
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from samara.errors import CheckpointError
from samara.measure.activations import Place, find_sites
from samara.measure.rank_measurement import measure_ranks
from samara.measure.spectrum import Covariance, effective_rank
from samara.model.config import PROJECTIONS
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

CPU = torch.device("cpu")


def covariance_of(*batches: torch.Tensor) -> Covariance:
    found = Covariance(batches[0].shape[-1])
    for batch in batches:
        found.add(batch)
    return found


@given(rank=st.integers(1, 12), seed=st.integers(0, 99), alpha=st.sampled_from([0.9, 0.999999]))
@settings(max_examples=20, deadline=None)
def test_a_matrix_of_exact_rank_k_needs_at_most_k_directions(rank, seed, alpha):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(64, rank, generator=draw) @ torch.randn(rank, 12, generator=draw)
    found = effective_rank(covariance_of(x).eigenvalues(centred=False), alpha)
    assert found <= rank
    if alpha > 0.99:
        assert found == rank


@pytest.mark.parametrize(
    ("spectrum", "alpha", "rank"),
    [
        ([1.0] * 20, 0.95, 19),  # equal energies: alpha * n, though sums are rounded
        ([1.0] * 20, 0.951, 20),
        ([0.5**k for k in range(1, 30)], 0.95, 5),  # 1 - 2^-k >= 0.95 from k = 5 on
        ([9.0, 1.0], 0.9, 1),
        ([9.0, 1.0], 0.91, 2),
        ([3.0, 0.0, 0.0], 0.99, 1),
        ([0.0, 0.0], 0.95, 0),
    ],
)
def test_closed_form_spectra(spectrum, alpha, rank):
    assert effective_rank(np.array(spectrum), alpha) == rank


def test_given_spectra_come_out_of_the_sums():
    """Rows on the axes, with squares n * lambda: the mean of x x^T is diag(lambda)."""
    wanted = np.array([4.0, 2.0, 0.5, 0.0])
    axes = torch.diag(torch.tensor(wanted * 4).sqrt())
    found = covariance_of(axes).eigenvalues(centred=False)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.integers(1, 7),
    seed=st.integers(0, 99),
    centred=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_stream_equals_the_whole_in_float64(sizes, width, seed, centred):
    draw = torch.Generator().manual_seed(seed)
    batches = [torch.randn(2, size, width, generator=draw) + 3 for size in sizes]
    whole = torch.cat([batch.reshape(-1, width) for batch in batches]).double().numpy()
    if centred:
        whole = whole - whole.mean(axis=0)
    singular = np.linalg.svd(whole, compute_uv=False)
    wanted = np.zeros(width)
    wanted[: len(singular)] = singular**2 / len(whole)
    found = covariance_of(*batches)
    assert found.num_tokens == len(whole)
    np.testing.assert_allclose(found.eigenvalues(centred=centred), wanted, atol=1e-10)


def test_a_large_mean_hides_the_rest_unless_it_is_taken_away():
    x = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)) + 100
    found = covariance_of(x)
    assert effective_rank(found.eigenvalues(centred=False), 0.95) == 1
    assert effective_rank(found.eigenvalues(centred=True), 0.95) == 10


def test_an_activation_that_is_no_number_is_an_error():
    with pytest.raises(CheckpointError, match="no number"):
        covariance_of(torch.tensor([[1.0, float("nan")]])).eigenvalues(centred=False)


def tiny(ranks: list[object] | None) -> SamaraForCausalLM:
    torch.manual_seed(0)
    config = SamaraConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        head_dim=8,
        num_query_heads=[2, 2],
        num_kv_heads=[1, 2],
        ffn_dims=[24, 32],
        ranks=ranks,
    )
    return SamaraForCausalLM(config).eval()


def test_all_seven_linears_of_each_layer_are_found_and_the_head_is_not():
    sites = find_sites(tiny(None))
    assert [(site.layer, site.projection) for site in sites] == [
        (layer, name) for layer in range(2) for name in PROJECTIONS
    ]


def test_linears_of_other_architectures_have_short_names_of_their_own():
    gpt2 = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20))
    bert = BertModel(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            vocab_size=20,
        )
    )
    names = [site.projection for site in find_sites(gpt2) if site.layer == 1]
    assert names == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    names = [site.projection for site in find_sites(bert) if site.layer == 1]
    assert names == ["query", "key", "value", "attention.output.dense", "intermediate.dense"] + [
        names[-1]
    ]
    assert len(set(names)) == 6
    for model in (gpt2, bert):
        model.train(False)
        found = measure_ranks(model, [[1, 2, 3], [4, 5, 6, 7]], batch_size=2, device=CPU)
        assert {one.num_tokens for one in found} == {7}
        assert len(found) == 2 * len(find_sites(model))


def test_activations_are_those_of_the_forward_pass():
    """Against the model run by hand, bottleneck included; in any batching and grouping."""
    model = tiny([{"q_proj": 4, "down_proj": 3}, 5])
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
    found = {
        (one.place.layer, one.place.projection, one.place.space): one
        for one in measure_ranks(model.model, rows, batch_size=8, device=CPU)
    }
    q_proj = model.model.layers[0].self_attn.q_proj
    seen: list[torch.Tensor] = []
    handle = q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
        handle.remove()
        x = torch.cat(seen)
        u = x @ q_proj.cola_a
        spaces = {
            "input": x,
            "bottleneck": u,
            "activated": silu(u),
            "output": silu(u) @ q_proj.cola_b,
        }
    for space, values in spaces.items():
        wanted = covariance_of(values).eigenvalues(centred=False)
        one = found[0, "q_proj", space]
        np.testing.assert_allclose(one.eigenvalues, wanted, rtol=1e-5, atol=1e-9)
        assert one.num_tokens == 14
    assert (0, "k_proj", "bottleneck") not in found  # dense in this layer
    np.testing.assert_array_equal(
        found[1, "q_proj", "input"].eigenvalues, found[1, "v_proj", "input"].eigenvalues
    )
    again = measure_ranks(model.model, rows, batch_size=1, device=CPU, layers_at_once=1)
    assert [one.place for one in again] == [one.place for one in found.values()]
    for one in again:
        place: Place = one.place
        same = found[place.layer, place.projection, place.space]
        np.testing.assert_allclose(one.eigenvalues, same.eigenvalues, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(one.centred, same.centred, rtol=1e-4, atol=1e-8)


def test_the_output_of_a_low_rank_linear_has_at_most_its_rank():
    model = tiny([3, 3])
    rows = torch.randint(0, 50, (30, 10), generator=torch.Generator().manual_seed(0)).tolist()
    for one in measure_ranks(model.model, rows, batch_size=8, device=CPU):
        limit = one.width if one.place.space == "input" else 3
        assert effective_rank(one.eigenvalues, 0.999999) <= limit


def test_a_model_without_layers_is_an_error():
    with pytest.raises(CheckpointError, match="no linears in numbered layers"):
        measure_ranks(nn.Linear(2, 2), [[1]], batch_size=1, device=CPU)
