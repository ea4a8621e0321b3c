"""llama2.c files: against transformers' Llama on weights laid out by hand, and the format's rules.

The tiny checkpoint is derived here from a Llama with Hugging Face's rotary halves: its query and
key rows are interleaved by an explicit loop, as Meta stores them.
"""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from samara.errors import CheckpointError
from samara.model.interchange.convert import convert
from samara.model.loading import load_model

TOLERANCE = 1e-5
LAYERS, HEADS, KV_HEADS, WIDTH, DIM, FFN, CONTEXT = 2, 4, 2, 8, 32, 40, 64
MERGED = [" t", "he", " the", "in", "ing", "ab", "aba", "ba"]
PIECES = [
    ("<unk>", 0.0),
    ("\n<s>\n", 0.0),
    ("\n</s>\n", 0.0),
    *((f"<0x{byte:02X}>", 0.0) for byte in range(256)),
    *((piece, -float(i)) for i, piece in enumerate([*MERGED, *" abcdefghijklmnopqrstuvwxyz."])),
]
VOCAB = len(PIECES)


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(5)
    return model


def interleaved(matrix, heads):
    """Row 2i of a head is its row i, row 2i + 1 its row i + half."""
    result = torch.empty_like(matrix)
    half = matrix.shape[0] // heads // 2
    for head in range(heads):
        start = head * 2 * half
        for i in range(half):
            result[start + 2 * i] = matrix[start + i]
            result[start + 2 * i + 1] = matrix[start + half + i]
    return result


