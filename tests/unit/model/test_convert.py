"""Conversion of folders: what travels along and what is recorded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from samara.config import dump_yaml
from samara.data.tokenizer import train_tokenizer
from samara.model.config import ColaConfig, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.convert import convert
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import hash_files

DESIGN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_query_heads": (2, 4),
    "num_kv_heads": (1, 2),
    "ffn_dim": (24, 40),
    "vocab_size": 300,
}


def save(folder, **changes):
    torch.manual_seed(0)
    config = SamaraConfig.from_design(
        ModelConfig(**{**DESIGN, **changes}), bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = SamaraForCausalLM(config)
    folder.mkdir(parents=True)
    save_model(model, folder)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(["one two three, one two, one " * 20], folder, vocab_size=262)
    return folder


def add_tokenizer(folder, tokenizer):
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)


# --- what travels along -----------------------------------------------------------------------


@pytest.mark.parametrize("to", ["samara", "openelm"])
def test_tokenizer_template_and_generation_settings_travel_unchanged(tmp_path, tokenizer, to):
    save(tmp_path / "m")
    add_tokenizer(tmp_path / "m", tokenizer)
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"\0\1pieces")
    (tmp_path / "m" / "optimizer.pt").write_bytes(b"not for others")
    result = convert(tmp_path / "m", tmp_path / "out", to=to)
    travelling = {
        "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    written = {"README.md", "config.json", "model.safetensors", "provenance.json"}
    assert set(result.files) == travelling | written
    for name in travelling:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    assert result.notes == ()


def test_the_result_says_what_was_written(tmp_path):
    model = save(tmp_path / "m")
    result = convert(tmp_path / "m", tmp_path / "out", to="openelm")
    assert (result.folder, result.source_format) == (tmp_path / "out", "samara")
    assert result.target_format == "openelm"
    assert result.num_parameters == sum(p.numel() for p in model.parameters())
    weights = tmp_path / "out" / "model.safetensors"
    assert result.weights_hash == hash_files({weights.name: weights})
    assert "holds no tokenizer: add the one it was trained with" in result.notes[0]


def test_samara_keeps_every_design_and_a_cola_model_its_outputs(tmp_path):
    cola = ColaConfig(rank=({"q_proj": 4, "gate_proj": 6}, 5), activation="both")
    model = save(tmp_path / "m", cola=cola, initializer={"kind": "normal", "std": 0.1}).eval()
    convert(tmp_path / "m", tmp_path / "out", to="samara")
    loaded = load_model(tmp_path / "out")
    assert loaded.config.to_design() == model.config.to_design()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_run_folder_stands_for_the_model_in_it(tmp_path):
    save(tmp_path / "run" / "model")
    assert convert(tmp_path / "run", tmp_path / "out", to="samara").source_format == "samara"


def test_shards_are_no_larger_than_asked_and_hold_everything(tmp_path):
    save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", to="samara", max_shard_size="12 kB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = {}
    for shard in shards:
        loaded = load_file(shard)
        size = sum(tensor.nbytes for tensor in loaded.values())
        assert size <= 12_000 or len(loaded) == 1
        tensors |= loaded
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    original = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(original[name], tensor) for name, tensor in tensors.items())
    assert load_model(tmp_path / "out").config.hidden_size == 32


def test_a_model_of_several_types_keeps_them(tmp_path):
    save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    mixed = {n: t.bfloat16() if t.dim() > 1 else t for n, t in load_file(path).items()}
    save_file(mixed, path)
    convert(tmp_path / "m", tmp_path / "openelm", to="openelm")
    convert(tmp_path / "openelm", tmp_path / "back", to="samara")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in back.items()} == {
        name: tensor.dtype for name, tensor in mixed.items()
    }
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


# --- what is recorded -------------------------------------------------------------------------


def fake_run(run, *, name="small"):
    """A finished run with an evaluation stage beside it, as the verbs leave them."""
    save(run / "model")
    digest = hash_files({"model.safetensors": run / "model" / "model.safetensors"})
    recipe = {"schema": 1, "name": name, "pretrain": {"seed": 7}}
    total = {"tokens": 12_000, "flops": 3.5e12, "seconds": 7200.0, "joules": 7.2e5}
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    (run / "summary.json").write_text(json.dumps({"weights_hash": digest}))
    lineage = {"parents": {"data": "d" * 64}, "total": total}
    (run / "lineage.json").write_text(json.dumps(lineage))
    score = {"value": 3.25, "low": 3.125, "high": 3.375}
    models = {
        "other": {"weights_hash": "0" * 64, "loss": {**score, "value": 99.0}},
        "it": {"weights_hash": digest, "loss": score, "bits_per_byte": {**score, "low": None}},
    }
    results = {"models": models, "split": "test", "corpus_hash": "c" * 64, "num_documents": 41}
    (run.parent / "evaluate").mkdir()
    (run.parent / "evaluate" / "results.json").write_text(json.dumps(results))
    return digest


def test_the_card_tells_recipe_data_compute_scores_and_licence(tmp_path):
    digest = fake_run(tmp_path / "runs" / "pretrain")
    convert(tmp_path / "runs" / "pretrain", tmp_path / "tiny", to="openelm", license="mit")
    card = (tmp_path / "tiny" / "README.md").read_text()
    head = "---\nlicense: mit\nlibrary_name: mlx\npipeline_tag: text-generation\ntags:\n- samara\n"
    assert card.startswith(head + "- openelm\n---\n\n# tiny\n")
    for expected in (
        "A causal language model of 20,544 parameters (float32), in OpenELM's format.",
        "| query heads | 2, 4 |",
        "from mlx_lm import generate, load",
        "Trained on the corpus with SHA-256 `" + "d" * 64 + "`.",
        "Compute, ancestors included: 12,000 tokens, 3.5e+12 FLOPs, 2 h 00 min, 0.2 kWh (estim",
        "  seed: 7\n",
        "On 41 documents of the split `test` of the corpus `" + "c" * 64 + "`.",
        "| loss | 3.25 | 3.125 to 3.375 |",
        "| bits per byte | 3.25 |  |",
        f"Converted from\n\n- `pretrain/model` (samara), SHA-256 of the weights `{digest}`",
        "## License\n\n`mit`\n",
    ):
        assert expected in card, expected
    assert "99" not in card.replace(digest, "")
    assert str(tmp_path) not in card


def test_what_is_known_travels_through_several_conversions(tmp_path):
    fake_run(tmp_path / "runs" / "pretrain")
    convert(tmp_path / "runs" / "pretrain", tmp_path / "first", to="openelm", license="mit")
    convert(tmp_path / "first", tmp_path / "second", to="samara")
    card = (tmp_path / "second" / "README.md").read_text()
    for expected in ("`mit`", "seed: 7", "| loss | 3.25 |", "pretrain/model", "/first`"):
        assert expected in card
    assert not (tmp_path / "second" / "README.source.md").exists()


def test_a_model_of_unknown_making_says_so_and_a_foreign_card_is_kept(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text(
        "---\ntags: [a]\nlicense: apache-2.0\n---\n# Theirs\n"
    )
    convert(tmp_path / "m", tmp_path / "a", to="openelm")
    convert(tmp_path / "a", tmp_path / "b", to="samara")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "How the weights were trained is not recorded with them." in card
    assert "None recorded." in card
    assert "license: apache-2.0" in card
    assert (tmp_path / "b" / "README.source.md").read_text().endswith("# Theirs\n")


@pytest.mark.parametrize(
    "card", ["# No head", "---\ntags: [a]\n---\nlicense: mit", "---\nlicense:\n"]
)
def test_a_licence_that_is_not_stated_is_not_invented(tmp_path, card):
    save(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text(card)
    convert(tmp_path / "m", tmp_path / "out", to="samara")
    written = (tmp_path / "out" / "README.md").read_text()
    assert "Not stated by the source of the weights." in written
    assert "license:" not in written
