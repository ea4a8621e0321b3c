"""Expansion, automatic choice, and the memory that all of it takes."""

from __future__ import annotations

import contextlib
import gc
import math

import pytest
import torch

from samara.errors import ConfigError
from samara.sparse.attach import Attachment
from samara.sparse.auto import TrialRun, choose_score
from samara.sparse.calibration import Calibration
from samara.sparse.config import (
    AutoConfig,
    ExpansionConfig,
    SelectionConfig,
    SparseAdamWConfig,
)
from samara.sparse.expansion import Expansion, stalls
from samara.sparse.memory import kept_input_bytes, logits_bytes, sparse_memory
from samara.sparse.selection import select
from samara.sparse.update import SparseAdamW


def calibration(models, kind="llama", number=4):
    rows = [models.batch(kind, rows=1, seed=s) for s in range(number)]
    return Calibration(objective=models.objective(kind), samples=rows)


def test_a_stall_is_patience_evaluations_without_gain():
    assert stalls([3.0, 2.0, 1.999, 1.998, 1.997, 1.0], patience=3, min_gain=0.002) == [4]
    assert stalls([3.0, 2.9, 2.8, 2.7], patience=1, min_gain=0.002) == []
    assert stalls([1.0] * 7, patience=3, min_gain=0.002) == [3, 6]
    assert stalls([], patience=3, min_gain=0.002) == []


def test_expansion_grows_stage_by_stage_and_follows_from_the_losses(models):
    model = models.build("llama")
    selection = SelectionConfig(density=0.01)
    settings = ExpansionConfig(densities=(0.05, 0.1), patience=2)
    support = select(model, selection, calibration(models), seed=0).support
    with Attachment(model, support) as attachment:
        expansion = Expansion(
            model,
            attachment,
            settings,
            selection=selection,
            calibration=calibration(models),
            seed=0,
        )
        grown = [
            expansion.observe(loss) is not None for loss in (2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)
        ]
        assert grown == [False, False, True, False, True, False, False]
        assert expansion.stage == 2
        large = attachment.support
        assert large.including(support).support_id == large.support_id
        assert large.num_entries == round(0.1 * expansion.selections[0].record["target_weights"])
        # Gradients flow to the new entries, and none is left over from choosing them.
        assert all(e.values.grad is None for e in attachment.selected.values())
        models.objective("llama")(model, models.batch("llama")).loss.backward()
        assert all(
            e.values.grad.numel() == e.support.index.numel() for e in attachment.selected.values()
        )
        resumed = Expansion(
            model,
            attachment,
            settings,
            selection=selection,
            calibration=calibration(models),
            seed=0,
            losses=expansion.losses[:4],
        )
        assert resumed.stage == 1


def trial_run(models, kind="llama", evaluate=None, model=None):
    objective = models.objective(kind)

    def held_out():
        with torch.no_grad():
            batch = models.batch(kind, rows=8)
            return float(objective(model, batch).loss) / int((batch["targets"] != -100).sum())

    return TrialRun(
        objective=objective,
        batches=lambda steps: [[models.batch(kind, rows=8, seed=0)] for _ in range(steps)],
        evaluate=evaluate or held_out,
    )


def test_auto_keeps_the_best_and_undoes_every_trial_exactly(models):
    model, before = models.build("llama"), models.build("llama")
    state = torch.get_rng_state()
    choice = choose_score(
        model,
        AutoConfig(scores=("small", "grad_fisher", "random"), steps=3, lr_factors=(0.5, 1.0)),
        trial_run(models, model=model),
        selection=SelectionConfig(density=0.2),
        optimizer=SparseAdamWConfig(lr=1e-2),
        calibration=calibration(models),
        seed=0,
    )
    assert choice.score == "grad_fisher"
    assert len(choice.trials) == 3 * 2
    assert {t.steps for t in choice.trials} == {3}
    assert min(choice.table, key=lambda line: line["loss"])["score"] == "grad_fisher"
    assert torch.equal(torch.get_rng_state(), state)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then)
        assert now.requires_grad


