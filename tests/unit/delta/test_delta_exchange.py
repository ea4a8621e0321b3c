"""SHiRA adapters and pairs of checkpoints in, plain checkpoints out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from samara.errors import (
    CheckpointError,
    ConfigError,
    LicenseDenied,
    OutOfOrder,
    ShapeMismatch,
    WrongBase,
)
from samara.model.interchange.provenance import verify
from samara.registry.records import License
from samara.runs import read_json, write_json
from samara.sparse.delta import make_delta
from samara.sparse.delta_checkpoint import apply_to_checkpoint, revert_checkpoint
from samara.sparse.delta_exchange import delta_between, export_checkpoint, import_shira
from samara.sparse.delta_records import Provenance
from samara.sparse.tensor_bits import model_tensors


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        tie_word_embeddings=True,
    )

    def save(dtype, name="llama"):
        LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def shira(tmp_path):
    def train(folder, dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=3)
        adapted = get_peft_model(model, config)
        draw = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "shira" in name:
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.01
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shira_adapter_becomes_the_weights_that_peft_merges(llama, shira, tmp_path, dtype, same):
    folder = llama(dtype)
    adapter = shira(folder, dtype)
    delta = import_shira(adapter, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), adapter
    ).merge_and_unload()
    with delta.applied_to(model):
        assert same(dict(model.state_dict()), dict(merged.state_dict()))


def test_indices_saved_as_floats_are_read(llama, shira):
    folder = llama(torch.float32)
    adapter = shira(folder, torch.float32)
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    expected = import_shira(adapter, folder).id
    save_file({n: t.float() if "indices" in n else t for n, t in stored.items()}, path)
    assert import_shira(adapter, folder).id == expected


def test_adapters_that_are_no_shira_of_this_base_are_refused(llama, shira, tmp_path):
    folder = llama(torch.float32)
    adapter = shira(folder, torch.float32)
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    first = next(name for name in stored if name.endswith("shira_indices"))

    save_file({**stored, first: stored[first] + 1000}, path)
    with pytest.raises(ShapeMismatch, match="it was trained on another model"):
        import_shira(adapter, folder)
    save_file({name: tensor for name, tensor in stored.items() if name != first}, path)
    with pytest.raises(CheckpointError, match="has no indices"):
        import_shira(adapter, folder)
    save_file({**stored, "base_model.model.lm_head.bias": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="which is no part of SHiRA"):
        import_shira(adapter, folder)
    renamed = {name.replace("q_proj", "x_proj"): tensor for name, tensor in stored.items()}
    save_file(renamed, path)
    with pytest.raises(ShapeMismatch, match=r"x_proj.weight: .* has no such tensor"):
        import_shira(adapter, folder)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        import_shira(adapter, folder)
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(CheckpointError, match="is a LORA adapter; only SHIRA"):
        import_shira(adapter, folder)


def test_the_difference_of_two_checkpoints_is_exact(base, tuned, save_folder, net, same):
    first, second = save_folder(base, "one"), save_folder(tuned, "two", sharded=True)
    delta = delta_between(first, second)
    assert delta.id == make_delta(base, tuned).id
    assert delta.record.tensors[0].tensor_post_sha256
    assert delta.record.base.config_sha256
    model = net(base)
    with delta.applied_to(model):
        assert same(model, tuned)


def test_the_densest_part_of_a_difference(base, tuned, save_folder):
    first, second = save_folder(base, "one"), save_folder(tuned, "two")
    delta = delta_between(first, second, density=0.02)
    by_name = {tensor.name: tensor for tensor in delta.tensors}
    moved = (tuned["b"] - base["b"]).abs().view(-1)
    expected = np.sort(moved.topk(round(0.02 * 128)).indices.numpy())
    assert np.array_equal(by_name["b"].indices, expected)
    with pytest.raises(ConfigError, match=r"density: 0 is not above 0"):
        delta_between(first, second, density=0)


def test_checkpoints_of_different_models_have_no_difference(base, tuned, save_folder):
    first = save_folder(base, "one")
    rest = {name: tuned[name] for name in "abc"}
    with pytest.raises(ShapeMismatch, match=r"d: only .*one has it"):
        delta_between(first, save_folder(rest, "two"))
    with pytest.raises(ShapeMismatch, match="b: is F16"):
        delta_between(first, save_folder({**tuned, "b": tuned["b"].half()}, "three"))
    numbers = save_folder({**base, "n": torch.arange(3)}, "four")
    with pytest.raises(ShapeMismatch, match="n: is I64 and differs"):
        delta_between(numbers, save_folder({**tuned, "n": torch.arange(3) + 1}, "five"))
    apply_to_checkpoint(delta_between(first, save_folder(tuned, "six")), first)
    with pytest.raises(CheckpointError, match="carries deltas; take them off first"):
        delta_between(first, first)
    revert_checkpoint(first)


def test_an_exported_checkpoint_is_plain_and_loads_anywhere(llama, tmp_path, same):
    folder = llama(torch.bfloat16)
    base = dict(model_tensors(AutoModelForCausalLM.from_pretrained(folder)).tensors)
    tuned = {name: tensor * 1.01 for name, tensor in base.items()}
    again = {name: tensor * 1.02 for name, tensor in base.items()}
    first = make_delta(base, tuned)
    second = make_delta(tuned, again, parent=first)
    before = (folder / "model.safetensors").read_bytes()
    warnings = export_checkpoint([first, second], folder, tmp_path / "out")
    assert len(warnings) == 2
    assert "redistribution: unknown; find out before" in warnings[0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(model_tensors(exported).tensors), again)
    assert not list((tmp_path / "out").glob(".sdelta*"))
    verify(tmp_path / "out")
    assert read_json(tmp_path / "out" / "provenance.json")["making"]["steps"][-1]["verb"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_exports_that_may_not_or_cannot_be_are_refused_and_leave_nothing(
    base, tuned, save_folder, tmp_path
):
    folder, out = save_folder(base), tmp_path / "out"
    delta = make_delta(base, tuned)
    records = Provenance(license=License(redistribution="forbidden", notice="contract 7"))
    with pytest.raises(LicenseDenied, match=r"forbidden \(contract 7\); it may not be published"):
        export_checkpoint([make_delta(base, tuned, records=records)], folder, out)
    with pytest.raises(OutOfOrder):
        export_checkpoint([make_delta(tuned, base, parent=delta)], folder, out)
    with pytest.raises(WrongBase):
        export_checkpoint([make_delta(tuned, base)], folder, out)
    assert not out.exists()
    inner = Provenance(license=License(redistribution="internal"))
    warned = export_checkpoint([make_delta(base, tuned, records=inner)], folder, out)
    assert warned == [
        f"delta {delta.id[:12]}: its licence record says redistribution: internal; "
        "do not give it to others"
    ]
    open_ = Provenance(license=License(redistribution="allowed"))
    assert not export_checkpoint([make_delta(base, tuned, records=open_)], folder, tmp_path / "o2")
