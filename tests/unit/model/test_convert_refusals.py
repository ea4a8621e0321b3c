"""Conversion refuses what it cannot do: one clear line each, and nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from samara.data.tokenizer import train_tokenizer
from samara.errors import CheckpointError, ConfigError, ResourceError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange import hf_folder
from samara.model.interchange.convert import convert
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM

DESIGN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_query_heads": (2, 4),
    "num_kv_heads": (1, 2),
    "ffn_dim": (24, 40),
    "vocab_size": 300,
}
UNIFORM = {**DESIGN, "num_query_heads": 4, "num_kv_heads": 2, "ffn_dim": 40, "qk_norm": False}


def save(folder, *, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = SamaraConfig.from_design(
        ModelConfig(**{**DESIGN, **changes}), bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = SamaraForCausalLM(config).to(dtype)
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


def refused(source, tmp_path, message, *, to="samara", error=CheckpointError, **options):
    """Convert, expect one clear line, and nothing left behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert(source, tmp_path / "never", to=to, **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# --- folders that changed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), r"is missing, provenance.json lists it; fetch it again"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1]),
            r"has \d+ bytes, provenance.json says \d+; fetch it again, or remove provenance.json",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\xff"),
            r"its SHA-256 is not the one in provenance.json; fetch it again, or remove",
        ),
    ],
    ids=["missing", "short", "changed"],
)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_folder_that_changed_on_its_way_is_refused(tmp_path, file, damage, message):
    save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", to="openelm")
    damage(tmp_path / "out" / file)
    refused(tmp_path / "out", tmp_path, f"{file}: {message}")


def test_a_record_of_another_version_is_refused(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m" / "provenance.json").write_text('{"schema": 99}')
    refused(tmp_path / "m", tmp_path, "not a record that this version reads; remove it")


# --- what is refused --------------------------------------------------------------------------


def test_nothing_that_exists_is_overwritten(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m", tmp_path / "out", to="samara")  # an empty folder is free
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("mine")
    for dst in ("out", "m", "file"):
        with pytest.raises(CheckpointError, match=f"{dst}: exists already; give another folder"):
            convert(tmp_path / "m", tmp_path / dst, to="samara")
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "lama"}, r"to: unknown format 'lama' \(did you mean 'llama'\?\)"),
        ({"to": "llama2c"}, r"to: unknown format 'llama2c'"),
        ({"source_format": "gguf"}, r"from: unknown format 'gguf' \(known: llama, llama2c, "),
        ({"dtype": "bf16"}, r"dtype: unknown value 'bf16'"),
        ({"dtype": "float23"}, r"dtype: unknown value 'float23' \(did you mean 'float32'\?\)"),
        ({"max_shard_size": "5 Gb/s"}, r"max_shard_size: '5 Gb/s' is no size; write it as 5GB"),
        ({"max_shard_size": "0GB"}, r"max_shard_size: '0GB' is no size"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(tmp_path, options, message):
    save(tmp_path / "m")
    refused(tmp_path / "m", tmp_path, message, error=ConfigError, **options)


def write_config(folder, **fields):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))


def test_what_is_no_model_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "nowhere: no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "empty: holds no config.json, so it is no model folder")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", tmp_path, "it is an adapter, merge it into its base first")
    (tmp_path / "file.safetensors").write_text("x")
    refused(tmp_path / "file.safetensors", tmp_path, "is a file, a model is a folder")
    refused(tmp_path / "file.safetensors", tmp_path, "no such folder", source_format="llama")


def test_unknown_architectures_are_refused_with_the_known_ones(tmp_path):
    write_config(tmp_path / "m", model_type="openlm")
    refused(tmp_path / "m", tmp_path, r"model_type is 'openlm'.*\(did you mean 'openelm'\?\)")
    write_config(tmp_path / "m", model_type="mamba")
    refused(tmp_path / "m", tmp_path, r"model_type is 'mamba', which Samara does not read")
    write_config(tmp_path / "m", hidden_size=3)
    refused(tmp_path / "m", tmp_path, r"model_type is None.*\(known: llama, openelm, samara\)")
    (tmp_path / "m" / "config.json").write_text("[1]")
    refused(tmp_path / "m", tmp_path, "config.json: must hold a mapping of keys")
    (tmp_path / "m" / "config.json").write_text("{")
    refused(tmp_path / "m", tmp_path, "config.json: not valid JSON")


