"""Deltas on a loaded model: exact, in order, all or nothing, storage untouched."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import samara
from samara.errors import (
    AlreadyApplied,
    CorruptDelta,
    LicenseDenied,
    OutOfOrder,
    ShapeMismatch,
    TiedTensorDuplicate,
    WrongBase,
)
from samara.model.config import ModelConfig
from samara.registry.records import License
from samara.sparse import delta_apply
from samara.sparse.delta import make_delta
from samara.sparse.delta_apply import DeltaStack, delta_stack
from samara.sparse.delta_records import Provenance
from samara.sparse.tensor_bits import (
    Entries,
    digests,
    model_tensors,
    named_tensors,
    tensors_root,
)
from samara.sparse.tensor_files import CheckpointFiles

MODES = ("ulp", "xor", "overwrite")
SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
}


def other_delta(base, *, seed=5, mode="ulp", parent=None):
    draw = torch.Generator().manual_seed(seed)
    changed = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in changed.values():
        flat = tensor.view(-1)
        places = torch.randperm(len(flat), generator=draw)[: len(flat) // 5]
        flat[places] += (torch.randn(len(places), generator=draw) * 0.01).to(flat.dtype)
    return make_delta(base, changed, mode=mode, parent=parent), changed


@pytest.mark.parametrize("mode", MODES)
def test_applied_is_tuned_and_reverted_is_base(base, tuned, net, same, mode):
    model = net(base)
    delta = make_delta(base, tuned, mode=mode)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with delta.applied_to(model) as inside:
        assert inside is model
        assert same(model, tuned)
        assert delta_stack(model).ids == (delta.id,)
    assert same(model, base)
    assert addresses == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_an_exception_inside_the_block_still_reverts(base, tuned, net, same):
    model = net(base)
    with pytest.raises(KeyError), make_delta(base, tuned).applied_to(model):
        raise KeyError
    assert same(model, base)


def test_a_delta_fits_weights_of_another_type_only_if_additive(base, tuned, net, same):
    wide = {name: tensor.float() for name, tensor in base.items()}
    with pytest.raises(WrongBase), make_delta(base, tuned).applied_to(net(wide)):
        pass
    del tuned["a"]  # it has a NaN, which equals nothing
    model = net(wide)
    delta = make_delta(base, {**base, **tuned}, mode="additive")
    with delta.applied_to(model):
        torch.testing.assert_close(model.c.data, tuned["c"].float())
    assert same(model, wide)


def test_a_thousand_random_operations_lose_no_bit(base, net, same):
    """Apply, revert and swap at random; a stack of known weights says what must be there."""
    first = [other_delta(base, seed=seed, mode=MODES[seed]) for seed in range(3)]
    second = {
        delta.id: [other_delta(weights, seed=9 + seed, parent=delta) for seed in range(2)]
        for delta, weights in first
    }
    model, draw = net(base), random.Random(0)
    stack, expected = delta_stack(model), [(None, base)]
    for _ in range(1000):
        depth = len(expected) - 1
        choices = first if depth < 1 else second[expected[1][0].id]
        action = draw.choice(["apply", "swap", "revert"])
        if action == "apply" and depth < 2:
            expected.append(draw.choice(choices))
            stack.apply(expected[-1][0])
        elif action == "revert" and depth:
            stack.revert(expected.pop()[0])
        elif action == "swap" and depth:
            below = first if depth == 1 else second[expected[1][0].id]
            target = draw.choice(below)
            if target[0].id != expected[-1][0].id:
                stack.swap(target[0])
                expected[-1] = target
        assert stack.ids == tuple(delta.id for delta, _ in expected[1:])
        assert same(model, expected[-1][1])
    while stack.ids:
        stack.revert()
    assert same(model, base)


def test_swap_writes_only_what_either_touches(base, net, same, monkeypatch):
    a, _ = other_delta({"b": base["b"], **base}, seed=1)
    b, after = other_delta(base, seed=2)
    model = net(base)
    stack = delta_stack(model)
    stack.apply(a)
    written = []
    write = Entries.write
    monkeypatch.setattr(
        Entries, "write", lambda self, bits: (written.append(len(bits)), write(self, bits))
    )
    stack.swap(b)
    union = [np.union1d(x.indices, y.indices) for x, y in zip(a.tensors, b.tensors, strict=True)]
    assert sum(written) == sum(len(indices) for indices in union)
    assert same(model, after)


def test_wrong_order_is_refused(base, tuned, net, same):
    delta = make_delta(base, tuned)
    other, _ = other_delta(base)
    child, _ = other_delta(tuned, parent=delta)
    model = net(base)
    stack = delta_stack(model)
    with pytest.raises(OutOfOrder, match="carries no delta"):
        stack.revert()
    with pytest.raises(OutOfOrder, match=r"belongs on top of delta .* the weights are bare; apply"):
        stack.apply(child)
    stack.apply(delta)
    with pytest.raises(AlreadyApplied, match="is applied already"):
        stack.apply(delta)
    with pytest.raises(OutOfOrder, match=r"belongs on the bare base, .* take that off, or compose"):
        stack.apply(other)
    stack.apply(child)
    with pytest.raises(OutOfOrder, match="is below it; on top is"):
        stack.revert(delta)
    with pytest.raises(OutOfOrder, match="is not applied; on top is"):
        stack.revert(other)
    stack.revert()
    assert same(model, tuned)
    with pytest.raises(OutOfOrder):
        stack.swap(child)
    assert same(model, tuned)


def test_other_weights_are_refused_untouched(base, tuned, net, copies, same):
    delta = make_delta(base, tuned)
    near = copies(base)
    near["d"][0, 0, 0] += 1  # a tensor that the delta does not touch
    model = net(near)
    with pytest.raises(WrongBase, match="was made for the base"):
        delta_stack(model).apply(delta)
    assert same(model, near)


def test_weights_changed_since_are_refused_untouched(base, tuned, net, same):
    delta, model = make_delta(base, tuned), net(base)
    stack = delta_stack(model)
    stack.apply(delta)
    place = delta.tensors[1].indices[0]
    model.b.data.view(-1)[place] += 1
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WrongBase, match="b: was changed after the delta was applied"):
        stack.revert()
    with pytest.raises(WrongBase, match="b: was changed"):
        stack.swap(other_delta(base)[0])
    assert same(model, changed)
    model.b.data.view(-1)[place] = tuned["b"].view(-1)[place]
    stack.revert()
    model.b.data.view(-1)[place] += 1  # now below the delta, whose base was hashed before
    with pytest.raises(WrongBase, match=r"b: the weights that delta .* are not those"):
        stack.apply(delta)


def test_other_models_are_refused(base, tuned, net):
    delta = make_delta(base, tuned)
    root = delta.record.base.tensors_root
    for weights, message in (
        ({**base, "a": base["a"].view(40, 24)}, r"a: has shape \[40, 24\]"),
        ({**base, "a": base["a"].float()}, "a: is F32, the delta was made for BF16"),
        ({name: base[name] for name in "bcd"}, "a: the model has no such tensor"),
    ):
        model = net(weights)
        with pytest.raises(ShapeMismatch, match=message):
            delta_stack(model, base_root=root).apply(delta)


def test_a_delta_that_lies_about_its_result_is_refused(base, tuned, net, same):
    delta, model = make_delta(base, tuned), net(base)
    first = delta.tensors[0]
    lying = dataclasses.replace(
        delta, tensors=(dataclasses.replace(first, sel_post="0" * 32), *delta.tensors[1:])
    )
    with pytest.raises(CorruptDelta, match=r"a: delta .* does not give the weights it promises"):
        delta_stack(model).apply(lying)
    assert same(model, base)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("action", ["apply", "revert", "swap"])
def test_a_fault_at_any_write_leaves_the_weights_as_they_were(
    base, tuned, net, same, monkeypatch, failing, action
):
    delta, model = make_delta(base, tuned), net(base)
    other, _ = other_delta({name: base[name] for name in "abc"} | {"d": base["d"]})
    stack = delta_stack(model)
    if action != "apply":
        stack.apply(delta)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, count, write = stack.ids, 0, Entries.write

    def fails(self, bits):
        nonlocal count
        count += 1
        if count == failing + 1:
            write(self, np.roll(bits, 1))  # something arrives, not what was sent
            raise OSError("fault")
        write(self, bits)

    monkeypatch.setattr(Entries, "write", fails)
    with pytest.raises(OSError, match="fault"):
        {
            "apply": lambda: stack.apply(delta),
            "revert": stack.revert,
            "swap": lambda: stack.swap(other),
        }[action]()
    assert same(model, before)
    assert stack.ids == ids


def test_writes_that_do_not_stick_are_noticed_and_taken_back(base, tuned, net, same, monkeypatch):
    delta, model = make_delta(base, tuned), net(base)
    read, reads = Entries.read, 0

    def misreads(self):
        nonlocal reads
        reads += 1
        found = read(self)
        if reads == 5:  # three before the writes
            found[0] ^= 1
        return found

    monkeypatch.setattr(Entries, "read", misreads)
    with pytest.raises(CorruptDelta, match="memory is faulty"):
        delta_stack(model).apply(delta)
    monkeypatch.undo()
    assert same(model, base)


def test_a_licence_may_forbid_the_use(base, tuned, net, same):
    records = Provenance(license=License(use="forbidden", notice="contract 7"))
    model = net(base)
    with (
        pytest.raises(LicenseDenied, match=r"says use: forbidden \(contract 7\); ask its makers"),
        make_delta(base, tuned, records=records).applied_to(model),
    ):
        pass
    assert same(model, base)


def test_transposed_and_strided_weights_are_written_in_place(same):
    base = {"w": torch.randn(6, 4), "s": torch.randn(5, 3)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"][2, 1] += 1
    tuned["s"][4] -= 1
    storage = torch.zeros(5, 8)
    live = {"w": base["w"].t().contiguous().t(), "s": storage[:, 2:8:2]}
    live["s"].copy_(base["s"])
    stack = DeltaStack(lambda: named_tensors(live))
    stack.apply(make_delta(base, tuned))
    assert same(live, tuned)
    assert storage[:, ::2][:, :1].eq(0).all()  # what lies between was not touched
    stack.revert()
    assert same(live, base)


# --- Hugging Face models ------------------------------------------------------------------------


def llama(*, tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def tuned_copy(weights):
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in changed.values():
        tensor.view(-1)[::7] += 0.01
    return changed


@pytest.mark.parametrize("tie", [True, False])
def test_a_hugging_face_model_answers_as_the_tuned_one_and_then_as_before(tie, tmp_path):
    model = llama(tie=tie)
    base = dict(model_tensors(model).tensors)
    assert ("lm_head.weight" in base) is not tie
    changed = tuned_copy(base)
    make_delta(base, changed).save(tmp_path / "x.sdelta")
    reference = llama(tie=tie)
    reference.load_state_dict(changed, strict=False)
    reference.tie_weights()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        with samara.Delta.load(tmp_path / "x.sdelta").applied_to(model):
            assert torch.equal(model(ids).logits, reference(ids).logits)
        assert torch.equal(model(ids).logits, before)


HUGGING_FACE = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    ),
    "gpt_neox, renamed on loading": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(num_hidden_layers=1, **SMALL)
    ),
    "mixtral, fused on loading": lambda: MixtralForCausalLM(
        MixtralConfig(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2, **SMALL)
    ),
    "samara": lambda: samara.SamaraForCausalLM(
        samara.SamaraConfig.from_design(
            ModelConfig(hidden_size=16, num_hidden_layers=2, head_dim=8, vocab_size=32)
        )
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_loaded_model_and_its_folder_are_one_base(name, tmp_path):
    torch.manual_seed(0)
    made = HUGGING_FACE[name]()
    made.save_pretrained(tmp_path / "model")
    files = CheckpointFiles(tmp_path / "model")
    loaded = type(made).from_pretrained(tmp_path / "model")
    for model in (made, loaded):
        assert tensors_root(digests(model_tensors(model).tensors)) == files.root()


def test_renamed_tensors_are_written_and_fused_ones_refused(tmp_path):
    model = HUGGING_FACE["gpt_neox, renamed on loading"]()
    base = copies(model_tensors(model).tensors)
    changed = {**base, "embed_out.weight": base["embed_out.weight"] + 1}
    with make_delta(base, changed).applied_to(model):
        assert torch.equal(model.lm_head.weight, changed["embed_out.weight"])
    model = HUGGING_FACE["mixtral, fused on loading"]()
    base = copies(model_tensors(model).tensors)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    delta = make_delta(base, {**base, name: base[name] + 1})
    with (
        pytest.raises(ShapeMismatch, match=r"experts.1.w1.weight: the loaded model holds it fused"),
        delta.applied_to(model),
    ):
        pass


def copies(weights):
    return {name: tensor.clone() for name, tensor in weights.items()}


def test_a_tied_tensor_under_its_other_name_is_refused():
    model = llama(tie=True)
    untied = {**model_tensors(model).tensors, "lm_head.weight": torch.zeros(32, 16)}
    delta = make_delta(untied, {**untied, "lm_head.weight": torch.ones(32, 16)})
    stack = delta_stack(model, base_root=delta.record.base.tensors_root)
    with pytest.raises(
        TiedTensorDuplicate, match=r"lm_head.weight: is the same tensor as model.embed_tokens"
    ):
        stack.apply(delta)


def test_a_compiled_model_has_the_names_of_its_checkpoint(base, tuned, net):
    model = net(base)
    compiled = torch.compile(model)
    assert model_tensors(compiled).tensors.keys() == base.keys()


def test_each_model_has_one_stack(base, net):
    model = net(base)
    assert delta_stack(model) is delta_stack(model)
    assert delta_stack(model) is not delta_stack(net(base))
    del model
    import gc

    gc.collect()
    assert all(alive is not None for alive in delta_apply._STACKS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deltas_apply_on_a_gpu(base, tuned, net):
    model = net(base).cuda()
    with make_delta(base, tuned).applied_to(model):
        assert torch.equal(model.a.cpu().view(torch.int16), tuned["a"].view(torch.int16))
    assert torch.equal(model.a.cpu().view(torch.int16), base["a"].view(torch.int16))
