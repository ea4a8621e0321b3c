"""DP-SGD: gradients per row are those of a loop over rows, skipped layers get nothing, noise is
what the accountant was told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from samara.adapt.tasks import LabelLoss, causal_objective
from samara.data.rows import Rows
from samara.federated.accounting import make_budget
from samara.federated.messages import Instruction
from samara.federated.privacy_config import GaussianPrivacy
from samara.federated.record_privacy import (
    PrivateOptimizer,
    SumPerRow,
    gradients_per_row,
    poisson_batches,
    row_gradients,
    training_key,
)
from samara.federated.task_data import ChosenRows
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.config import AdamW
from samara.train.layer_dropout import LayerDropout
from samara.train.layer_rates import LayerDropoutConfig
from samara.train.objective import count_targets

KEY = bytes(32)


def _bert():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return _with_adapters(model, ["query", "value"], "SEQ_CLS"), LabelLoss()


def _samara():
    torch.manual_seed(0)
    design = {
        "hidden_size": 16, "num_hidden_layers": 3, "head_dim": 8, "ffn_dim": 24,
        "vocab_size": 32, "max_position_embeddings": 32,
    }  # fmt: skip
    model = SamaraForCausalLM(SamaraConfig.from_design(ModelConfig.model_validate(design)))
    model = _with_adapters(model, ["q_proj", "down_proj"], None)
    return model, causal_objective(model)


def _with_adapters(model, targets, kind):
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type=kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_("lora" in name or "modules_to_save" in name)
    return model.train()


def _batch(kind, rows=5):
    torch.manual_seed(1)
    tokens = torch.randint(5, 32, (rows, 7))
    if kind == "bert":
        mask = torch.ones_like(tokens)
        mask[1, 4:] = 0
        return {"input_ids": tokens, "attention_mask": mask, "targets": torch.arange(rows) % 3}
    targets = tokens.clone()
    targets[0, 3:] = -100
    return {"input_ids": tokens, "targets": targets}


def _pass(model, objective, batch):
    """Forward and backward as the loop does it."""
    wrapped = SumPerRow(objective)
    (wrapped(model, batch).loss / max(1, count_targets([batch]))).backward()


@pytest.mark.parametrize("kind", ["bert", "samara"])
def test_gradients_per_row_are_those_of_a_loop_over_the_rows(kind):
    model, objective = _bert() if kind == "bert" else _samara()
    batch = _batch(kind)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with row_gradients(model):
        _pass(model, objective, batch)
        found = {name: gradients_per_row(p).clone() for name, p in trained.items()}
    for row in range(5):
        model.zero_grad()
        objective(model, {k: v[row : row + 1] for k, v in batch.items()}).loss.backward()
        for name, parameter in trained.items():
            torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-4, atol=1e-6)
    assert not any("grad_sample" in vars(p) for p in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "samara"])
def test_a_row_has_the_same_gradient_whichever_rows_are_beside_it(kind):
    model, objective = _bert() if kind == "bert" else _samara()
    batch, found = _batch(kind), []
    for rows in (slice(0, 5), slice(0, 2)):
        with row_gradients(model):
            _pass(model, objective, {k: v[rows] for k, v in batch.items()})
            own = [gradients_per_row(p) for p in model.parameters() if p.requires_grad]
            found.append(torch.cat([gradient[0].flatten() for gradient in own]))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def _budget(noise, batch_size=4):
    promise = GaussianPrivacy(epsilon=1e6, delta=0.01, clip=1.0, noise_multiplier=noise)
    return make_budget(promise, rate=0.5, steps=1, rounds=1, key="privacy.records")


def _step(model, objective, batch, *, noise, clip, held=None, key=KEY):
    optimizer = PrivateOptimizer(
        model, AdamW(lr=0.1, weight_decay=0.1), budget=_budget(noise), clip=clip, batch_size=4,
        key=key,
    )  # fmt: skip
    _pass(model, objective, batch)
    optimizer.step()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return optimizer, gradients


def test_a_step_is_the_clipped_sum_over_the_expected_size():
    model, objective = _bert()
    batch, clip = _batch("bert"), 0.5
    with row_gradients(model):
        _pass(model, objective, batch)
        rows = [gradients_per_row(p).flatten(1) for p in model.parameters() if p.requires_grad]
        flat = torch.cat(rows, dim=1)
    model.zero_grad()
    norms = flat.norm(dim=1, keepdim=True)
    assert float(norms.max()) > clip
    expected = (flat * (clip / norms).clamp(max=1)).sum(dim=0) / 4
    with row_gradients(model):
        _, found = _step(model, objective, batch, noise=0.02, clip=clip)
    flat_found = torch.cat([gradient.flatten() for gradient in found.values()])
    deviation = 0.02 * clip / 4
    assert float((flat_found - expected).abs().max()) < 6 * deviation
    assert float((flat_found - expected).std()) == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize("row", range(5))
def test_a_row_more_or_less_moves_a_step_by_no_more_than_the_clip(row):
    """The bound that the noise is measured by, with the noise the same in both."""
    batch, clip, found = _batch("bert"), 0.3, []
    for rows in (range(5), [other for other in range(5) if other != row]):
        model, objective = _bert()
        with row_gradients(model):
            part = {k: v[list(rows)] for k, v in batch.items()}
            _, gradients = _step(model, objective, part, noise=0.5, clip=clip)
        found.append(torch.cat([gradient.flatten() for gradient in gradients.values()]))
    moved = 4 * float((found[0] - found[1]).norm())
    assert 0.5 * clip < moved <= clip * (1 + 1e-4)


def test_a_skipped_layer_gets_neither_gradient_nor_noise_nor_decay():
    model, objective = _bert()
    settings = LayerDropoutConfig(rate=0.67, shape="uniform", gate="budgeted")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with LayerDropout(model, settings, seed=0) as dropout, row_gradients(model):
        with dropout.hold(batch=0, round=0) as runs:
            _pass(model, objective, _batch("bert"))
        assert sum(runs) == 1
        optimizer = PrivateOptimizer(
            model, AdamW(lr=0.1, weight_decay=0.1), budget=_budget(1.0), clip=0.5, batch_size=4,
            key=KEY,
        )  # fmt: skip
        optimizer.step()
        state = optimizer.state_dict()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = int(name.split("layer.")[1].split(".")[0]) if "layer." in name else None
        ran = layer is None or runs[layer]
        assert torch.equal(parameter, before[name]) != ran
        assert (f"{name}.exp_avg" in state) == ran


def test_no_row_drawn_is_a_step_of_noise_alone():
    class _Rows(Rows):
        sequence_length = 7

        def __len__(self):
            return 5

        def batch(self, rows):
            return {k: v[list(rows)] for k, v in _batch("bert").items()}

    model, objective = _bert()
    (only,) = poisson_batches(ChosenRows(_Rows(), range(5)), rate=0.0, steps=1, key=KEY)
    assert (only[0]["targets"] == -100).all()
    with row_gradients(model):
        _, found = _step(model, objective, only[0], noise=1.0, clip=0.5)
    flat = torch.cat([gradient.flatten() for gradient in found.values()])
    assert float(flat.std()) == pytest.approx(0.5 / 4, rel=0.15)
    drawn = [len(b[0]["input_ids"]) for b in poisson_batches(
        ChosenRows(_Rows(), range(5)), rate=0.6, steps=400, key=KEY)]  # fmt: skip
    assert len(set(drawn)) > 3
    assert np.mean(drawn) == pytest.approx(3.0, abs=0.3)  # an empty draw counts as 1 here


def test_the_noise_repeats_for_the_same_training_and_for_no_other():
    asked, values = Instruction(round=3, client=1), {"a": np.zeros(3, dtype=np.float32)}
    key = training_key(KEY, asked, values, [])
    assert key == training_key(KEY, asked, values, [])
    others = [
        training_key(bytes(31) + b"1", asked, values, []),
        training_key(KEY, Instruction(round=4, client=1), values, []),
        training_key(KEY, asked, {"a": values["a"] + 1}, []),
        training_key(KEY, asked, values, [values["a"]]),
    ]
    assert len({key, *others}) == 5


def test_a_pass_that_breaks_off_leaves_nothing_on_the_model():
    model, objective = _bert()

    def _broken():
        with row_gradients(model):
            objective(model, _batch("bert"))
            raise MemoryError("in the middle of a pass")

    with pytest.raises(MemoryError):
        _broken()
    assert not any("activations" in vars(module) for module in model.modules())
    with row_gradients(model):
        _pass(model, objective, _batch("bert"))
        assert all(len(gradients_per_row(p)) == 5 for p in model.parameters() if p.requires_grad)