def test_pickled_weights_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, tmp_path / "m" / "pytorch_model.bin")
    refused(tmp_path / "m", tmp_path, "only as pytorch_model.bin, a pickle, which can run any code")


def test_folders_without_weights_are_refused(tmp_path):
    save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    refused(
        tmp_path / "m", tmp_path, "m: holds no model.safetensors and no model.safetensors.index"
    )
    (tmp_path / "m" / "model.gguf").write_text("x")
    refused(tmp_path / "m", tmp_path, "a GGUF file, which is for export only")


def test_damaged_shards_are_refused(tmp_path):
    save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "s", to="samara", max_shard_size="12KB")
    (tmp_path / "s" / "provenance.json").unlink()
    first = tmp_path / "s" / next(f.name for f in sorted((tmp_path / "s").glob("*-00001-*")))
    content = first.read_bytes()
    first.unlink()
    refused(tmp_path / "s", tmp_path, f"{first.name}: this shard is missing; fetch it again")
    first.write_bytes(content[:-10])
    refused(tmp_path / "s", tmp_path, f"{first.name}: damaged or cut short")
    save_file({"something.else": torch.zeros(2)}, first)
    refused(tmp_path / "s", tmp_path, f"{first.name}: does not hold model.embed_tokens.weight")
    index = tmp_path / "s" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    refused(tmp_path / "s", tmp_path, "a lies in '../../etc/passwd', which is no file name")
    index.write_text('{"weight_map": {}}')
    refused(tmp_path / "s", tmp_path, "index.json: has no weight_map")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"m: lacks 1 tensor\(s\).*model.norm.weight; the"),
        (lambda t: t.update(extra=torch.zeros(1)), r"m: holds unknown 1 tensor\(s\).*extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight has shape \[31\], config.json asks for \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
            r"model.norm.weight is of type I32; known are float64, float32",
        ),
    ],
    ids=["lacks", "unknown", "shape", "type"],
)
@pytest.mark.parametrize("kind", ["samara", "llama"])
def test_weights_that_do_not_fit_config_json_are_refused(tmp_path, kind, change, message):
    save(tmp_path / "samara", **UNIFORM)
    convert(tmp_path / "samara", tmp_path / "m", to=kind)
    (tmp_path / "m" / "provenance.json").unlink()
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(tmp_path / "m", tmp_path, message)


def test_a_samara_config_that_makes_no_model_is_refused(tmp_path):
    save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 7}))
    refused(tmp_path / "m", tmp_path, "config.json: .*head_dim 7 is odd")


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = 70000.0
    save_file(tensors, path)
    message = r"model.norm.weight: holds 7e\+04, more than float16 can; use bfloat16"
    refused(tmp_path / "m", tmp_path, message, dtype="float16")
    tensors["model.norm.weight"][0] = float("nan")  # is not made worse
    save_file(tensors, path)
    convert(tmp_path / "m", tmp_path / "out", to="samara", dtype="float16")


def test_matrices_of_several_types_have_no_joined_one(tmp_path):
    save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path)
    message = r"transformer.layers.1.attn.qkv_proj.weight: .*bfloat16, float32\); give one"
    refused(tmp_path / "m", tmp_path, message, to="openelm")
    convert(tmp_path / "m", tmp_path / "out", to="openelm", dtype="bfloat16")


COLA = {"cola": {"rank": 4}}


