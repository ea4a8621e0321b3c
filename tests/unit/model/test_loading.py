"""Saved models load bit for bit, and anything that does not fit is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from samara.errors import CheckpointError
from samara.model.configuration import SamaraConfig
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM


def make_model(**fields: Any) -> SamaraForCausalLM:
    torch.manual_seed(0)
    return SamaraForCausalLM(
        SamaraConfig(vocab_size=20, hidden_size=64, num_hidden_layers=2, ffn_dims=[8, 16], **fields)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = make_model(tie_word_embeddings=tied, ranks=[4, 0]).to(dtype)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.dtype == dtype
    assert not loaded.training
    for (name, a), (other, b) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_dtype_and_device(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float64, device="cpu")
    assert model.dtype == torch.float64


def test_saving_and_loading_print_nothing(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(load_model(folder), tmp_path / "copy")
    assert capfd.readouterr() == ("", "")


def test_sharded_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path / "shards")
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"no such file; the checkpoint is incomplete"):
        load_model(tmp_path / "shards")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.bias"] = torch.zeros(3)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(65)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        "holds no config.json, so it is no saved model",
    ),
    "config-no-json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: cannot be read: ",
    ),
    "config-no-mapping": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json: model_type is None, not 'samara'",
    ),
    "other-architecture": (
        lambda folder: edit_config(folder, model_type="llama"),
        "config.json: model_type is 'llama', not 'samara'; this folder holds another architecture",
    ),
    "config-wrong-value": (
        lambda folder: edit_config(folder, hidden_size=-1),
        "config.json: config.hidden_size: input should be greater than 0, got -1",
    ),
    "no-weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors: no such file; the checkpoint is incomplete",
    ),
    "truncated": (cut_short, "model.safetensors: damaged or cut short: "),
    "no-safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"hello"),
        "model.safetensors: damaged or cut short: ",
    ),
    "index-damaged": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json: cannot be read: ",
    ),
    "missing-tensor": (
        lambda folder: edit_tensors(folder, drop),
        "lacks 1 tensor(s) for its config.json, such as model.norm.weight; it was made for another",
    ),
    "unknown-tensor": (
        lambda folder: edit_tensors(folder, add),
        "holds unknown 1 tensor(s) for its config.json, such as model.layers.0.bias",
    ),
    "wrong-shape": (
        lambda folder: edit_tensors(folder, widen),
        "model.norm.weight has shape [65], config.json asks for [64]; it was made for another",
    ),
    "other-design": (
        lambda folder: edit_config(folder, ffn_dims=[8, 24], intermediate_size=24),
        "mlp.gate_proj.weight has shape [16, 64], config.json asks for [24, 64]",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_refusals(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert message in str(error.value)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
