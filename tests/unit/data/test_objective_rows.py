"""From settings to rows: special tokens, and the right rows for each objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from samara.data.masked_lm import DocumentRows, MaskedRows
from samara.data.objective_rows import objective_rows, objective_tokenizer
from samara.data.objectives import CausalObjective, MaskedObjective, Objective, UL2Objective
from samara.data.special_tokens import MASK, read_special_tokens
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX, PackedSequences, TokenShards
from samara.data.ul2 import DenoisingRows
from samara.errors import ConfigError, DataError

LENGTH = 32


def build(
    objective: Objective, shards: TokenShards, tokenizer: TextTokenizer, folder: Path
) -> tuple[Any, TextTokenizer]:
    extended = objective_tokenizer(objective, tokenizer.folder, folder, sequence_length=LENGTH)
    return objective_rows(objective, shards, extended, sequence_length=LENGTH), extended


def test_causal_rows_are_the_packed_ones(shards, tokenizer, tmp_path):
    rows, copy = build(CausalObjective(), shards, tokenizer, tmp_path / "t")
    assert isinstance(rows, PackedSequences)
    assert copy.hash == tokenizer.hash


def test_masked_rows_use_the_appended_mask_token(shards, tokenizer, tmp_path):
    objective = MaskedObjective(max_predictions=3, mask_sets=10)
    rows, extended = build(objective, shards, tokenizer, tmp_path / "t")
    assert isinstance(rows, MaskedRows)
    assert rows.mask_sets == 10
    batch = rows.batch(range(len(rows)))
    mask_id = read_special_tokens(extended.folder).ids[MASK]
    assert mask_id == tokenizer.vocab_size
    assert (batch["input_ids"] == mask_id).any()
    assert batch["input_ids"].max() < extended.vocab_size
    chosen = batch["targets"][batch["targets"] != IGNORE_INDEX]
    assert not torch.isin(chosen, torch.tensor([0, 1, 2, mask_id])).any()
    assert ((batch["targets"] != IGNORE_INDEX).sum(1) <= 3).all()


def test_document_rows_take_the_marks_of_bert_where_there_are_any(shards, tokenizer, tmp_path):
    objective = MaskedObjective(rows="documents")
    rows, extended = build(objective, shards, tokenizer, tmp_path / "t")
    assert isinstance(rows.rows, DocumentRows)
    assert rows[0]["input_ids"][0] == tokenizer.special_tokens["bos_token_id"]
    path = extended.folder / "tokenizer_config.json"
    named = {**json.loads(path.read_text()), "cls_token": "<|mask|>", "sep_token": "<|pad|>"}
    path.write_text(json.dumps(named))
    rows = objective_rows(objective, shards, extended, sequence_length=LENGTH)
    size = int(rows[0]["attention_mask"].sum())
    ids = read_special_tokens(extended.folder).ids
    assert rows[0]["input_ids"][0] == ids["<|mask|>"]
    assert rows[0]["input_ids"][size - 1] == ids["<|pad|>"]


def test_ul2_rows_use_the_appended_modes_and_sentinels(shards, tokenizer, tmp_path):
    objective = UL2Objective(weights={"S-0.25": 1, "X-3-0.5": 3})
    rows, extended = build(objective, shards, tokenizer, tmp_path / "t")
    assert isinstance(rows, DenoisingRows)
    batch = rows.batch(range(len(rows)))
    ids = read_special_tokens(extended.folder).ids
    assert set(batch["input_ids"][:, 0].tolist()) == {ids["[S2S]"], ids["[NLG]"]}
    assert (batch["input_ids"] == ids["<extra_id_0>"]).any()
    ends = batch["targets"] == tokenizer.special_tokens["eos_token_id"]
    assert (ends.sum(1) >= 1).all()


def test_evaluation_rows_are_the_same_without_a_seed(shards, tokenizer, tmp_path):
    objective = MaskedObjective()
    extended = objective_tokenizer(
        objective, tokenizer.folder, tmp_path / "t", sequence_length=LENGTH
    )

    def targets(**seed: int) -> torch.Tensor:
        rows = objective_rows(objective, shards, extended, sequence_length=LENGTH, **seed)
        return rows.batch(range(len(rows)))["targets"]

    assert torch.equal(targets(), targets())
    assert not torch.equal(targets(), targets(seed=1))


def test_a_tokenizer_without_the_tokens_is_refused(shards, tokenizer):
    with pytest.raises(DataError, match=r"no special token <\|mask\|>, which masked language"):
        objective_rows(MaskedObjective(), shards, tokenizer, sequence_length=LENGTH)
    with pytest.raises(DataError, match=r"no special token \[NLU\], which UL2 needs"):
        objective_rows(UL2Objective(), shards, tokenizer, sequence_length=LENGTH)


def test_ul2_needs_an_end_mark(shards, tokenizer, tmp_path):
    copy = tokenizer.copy_to(tmp_path / "t")
    (copy.folder / "tokenizer_config.json").write_text("{}")
    unmarked = TextTokenizer.load(copy.folder)
    with pytest.raises(DataError, match="no eos_token, with which UL2's targets end"):
        objective_rows(UL2Objective(), shards, unmarked, sequence_length=LENGTH)


# --- settings ---------------------------------------------------------------------------------


def test_the_kind_decides():
    adapter = TypeAdapter(Objective)
    assert adapter.validate_python({"kind": "ul2"}) == UL2Objective()
    assert adapter.validate_python({"kind": "masked_lm", "fraction": 0.3}) == MaskedObjective(
        fraction=0.3
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"X-8-0.15": 1.0}, r"no denoiser 'X-8-0.15' \(did you mean 'X-8-0.5'"),
        ({"S-0.25": 0.0}, "at least one denoiser a weight above 0"),
        ({}, "at least one denoiser a weight above 0"),
        ({"S-0.25": -1.0}, "greater than or equal to 0"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], message: str):
    with pytest.raises((ConfigError, ValidationError), match=message):
        UL2Objective(weights=weights)
