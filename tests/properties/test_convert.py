"""Properties of the conversions, for any design that a format can express."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from samara.model.config import LayerwiseScaling, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.gguf_format import neighbouring_rows
from samara.model.interchange.hf_folder import parse_size
from samara.model.interchange.llama2c_format import half_split_rows
from samara.model.interchange.llama_format import llama_config, parse_llama_config
from samara.model.interchange.openelm_format import (
    openelm_config,
    parse_openelm_config,
    why_not_openelm,
)
from samara.model.interchange.piece_tokenizer import (
    BYTES,
    SPACE,
    Pieces,
    hugging_face_files,
    scores_of,
)
from samara.model.interchange.stored_tensors import in_memory, join_rows, split_rows

PATH = Path("config.json")
counts = st.integers(1, 12)


@st.composite
def openelm_designs(draw):
    layers, group = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    keys = draw(st.lists(st.integers(1, 6), min_size=layers, max_size=layers))
    return ModelConfig(
        hidden_size=draw(st.integers(1, 40)) * 4,
        num_hidden_layers=layers,
        head_dim=draw(st.sampled_from([2, 8, 16])),
        num_query_heads=tuple(group * k for k in keys),
        num_kv_heads=tuple(keys),
        ffn_dim=tuple(draw(st.lists(st.integers(1, 600), min_size=layers, max_size=layers))),
        vocab_size=draw(st.integers(1, 100)),
        max_position_embeddings=draw(st.integers(1, 4096)),
        rope_theta=draw(st.floats(1.0, 1e6)),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(openelm_designs())
def test_an_openelm_config_reads_back_as_the_same_design(design):
    config = SamaraConfig.from_design(design, bos_token_id=7, eos_token_id=None)
    if why_not_openelm(config) is not None:
        assert design.num_hidden_layers == 2  # two multipliers are also a range
        return
    again = parse_openelm_config(PATH, openelm_config(config))
    assert again.to_design() == config.to_design()
    assert (again.bos_token_id, again.eos_token_id) == (7, None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 20),
    st.integers(4, 24),
    st.sampled_from([32, 64]),
    st.integers(1, 4),
    # Two decimals, as the field holds: other ends need not have a range, see below.
    st.tuples(st.integers(30, 100), st.integers(100, 200)).map(lambda p: (p[0] / 100, p[1] / 100)),
    st.tuples(st.floats(0.5, 2.0), st.floats(2.0, 5.0)),
)
def test_every_layer_wise_scaling_has_a_range_for_apples_code(
    layers, heads, width, group, alpha, beta
):
    design = ModelConfig(
        hidden_size=heads * width, num_hidden_layers=layers, head_dim=width, gqa_group_size=group,
        layerwise_scaling=LayerwiseScaling(alpha=alpha, beta=beta), vocab_size=10,
    )  # fmt: skip
    config = SamaraConfig.from_design(design)
    fields = openelm_config(config)
    lists = {key: fields.pop(key) for key in ("num_query_heads", "num_kv_heads")}
    again = parse_openelm_config(PATH, fields)  # from qkv_multipliers alone
    assert [again.num_query_heads, again.num_kv_heads] == list(lists.values())
    assert all(len(str(m)) <= 4 for m in fields["qkv_multipliers"])  # two decimals


def test_ends_between_two_decimals_may_have_no_range_and_go_by_their_lists():
    design = ModelConfig(
        hidden_size=12 * 32, num_hidden_layers=4, head_dim=32, vocab_size=10,
        layerwise_scaling=LayerwiseScaling(alpha=(0.375, 1.375), beta=(1.0, 2.0)),
    )  # fmt: skip
    config = SamaraConfig.from_design(design)
    fields = openelm_config(config)
    assert "qkv_multipliers" not in fields
    assert parse_openelm_config(PATH, fields).to_design() == config.to_design()


@settings(max_examples=40, deadline=None)
@given(counts, counts, st.integers(1, 4), st.floats(1.0, 1e6), st.floats(1e-8, 1e-3), st.booleans())
def test_a_llama_config_reads_back_as_the_same_design(layers, keys, group, theta, eps, tied):
    design = ModelConfig(
        hidden_size=8, num_hidden_layers=layers, head_dim=6, num_query_heads=keys * group,
        num_kv_heads=keys, ffn_dim=5, qk_norm=False, rope_theta=theta, rms_norm_eps=eps,
        tie_word_embeddings=tied, vocab_size=10, initializer={"kind": "normal", "std": 0.5},
    )  # fmt: skip
    config = SamaraConfig.from_design(design, eos_token_id=[1, 2])
    again = parse_llama_config(PATH, llama_config(config))
    assert again.to_design() == config.to_design()
    assert (again.bos_token_id, again.eos_token_id) == (None, [1, 2])


@settings(max_examples=50, deadline=None)
@given(counts, st.integers(1, 8), st.integers(1, 5))
def test_interleaving_rotary_pairs_and_back_changes_nothing(heads, half, columns):
    matrix = torch.arange(heads * 2 * half * columns).view(-1, columns).float()
    halves = in_memory(matrix)
    pairs = neighbouring_rows(halves, heads)
    assert torch.equal(half_split_rows(pairs, heads).load(), matrix)
    first_head = pairs.load()[: 2 * half]
    assert torch.equal(first_head[0::2], matrix[:half])
    assert torch.equal(first_head[1::2], matrix[half : 2 * half])


@settings(max_examples=50, deadline=None)
@given(st.lists(counts, min_size=1, max_size=4), counts)
def test_splitting_undoes_joining(rows, columns):
    parts = [torch.rand(count, columns) for count in rows]
    joined = join_rows("x", [in_memory(part) for part in parts])
    assert joined.shape == (sum(rows), columns) == tuple(joined.load().shape)
    for part, again in zip(parts, split_rows(joined, rows), strict=True):
        assert torch.equal(again.load(), part)
        assert again.shape == tuple(part.shape)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["", "B", "KB", "mb", " GB"]))
def test_sizes_are_powers_of_a_thousand(number, unit):
    factor = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[unit.strip().upper()]
    assert parse_size(f"{number}{unit}") == number * factor


@st.composite
def vocabularies(draw):
    """Letters, and pieces merged from earlier ones, in a random order of scores."""
    letters = [SPACE, *"abc"]
    pieces = list(letters)
    for _ in range(draw(st.integers(0, 12))):
        left, right = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if left + right not in pieces and len(left + right) <= 6:
            pieces.append(left + right)
    order = draw(st.permutations(pieces))
    special = ["<unk>", "<s>", "</s>", *sorted(BYTES)]
    scores = [0.0] * len(special) + [-float(i) for i in range(len(order))]
    return Pieces(pieces=[*special, *order], scores=scores, unk=0, bos=1, eos=2)


@settings(max_examples=60, deadline=None)
@given(vocabularies(), st.text(alphabet="abc é\n", max_size=12))
def test_a_sentencepiece_vocabulary_is_lossless_and_keeps_its_order_of_merges(vocabulary, text):
    content = json.loads(hugging_face_files(vocabulary)["tokenizer.json"])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    scores = scores_of(content)
    assert scores is not None
    made = ["".join(merge) for merge in content["model"]["merges"]]
    best_first = sorted(set(made), key=lambda piece: -scores[vocabulary.pieces.index(piece)])
    expected = sorted(
        set(made), key=lambda piece: -vocabulary.scores[vocabulary.pieces.index(piece)]
    )
    assert best_first == expected


def test_merges_that_follow_from_no_scores_have_none():
    vocabulary = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    merges = [["a", "b"], ["b", "a"], ["ab", "a"], ["a", "ba"]]
    scores = scores_of({"model": {"vocab": vocabulary, "merges": merges}})
    assert scores == [-4.0, -4.0, 0.0, -1.0, -2.0]
    as_text = [" ".join(merge) for merge in merges]
    assert scores_of({"model": {"vocab": vocabulary, "merges": as_text}}) == scores
    # SentencePiece would also make aba from a and ba.
    assert scores_of({"model": {"vocab": vocabulary, "merges": merges[:3]}}) is None
    # aba ranks before and after ba: no one score does that.
    mixed = [merges[i] for i in (0, 2, 1, 3)]
    assert scores_of({"model": {"vocab": vocabulary, "merges": mixed}}) is None
