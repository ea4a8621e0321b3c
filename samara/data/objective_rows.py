"""From an ``objective:`` section and a prepared split to the rows that the loader reads."""

from __future__ import annotations

from pathlib import Path

from samara.data.masked_lm import DocumentRows, Frame, MaskedRows, MaskingRule
from samara.data.objectives import CausalObjective, MaskedObjective, Objective, UL2Objective
from samara.data.rows import Rows
from samara.data.special_tokens import extend_tokenizer, read_special_tokens
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import PackedSequences, TokenShards
from samara.data.ul2 import MODE_TOKENS, DenoisingRows, UL2Ids, ul2_tokens
from samara.errors import DataError

EVALUATION_SEED = 0
"""Of validation rows, in every run: models are compared under the same masks."""


def objective_tokenizer(
    objective: Objective, source: Path, folder: Path, *, sequence_length: int
) -> TextTokenizer:
    """Copy a tokenizer with the special tokens that an objective needs; text keeps its ids.

    The model's vocabulary is that of the copy.

    Args:
        objective: The settings.
        source: The corpus' tokenizer folder.
        folder: Where the copy goes; must not exist.
        sequence_length: Inputs of a row; decides how many sentinels there are.
    """
    match objective:
        case MaskedObjective():
            tokens: tuple[str, ...] = (read_special_tokens(source).mask,)
        case UL2Objective():
            tokens = ul2_tokens(sequence_length)
        case CausalObjective():
            tokens = ()
    return extend_tokenizer(source, folder, tokens=tokens)


def objective_rows(
    objective: Objective,
    shards: TokenShards,
    tokenizer: TextTokenizer,
    *,
    sequence_length: int,
    document_boundaries: bool = True,
    seed: int = EVALUATION_SEED,
) -> Rows:
    """The rows of a split under an objective.

    Args:
        objective: The settings.
        shards: The split.
        tokenizer: Of :func:`objective_tokenizer`.
        sequence_length: Inputs of a row, t.
        document_boundaries: Whether packed documents are kept apart.
        seed: Of the noise; leave it out for evaluation.

    Raises:
        ConfigError: If the row is too short for the objective.
        DataError: If the split is too small, or the tokenizer lacks a special token.
    """
    if isinstance(objective, UL2Objective):
        return DenoisingRows(
            shards,
            sequence_length=sequence_length,
            ids=_ul2_ids(tokenizer, sequence_length),
            seed=seed,
            weights=objective.weights,
        )
    if isinstance(objective, MaskedObjective) and objective.rows == "documents":
        plain: PackedSequences | DocumentRows = _document_rows(shards, tokenizer, sequence_length)
    else:
        plain = PackedSequences(
            shards, sequence_length=sequence_length, document_boundaries=document_boundaries
        )
    if isinstance(objective, MaskedObjective):
        rule = _masking_rule(objective, tokenizer)
        return MaskedRows(plain, rule=rule, seed=seed, mask_sets=objective.mask_sets)
    return plain


def _masking_rule(objective: MaskedObjective, tokenizer: TextTokenizer) -> MaskingRule:
    special = read_special_tokens(tokenizer.folder)
    (mask_id,) = special.ids_of([special.mask], needed_by="masked language modelling")
    return MaskingRule(
        mask_token_id=mask_id,
        special_token_ids=tuple(sorted(special.ids.values())),
        vocab_size=tokenizer.vocab_size,
        fraction=objective.fraction,
        max_predictions=objective.max_predictions,
    )


def _document_rows(
    shards: TokenShards, tokenizer: TextTokenizer, sequence_length: int
) -> DocumentRows:
    special = read_special_tokens(tokenizer.folder)
    marks = tokenizer.special_tokens
    return DocumentRows(
        shards,
        sequence_length=sequence_length,
        in_stream=Frame(first=marks["bos_token_id"], last=marks["eos_token_id"]),
        in_row=Frame(
            first=special.id_of("cls_token", "bos_token"),
            last=special.id_of("sep_token", "eos_token"),
        ),
    )


def _ul2_ids(tokenizer: TextTokenizer, sequence_length: int) -> UL2Ids:
    end = tokenizer.special_tokens["eos_token_id"]
    if end is None:
        raise DataError(
            f"{tokenizer.folder}: the tokenizer has no eos_token, with which UL2's targets end; "
            "name one in tokenizer_config.json"
        )
    special = read_special_tokens(tokenizer.folder)
    ids = special.ids_of(ul2_tokens(sequence_length), needed_by="UL2")
    num_modes = len(MODE_TOKENS)
    return UL2Ids(
        modes=dict(zip(MODE_TOKENS, ids[:num_modes], strict=True)),
        sentinels=tuple(ids[num_modes:]),
        end=end,
    )