@pytest.mark.parametrize(
    ("to", "design", "message"),
    [
        ("llama", COLA, r"low-rank projections .*\(CoLA\), which no dense .*keep --to samara"),
        ("llama", {}, r"differ in num_query_heads \(2 to 4\), Llama has one .*use --to openelm"),
        ("llama", {**UNIFORM, "qk_norm": True}, r"\(qk_norm\), Llama does not; use --to openelm"),
        (
            "llama",
            {**UNIFORM, "hidden_size": 30},
            r"4 query heads, which do not divide hidden_size 30, and transformers refuses",
        ),
        ("openelm", COLA, r"low-rank projections .*\(CoLA\), which no dense .*keep --to samara"),
        ("openelm", {"qk_norm": False}, r"\(qk_norm\), and llama.cpp reads no .*use --to llama"),
        (
            "openelm",
            {"rms_norm_eps": 1e-5},
            r"rms_norm_eps 1e-05, and .* fix it at 1e-06; use --to",
        ),
        (
            "openelm",
            {"num_kv_heads": (2, 2)},
            r"query heads per key-value head \(1, 2\), OpenELM has one .*use --to gguf",
        ),
        (
            "openelm",
            {"hidden_size": 768, "ffn_dim": (1001, 1002)},
            r"two layers with FFN widths \[1001, 1002\], no multiples of .* two .*; use --to gguf",
        ),
        ("gguf", COLA, r"low-rank projections .*\(CoLA\), which no dense .*keep --to samara"),
        ("gguf", {"qk_norm": False}, r"differ in width, which llama.cpp runs only with qk_norm"),
        ("gguf", {"tie_word_embeddings": False}, r"llama.cpp's openelm always ties it"),
    ],
    ids=str,
)
def test_designs_that_a_format_cannot_express_are_refused_with_a_way_out(
    tmp_path, to, design, message
):
    if to == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed (extra export)")
    save(tmp_path / "m", **design)
    refused(tmp_path / "m", tmp_path, message, to=to)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_heads": [4, 4]}, r"num_query_heads gives layer 0 4 heads, qkv_.* gives it 2"),
        ({"num_kv_heads": [2, 2]}, r"layer 0 has 2 query heads and 2 .*num_gqa_groups asks for 2"),
        ({"num_query_heads": [2]}, r"num_query_heads is \[2\], and not a list of 2 whole numbers"),
        ({"num_query_heads": None, "qkv_multipliers": None}, r"num_query_heads is missing"),
        ({"qkv_multipliers": [1, 2, 3]}, r"qkv_multipliers is \[1, 2, 3\], and not a positive"),
        ({"ffn_multipliers": None}, r"ffn_multipliers is missing"),
        ({"ffn_multipliers": [0.7345, 1.25]}, r"as a range it gives other widths than as a list"),
        ({"ffn_with_glu": False}, r"ffn_with_glu is False; Samara's FFN is gated"),
        ({"activation_fn_name": "gelu"}, r"activation_fn_name is 'gelu'; Samara's FFN is SwiGLU"),
        ({"normalization_layer_name": "layer_norm"}, r"normalization_layer_name is 'layer_norm'"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps is 1e-05; OpenELM's readers take 1e-06"),
        ({"model_dim": None}, r"model_dim is missing, and it must be a positive whole number"),
    ],
    ids=str,
)
def test_openelm_configs_that_mean_two_models_or_none_are_refused(tmp_path, changes, message):
    save(tmp_path / "samara")
    convert(tmp_path / "samara", tmp_path / "m", to="openelm")
    (tmp_path / "m" / "provenance.json").unlink()
    path = tmp_path / "m" / "config.json"
    fields = {**json.loads(path.read_text()), "qkv_multipliers": [0.5, 1.0], "ffn_dim_divisor": 1}
    fields = {k: v for k, v in {**fields, **changes}.items() if v is not None}
    path.write_text(json.dumps(fields))
    refused(tmp_path / "m", tmp_path, message)


