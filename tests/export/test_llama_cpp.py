"""GGUF files run by llama.cpp: the same logits, the same greedy text, the same tokens."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

pytest.importorskip("gguf", reason="gguf is not installed (extra export)")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it builds for minutes)")

from llama_cpp import Llama

from samara.model.interchange.convert import convert
from samara.model.interchange.gguf_tokenizer import LLAMA3_PATTERN
from samara.model.interchange.piece_tokenizer import BYTES, SPACE, Pieces, hugging_face_files

LOGITS = 1e-3
F32 = 0  # GGML_TYPE_F32, of the key-value cache
TRICKY = [
    "Once upon a time, it's 12345 o'clock; we've 3 cafés…\n\n  indented\ttabs  ",
    "  two spaces first",
    "Grüße, 東京 и Москва 🙂 <|eos|>",
    "",
]


@contextlib.contextmanager
def runtime(folder, **options):
    model = Llama(
        str(folder / "model.gguf"), n_ctx=200, n_batch=64, n_threads=1, n_threads_batch=1,
        type_k=F32, type_v=F32, logits_all=True, verbose=False, **options,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()


def logits(model, ids):
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("kind", ["openelm", "llama"])
def test_logits_and_64_greedy_tokens_are_equal(kind, converted, request):
    folder, model = request.getfixturevalue(kind)
    prompt = [1, *range(20, 50)]
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0
    )[0].tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with runtime(converted(folder, "gguf")) as loaded:
        assert np.abs(logits(loaded, ids) - expected).max() < LOGITS
        loaded.reset()
        loaded.eval(prompt)
        greedy = []
        for _ in range(64):
            token = int(loaded.scores[loaded.n_tokens - 1].argmax())
            greedy.append(token)
            loaded.eval([token])
    assert greedy == ids[len(prompt) :]
    assert len(set(greedy)) > 5, "a model that repeats itself shows little"


def test_the_output_matrix_of_an_untied_llama_is_used(make_model, converted):
    folder, model = make_model(
        hidden_size=48, num_hidden_layers=2, head_dim=16, ffn_dim=96, vocab_size=320,
        qk_norm=False, tie_word_embeddings=False,
    )  # fmt: skip
    ids = list(range(3, 43))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with runtime(converted(folder, "gguf")) as loaded:
        assert np.abs(logits(loaded, ids) - expected).max() < LOGITS


def test_what_only_gguf_can_express_of_openelm_is_equal(make_model, converted):
    """Another eps, and groups of another size in each layer: OpenELM's config.json has no words."""
    folder, model = make_model(
        hidden_size=64, num_hidden_layers=2, head_dim=16, num_query_heads=[4, 6],
        num_kv_heads=[4, 2], ffn_dim=[40, 72], rms_norm_eps=1e-3, vocab_size=320,
    )  # fmt: skip
    ids = list(range(3, 43))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with runtime(converted(folder, "gguf")) as loaded:
        assert np.abs(logits(loaded, ids) - expected).max() < LOGITS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_what_torch_makes_of_it(dtype, openelm, converted):
    folder, model = openelm
    rounded = type(model)(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
        ids = list(range(3, 43))
        expected = rounded(torch.tensor([ids])).logits[0].numpy()
    with runtime(converted(folder, "gguf", dtype=dtype)) as loaded:
        # llama.cpp also rounds the activations that it multiplies with these matrices.
        assert np.abs(logits(loaded, ids) - expected).max() < 0.05 * np.abs(expected).max()


def test_our_byte_level_tokenizer_gives_the_same_tokens(openelm, converted, tokenizer_folder):
    ours = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ours.encode_special_tokens = True
    with runtime(converted(openelm[0], "gguf")) as loaded:
        for text in TRICKY:
            found = loaded.tokenize(text.encode(), add_bos=True, special=False)
            assert found == ours.encode(text).ids, text
            assert loaded.detokenize(found[1:]).decode() == text
        assert (loaded.token_bos(), loaded.token_eos()) == (1, 2)
        assert loaded.tokenize(b"<|eos|>", add_bos=False, special=True) == [2]


def test_digits_cut_one_by_one_are_smollms_way(openelm, converted, tmp_path):
    folder = tmp_path / "smollm"
    folder.mkdir()
    for file in openelm[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with runtime(converted(folder, "gguf")) as loaded:
        for text in TRICKY[:2]:
            assert loaded.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text).ids


def test_llama_3s_way_of_cutting_keeps_whole_words(openelm, converted, tmp_path):
    folder = tmp_path / "llama3"
    folder.mkdir()
    for file in openelm[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA3_PATTERN},
                "behavior": "Isolated",
                "invert": False,
            },
            {**content["pre_tokenizer"], "use_regex": False},
        ],
    }
    content["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with runtime(converted(folder, "gguf")) as loaded:
        for text in TRICKY[:2]:
            assert loaded.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text).ids


def sentencepiece_like() -> dict[str, bytes]:
    """A vocabulary with merges, whose scores matter: "the" wins over "th" + "e" only by them."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz'."]
    merged = ["th", "he", "the", f"{SPACE}t", f"{SPACE}the", "in", "ing", f"{SPACE}a", "nd", "and"]
    pieces = ["<unk>", "<s>", "</s>", *sorted(BYTES), *merged, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    return hugging_face_files(Pieces(pieces=pieces, scores=scores, unk=0, bos=1, eos=2))


def test_sentencepiece_vocabularies_give_the_same_tokens(llama, converted, tmp_path):
    folder = tmp_path / "pieces"
    folder.mkdir()
    for file in llama[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    files = sentencepiece_like()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    ours.encode_special_tokens = True
    with runtime(converted(folder, "gguf")) as loaded:
        for text in ["the king and the thing", " and then", *TRICKY[:3]]:
            found = loaded.tokenize(text.encode(), add_bos=True, special=False)
            assert found == ours.encode(text).ids, text
            assert loaded.detokenize(found[1:]).decode() == f" {text}"


def test_the_chat_template_travels_in_the_file(openelm, converted, tmp_path):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in openelm[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    with runtime(converted(folder, "gguf")) as loaded:
        assert loaded.metadata["tokenizer.chat_template"] == template
    (folder / "chat_template.jinja").write_text("newer")
    with runtime(convert(folder, tmp_path / "again", to="gguf").folder) as loaded:
        assert loaded.metadata["tokenizer.chat_template"] == "newer"
