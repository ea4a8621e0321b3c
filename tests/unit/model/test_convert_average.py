"""The mean of checkpoints: in float64, recorded, and only of checkpoints of one model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from samara.errors import CheckpointError, ConfigError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.average import average
from samara.model.interchange.convert import convert
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import hash_file, hash_files, hash_json

DESIGN = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "ffn_dim": 24, "vocab_size": 40}


def save(folder, *, seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = SamaraConfig.from_design(ModelConfig(**{**DESIGN, **changes}), eos_token_id=2)
    model = SamaraForCausalLM(config).to(dtype)
    folder.mkdir(parents=True)
    save_model(model, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def hash_of_weights(folder):
    return hash_files({"model.safetensors": folder / "model.safetensors"})


def refused(paths, tmp_path, message, error=CheckpointError):
    with pytest.raises(error, match=message) as caught:
        average(paths, tmp_path / "never")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_is_taken_in_float64_and_rounded_once(tmp_path, dtype):
    paths = [save(tmp_path / f"m{i}", seed=i, dtype=dtype) for i in range(5)]
    result = average(paths, tmp_path / "mean")
    assert (result.folder, result.num_models) == (tmp_path / "mean", 5)
    members = [load_file(path / "model.safetensors") for path in paths]
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean.keys() == members[0].keys()
    for name, tensor in mean.items():
        expected = torch.stack([member[name].double() for member in members]).sum(0) / 5
        assert torch.equal(tensor, expected.to(dtype)), name
    assert load_model(tmp_path / "mean").dtype == dtype
    assert (tmp_path / "mean" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_float32_sums_would_give_other_bits(tmp_path):
    """Large values that cancel: their sum in float32 loses the small one, float64 keeps it."""
    paths = [save(tmp_path / f"m{i}") for i in range(3)]
    for path, value in zip(paths, [1e8, 3.0, -1e8], strict=True):
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"].fill_(value)
        save_file(tensors, path / "model.safetensors")
    average(paths, tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert torch.equal(mean["model.norm.weight"], torch.ones(16))


def test_equal_checkpoints_have_themselves_as_mean(tmp_path):
    paths = [save(tmp_path / f"m{i}") for i in range(3)]
    average(paths, tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert all(
        torch.equal(mean[n], t) for n, t in load_file(paths[0] / "model.safetensors").items()
    )


def test_what_was_averaged_is_recorded(tmp_path):
    paths = [save(tmp_path / f"m{i}", seed=i) for i in range(2)]
    result = average(paths, tmp_path / "mean")
    record = json.loads((tmp_path / "mean" / "provenance.json").read_text())
    (step,) = record["making"]["steps"]
    assert step["verb"] == "average"
    names = [f"{tmp_path.name}/{path.name}" for path in paths]
    assert [origin["name"] for origin in step["made_from"]] == names
    hashes = [hash_of_weights(path) for path in paths]
    assert [origin["weights_hash"] for origin in step["made_from"]] == hashes
    assert result.weights_hash == hash_of_weights(tmp_path / "mean")
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "The mean of 2:" in card
    assert all(digest in card for digest in hashes)


def test_the_result_has_the_format_of_the_checkpoints(tmp_path):
    ours = [save(tmp_path / f"m{i}", seed=i) for i in range(2)]
    published = [convert(p, tmp_path / f"elm-{p.name}", to="openelm").folder for p in ours]
    average(published, tmp_path / "mean-elm", max_shard_size="2KB")
    average(ours, tmp_path / "mean")
    convert(tmp_path / "mean-elm", tmp_path / "back", to="samara")
    expected = (tmp_path / "mean" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == expected
    assert len(list((tmp_path / "mean-elm").glob("*.safetensors"))) > 1


def training_checkpoint(run, step, source):
    """The weights and the record that a training run leaves at a step."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    weights = folder / "model.safetensors"
    files = {weights.name: {"bytes": weights.stat().st_size, "sha256": hash_file(weights)}}
    content = {"schema": 1, "identity": {}, "state": {}, "files": files}
    record = {**content, "sha256": hash_json(content)}
    (folder / "state.json").write_text(json.dumps(record))
    return folder


def test_checkpoints_of_a_finished_run_are_averaged_with_its_design(tmp_path):
    members = [save(tmp_path / f"m{i}", seed=i) for i in range(2)]
    run = tmp_path / "run"
    steps = [training_checkpoint(run, 10 * i, member) for i, member in enumerate(members)]
    refused(steps, tmp_path, "is a checkpoint of a run without .*model, where design and tokenizer")
    save(run / "model", seed=9)
    save_file({"moment": torch.zeros(3)}, steps[0] / "optimizer.safetensors")
    average(steps, tmp_path / "mean")
    record = json.loads((tmp_path / "mean" / "provenance.json").read_text())
    hashes = [origin["weights_hash"] for origin in record["making"]["steps"][0]["made_from"]]
    assert hashes == [hash_of_weights(member) for member in members]
    average(members, tmp_path / "expected")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        expected = (tmp_path / "expected" / name).read_bytes()
        assert (tmp_path / "mean" / name).read_bytes() == expected, name
    content = (steps[0] / "model.safetensors").read_bytes()
    (steps[0] / "model.safetensors").write_bytes(content[:-1] + b"\x7f")
    refused(steps, tmp_path, "its SHA-256 is not the one in state.json")


def test_too_few_or_repeated_checkpoints_are_refused(tmp_path):
    path = save(tmp_path / "m")
    refused([path], tmp_path, "average: 1 checkpoint given; give two or more", ConfigError)
    again = tmp_path / "x" / ".." / "m"
    refused([path, again], tmp_path, "is given twice; each counts once", ConfigError)


def test_checkpoints_of_different_models_are_refused(tmp_path):
    first = save(tmp_path / "first")
    other = save(tmp_path / "other", ffn_dim=32)
    message = r"other: is of another design than .*first \(ffn_dim: \[24\] -> \[32\]\)"
    refused([first, other], tmp_path, message)
    half = save(tmp_path / "half", dtype=torch.bfloat16)
    refused([first, half], tmp_path, r"half: \S+ is bfloat16, in \S+first it is float32")
    spoken = save(tmp_path / "spoken")
    (spoken / "tokenizer.json").write_text('{"version": "2.0"}')
    message = r"spoken: has another tokenizer than .*first \(tokenizer.json differs\)"
    refused([first, spoken], tmp_path, message)
    (spoken / "tokenizer.json").unlink()
    refused([first, spoken], tmp_path, message)


def test_nothing_that_exists_is_overwritten(tmp_path):
    paths = [save(tmp_path / f"m{i}", seed=i) for i in range(2)]
    with pytest.raises(CheckpointError, match="m0: exists already; give another folder"):
        average(paths, paths[0])