def test_heads_that_no_range_gives_are_written_as_lists_with_a_note(tmp_path, tokenizer):
    save(tmp_path / "m", num_hidden_layers=3, num_query_heads=(2, 4, 2), num_kv_heads=(1, 2, 1),
         ffn_dim=32)  # fmt: skip
    add_tokenizer(tmp_path / "m", tokenizer)
    result = convert(tmp_path / "m", tmp_path / "out", to="openelm")
    assert "no range of multipliers gives these query heads" in result.notes[0]
    assert "qkv_multipliers" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- GGUF: what llama.cpp would get wrong is refused ------------------------------------------


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(normalizer={"type": "Lowercase"}), r"normalises text by Lowercase"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), r"it cuts text by .*Whitespace"),
        (
            lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
            r"it cuts text by .*ByteLevel",
        ),
        (lambda c: c["model"].update(ignore_merges=True), r"ignore_merges is True"),
        (lambda c: c["model"].update(merges=[]), r"it merges nothing"),
        (lambda c: c["model"].update(byte_fallback=True), r"its normalizer is not SentencePiece's"),
        (
            lambda c: c.update(
                model={"type": "WordLevel", "vocab": {"a": 0, "[U]": 4}, "unk_token": "[U]"}
            ),
            r"its model is WordLevel",
        ),
        (lambda c: c.update(model=None), r"tokenizer.json: cannot be read as a tokenizer"),
    ],
)
def test_tokenizers_that_llama_cpp_has_no_equal_of_are_refused(
    tmp_path, tokenizer, change, message
):
    pytest.importorskip("gguf", reason="gguf is not installed (extra export)")
    save(tmp_path / "m")
    add_tokenizer(tmp_path / "m", tokenizer)
    edit_tokenizer(tmp_path / "m", change)
    refused(tmp_path / "m", tmp_path, message, to="gguf")


def test_a_tokenizer_of_another_model_is_refused_by_gguf(tmp_path, tokenizer):
    pytest.importorskip("gguf", reason="gguf is not installed (extra export)")
    save(tmp_path / "m", vocab_size=250)
    add_tokenizer(tmp_path / "m", tokenizer)
    refused(tmp_path / "m", tmp_path, "an entry 261, the embedding only 250 rows", to="gguf")


def test_gguf_needs_a_tokenizer_and_an_end_token(tmp_path, tokenizer):
    pytest.importorskip("gguf", reason="gguf is not installed (extra export)")
    save(tmp_path / "m")
    refused(tmp_path / "m", tmp_path, "holds no tokenizer.json, and llama.cpp runs no", to="gguf")
    add_tokenizer(tmp_path / "m", tokenizer)
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "eos_token_id": None}))
    refused(tmp_path / "m", tmp_path, "names no eos_token_id, and llama.cpp would take", to="gguf")
    path.write_text(json.dumps({**fields, "eos_token_id": [2, 3]}))
    result = convert(tmp_path / "m", tmp_path / "out", to="gguf")
    assert result.notes == ("GGUF names one end token: 2, of [2, 3]",)
    assert result.files == ("README.md", "model.gguf", "provenance.json")


def test_float64_is_refused_by_gguf(tmp_path, tokenizer):
    pytest.importorskip("gguf", reason="gguf is not installed (extra export)")
    save(tmp_path / "m", dtype=torch.float64)
    add_tokenizer(tmp_path / "m", tokenizer)
    refused(tmp_path / "m", tmp_path, "is float64, which llama.cpp does not run", to="gguf")
    convert(tmp_path / "m", tmp_path / "kept", to="samara")
    assert load_model(tmp_path / "kept").dtype == torch.float64


def test_a_full_disk_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    save(tmp_path / "m")
    add_tokenizer(tmp_path / "m", tokenizer)

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf_folder, "save_file", full)
    refused(tmp_path / "m", tmp_path, "the disk is full", to="openelm", error=ResourceError)
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra export)")

    def no_space(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", no_space)
    refused(tmp_path / "m", tmp_path, "the disk is full", to="gguf", error=ResourceError)


def test_what_does_not_read_back_is_not_reported_as_converted(tmp_path, monkeypatch):
    save(tmp_path / "m")

    def faulty(tensors, path, **options):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
        tensors["model.norm.weight"][3] += 1e-6
        save_file(tensors, path, **options)

    monkeypatch.setattr(hf_folder, "save_file", faulty)
    refused(tmp_path / "m", tmp_path, "model.norm.weight does not read back as it was written")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    save(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = r"to: gguf needs the package gguf; install it with: pip install 'samara\[export\]'"
    refused(tmp_path / "m", tmp_path, message, to="gguf", error=ConfigError)