def meta_weights(model):
    """The weights by Meta's names, rotary pairs interleaved."""
    state = model.state_dict()
    weights = {"tok_embeddings.weight": state["model.embed_tokens.weight"]}
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
        attention, mlp = f"{ours}self_attn.", f"{ours}mlp."
        weights |= {
            f"{theirs}attention_norm.weight": state[f"{ours}input_layernorm.weight"],
            f"{theirs}attention.wq.weight": interleaved(state[f"{attention}q_proj.weight"], HEADS),
            f"{theirs}attention.wk.weight": interleaved(
                state[f"{attention}k_proj.weight"], KV_HEADS
            ),
            f"{theirs}attention.wv.weight": state[f"{attention}v_proj.weight"],
            f"{theirs}attention.wo.weight": state[f"{attention}o_proj.weight"],
            f"{theirs}ffn_norm.weight": state[f"{ours}post_attention_layernorm.weight"],
            f"{theirs}feed_forward.w1.weight": state[f"{mlp}gate_proj.weight"],
            f"{theirs}feed_forward.w2.weight": state[f"{mlp}down_proj.weight"],
            f"{theirs}feed_forward.w3.weight": state[f"{mlp}up_proj.weight"],
        }
    weights["norm.weight"] = state["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        weights["output.weight"] = state["lm_head.weight"]
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def write_bin(path, model):
    """Version 0: seven integers, then the arrays stacked over layers."""
    weights = meta_weights(model)
    tied = "output.weight" not in weights
    stacked = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
               "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]  # fmt: skip
    order = ["tok_embeddings.weight"]
    order += [f"layers.{layer}.{part}.weight" for part in stacked for layer in range(LAYERS)]
    with path.open("wb") as file:
        vocab = VOCAB if tied else -VOCAB
        file.write(struct.pack("<7i", DIM, FFN, LAYERS, HEADS, KV_HEADS, vocab, CONTEXT))
        for name in [*order, "norm.weight"]:
            file.write(weights[name].numpy().astype("<f4").tobytes())
        file.write(np.full(CONTEXT * WIDTH, 9.0, dtype="<f4").tobytes())  # tables to skip
        if not tied:
            file.write(weights["output.weight"].numpy().astype("<f4").tobytes())


def write_tokenizer(path):
    with path.open("wb") as file:
        file.write(struct.pack("<i", 8))
        for piece, score in PIECES:
            data = piece.encode()
            file.write(struct.pack("<fi", score, len(data)) + data)


def write_meta_folder(folder, model):
    folder.mkdir()
    save_file(meta_weights(model), folder / "model.safetensors")
    fields = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": model.config.tie_word_embeddings,
        "max_position_embeddings": CONTEXT, "rotary_layout": "interleaved",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "vocab.json").write_text(json.dumps([list(entry) for entry in PIECES]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bin", "folder"])
def test_logits_are_those_of_transformers(tmp_path, tied, kind):
    model = llama(tied=tied)
    source = tmp_path / "source"
    if kind == "bin":
        source.mkdir()
        write_bin(source / "tiny.bin", model)
        write_tokenizer(source / "tokenizer.bin")
        source = source / "tiny.bin"
    else:
        write_meta_folder(source, model)
    result = convert(source, tmp_path / "ours", to="samara", source_format="llama2c")
    assert result.notes == ()
    ours = load_model(tmp_path / "ours")
    assert ours.config.tie_word_embeddings is tied
    assert ours.config.max_position_embeddings == CONTEXT
    ids = torch.randint(0, VOCAB, (1, 50))
    with torch.no_grad():
        assert (ours(ids).logits - model(ids).logits).abs().max() < TOLERANCE
    convert(tmp_path / "ours", tmp_path / "llama", to="llama")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def llama2c_encode(text):
    """The tokenizer of the format, as its C program does it: bos, a space, the best pair first."""
    ids = {piece: i for i, (piece, _) in enumerate(PIECES)}
    tokens = [1]
    for character in f" {text}" if text else "":
        if character in ids:
            tokens.append(ids[character])
        else:
            tokens += [byte + 3 for byte in character.encode()]
    while True:
        best = None
        for i in range(1, len(tokens) - 1):
            joined = ids.get(PIECES[tokens[i]][0] + PIECES[tokens[i + 1]][0])
            if joined is not None and (best is None or PIECES[joined][1] > PIECES[best[1]][1]):
                best = (i, joined)
        if best is None:
            return tokens
        tokens[best[0] : best[0] + 2] = [best[1]]


@pytest.mark.parametrize("file", ["tokenizer.bin", f"tok{VOCAB}.bin", "vocab.json"])
def test_the_tokenizer_encodes_as_the_c_program_does(tmp_path, file):
    folder = tmp_path / "source"
    write_meta_folder(folder, llama(tied=True))
    (folder / "vocab.json").unlink()
    if file == "vocab.json":
        (folder / file).write_text(json.dumps([list(entry) for entry in PIECES]))
    else:
        write_tokenizer(folder / file)
    convert(folder, tmp_path / "ours", to="samara", source_format="llama2c")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<s>", "</s>", "<unk>")
    plain = Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    for text in ["the thing", "ababa", " two  spaces", "Ünïcode 🙂\n", "a", ""]:
        ids = tokenizer(text).input_ids
        assert ids == llama2c_encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert plain.encode(text).ids == ids


def test_a_checkpoint_without_tokenizer_says_so(tmp_path):
    write_bin(tmp_path / "tiny.bin", llama(tied=True))
    result = convert(tmp_path / "tiny.bin", tmp_path / "o", to="samara", source_format="llama2c")
    assert "holds no tokenizer" in result.notes[0]


# --- what is refused --------------------------------------------------------------------------


def refused(tmp_path, source, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, tmp_path / "never", to="samara", source_format="llama2c")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("change", ["short", "long"])
def test_a_file_of_another_size_is_refused(tmp_path, change):
    path = tmp_path / "tiny.bin"
    write_bin(path, llama(tied=True))
    data = path.read_bytes()
    path.write_bytes(data[:-4] if change == "short" else data + b"\0")
    refused(tmp_path, path, rf"tiny.bin: has \d+ bytes, its header asks for {len(data)}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 10, "too short"),
        (b"\0" * 40, "no llama2.c header"),
        (struct.pack("<7i", 33, 40, 2, 4, 2, 300, 64), "no llama2.c header"),
        (struct.pack("<7i", 0x616B3432, 1, 0, 0, 0, 0, 0), "version 1; only version 0 is read"),
        (b"PK\x03\x04" + b"\0" * 40, "a pickle, which can run any code"),
        (b"\x80\x02ctorch" + b"\0" * 40, "a pickle, which can run any code"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path, tmp_path / "x.bin", message)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    write_bin(tmp_path / "tiny.bin", llama(tied=True))
    refused(tmp_path, tmp_path, "for a llama2.c .bin file give the file itself")


def test_meta_names_are_not_taken_for_llamas(tmp_path):
    write_meta_folder(tmp_path / "meta", llama(tied=True))
    with pytest.raises(CheckpointError, match="interleaved; convert it with --from llama2c"):
        convert(tmp_path / "meta", tmp_path / "never", to="samara")
    write_bin(tmp_path / "tiny.bin", llama(tied=True))
    with pytest.raises(CheckpointError, match=r"for a llama2.c .bin file add --from llama2c"):
        convert(tmp_path / "tiny.bin", tmp_path / "never", to="samara")


def test_damaged_tokenizers_are_refused(tmp_path):
    write_bin(tmp_path / "tiny.bin", llama(tied=True))
    path = tmp_path / "tokenizer.bin"
    write_tokenizer(path)
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    refused(tmp_path, tmp_path / "tiny.bin", rf"no llama2.c tokenizer of {VOCAB} pieces")
    path.write_bytes(data + b"\0")
    refused(tmp_path, tmp_path / "tiny.bin", rf"more than the model's {VOCAB} pieces")
    path.unlink()
    pieces = [list(entry) for entry in PIECES]
    for entries, message in (
        (pieces[:-1], rf"must be a list of the model's {VOCAB} pieces"),
        ([*pieces[:-1], "z"], r"'z' is not \[piece, score\]"),
        ([*pieces[:-1], ["a", 0]], "holds a piece twice"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(entries))
        refused(tmp_path, tmp_path / "tiny.bin", message)