def test_auto_halves_until_one_is_left(models):
    model = models.build("llama")
    losses = iter([4.0, 3.0, 2.0, 1.0, 1.0, 2.0])
    choice = choose_score(
        model,
        AutoConfig(scores=("grad", "snip", "small", "magnitude"), steps=1, lr_factors=(1.0,)),
        trial_run(models, evaluate=lambda: next(losses)),
        selection=SelectionConfig(num_entries=40),
        optimizer=SparseAdamWConfig(),
        calibration=calibration(models),
        seed=0,
    )
    assert [(t.score, t.steps) for t in choice.trials[4:]] == [("magnitude", 2), ("small", 2)]
    assert choice.score == "magnitude"
    assert {t.entries for t in choice.trials} == {10}


def test_auto_says_so_if_every_trial_diverges(models):
    with pytest.raises(ConfigError, match=r"auto: every trial diverged; lower optimizer\.lr"):
        choose_score(
            models.build("llama"),
            AutoConfig(scores=("grad", "snip"), steps=1),
            trial_run(models, evaluate=lambda: math.nan),
            selection=SelectionConfig(num_entries=40),
            optimizer=SparseAdamWConfig(),
            calibration=calibration(models),
            seed=0,
        )


def live_bytes():
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None:
                    with contextlib.suppress(RuntimeError):  # a compiler's tensors have no data
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_the_state_is_22_bytes_an_entry_and_no_dense_gradient_stays(models):
    model = models.build("llama", dtype=torch.bfloat16)
    support = select(
        model, SelectionConfig(density=0.3, score="magnitude"), calibration(models), seed=0
    ).support
    batch = models.batch("llama")
    before = live_bytes()
    with Attachment(model, support) as attachment:
        updater = SparseAdamW(attachment.selected, SparseAdamWConfig())
        models.objective("llama")(model, batch).loss.backward()
        updater.step()
        k = support.num_entries
        formula = sparse_memory(
            num_weights=sum(p.numel() for p in model.parameters()), num_entries=k
        )
        assert formula.state == 22 * k
        index = 8 * k  # the support itself, on the host
        steps = 4 * len(attachment.selected)
        taken = live_bytes() - before
        assert taken <= formula.state + index + steps + 200 * len(attachment.selected)
        assert attachment.state_bytes == formula.state
        assert formula.total == formula.weights + formula.state + formula.workspace


def test_structured_supports_keep_less_of_the_inputs(models):
    model = models.build("llama")
    kept = {}
    for granularity in ("element", "two_level", "column"):
        support = select(
            model,
            SelectionConfig(density=0.05, score="grad", granularity=granularity),
            calibration(models),
            seed=0,
        ).support
        with Attachment(model, support) as attachment:
            kept[granularity] = kept_input_bytes(attachment, tokens=10, element_size=2)
    assert kept["column"] < kept["two_level"] < kept["element"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA's allocator")
def test_the_peak_on_cuda_is_the_formula(models):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    objective = models.objective("llama")
    rows = {key: tensor.cuda() for key, tensor in models.batch("llama", rows=1).items()}
    support = select(
        model,
        SelectionConfig(density=0.005, score="magnitude"),
        Calibration(objective=objective, samples=[]),
        seed=0,
    ).support
    with Attachment(model, support) as attachment:
        updater = SparseAdamW(attachment.selected, SparseAdamWConfig())
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            objective(model, rows).loss.backward()
            updater.step()
            updater.zero_grad()
        formula = sparse_memory(
            num_weights=sum(p.numel() for p in model.parameters()),
            num_entries=support.num_entries,
            largest_matrix=4096 * 1024,
            activations=kept_input_bytes(attachment, tokens=7, element_size=2),
            device="cuda",
        )
        assert torch.cuda.max_memory_allocated() <= 1.05 * formula.total


def test_the_logits_in_hand_are_those_of_a_chunk():
    one = {"tokens": 8, "vocabulary": 10, "device": "cpu"}
    assert logits_bytes(**one, element_size=4) == 8 * 10 * (4 + 4)
    assert logits_bytes(**one, element_size=2) == 8 * 10 * (4 + 4 + 2)
    many = {"tokens": 8, "vocabulary": 2**20, "device": "cpu"}  # two rows a chunk
    assert logits_bytes(**many, element_size=2) == 2 * 2**20 * (3 * 4 + 2 * 2)
    formula = sparse_memory(num_weights=10, num_entries=1, largest_matrix=10, logits=500)
    assert formula.workspace == 500
