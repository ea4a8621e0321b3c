"""Forgetting: how much worse a changed model predicts the text that its base comes from.

The text is cut into full rows of tokens, the same for both models; a masked model is asked for the
same tokens, hidden by a draw that depends on the row alone. Losses are exact sums over rows
(:mod:`samara.measure.loss`), the change is judged by a paired bootstrap over rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samara.adapt.audits.config import AuditConfig, ForgettingConfig
from samara.adapt.audits.subject import Subject
from samara.adapt.audits.verdicts import audit_row, within
from samara.data.config import LocalFiles
from samara.data.draws import Draws, Purpose
from samara.data.local_files import find_files, read_files
from samara.data.prepare import PreparedCorpus
from samara.data.rows import Batch, Rows
from samara.data.tokens import IGNORE_INDEX
from samara.errors import ConfigError, DataError
from samara.measure.compare import paired_difference
from samara.measure.loss import LossResult, evaluate_loss
from samara.registry.records import Audit

SUITE = "forgetting"


class TextRows(Rows):
    """Documents as full rows of tokens; what does not fill the last row is left out.

    Attributes:
        sequence_length: Input positions of a row, t.
    """

    def __init__(self, subject: Subject, texts: Iterable[str], config: ForgettingConfig) -> None:
        """Tokenise.

        Raises:
            ConfigError: If the model is no language model.
            DataError: If the text is too short for two rows.
        """
        if subject.kind == "labels":
            raise ConfigError(
                "forgetting: a classifier predicts no text; audit its base with the delta instead"
            )
        self._subject, self._share = subject, config.masked_share
        self._is_causal = subject.kind == "causal"
        tokenizer = subject.tokenizer
        end = tokenizer.eos_token_id if self._is_causal else tokenizer.sep_token_id
        ids: list[int] = []
        for text in texts:
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += [] if end is None else [end]
        self.sequence_length = min(config.sequence_length, subject.max_length)
        last = len(ids) - int(self._is_causal)
        self._count = last // self.sequence_length
        if self._count < 2:
            raise DataError(
                f"forgetting: the text has {len(ids)} tokens, too few for two rows of "
                f"{self.sequence_length}; give more text or a smaller sequence_length"
            )
        if config.max_tokens is not None:
            self._count = min(self._count, max(2, config.max_tokens // self.sequence_length))
        self._ids = torch.tensor(ids)

    def __len__(self) -> int:
        return self._count

    def batch(self, rows: Sequence[int]) -> Batch:
        """See :class:`~samara.data.rows.Rows`."""
        length = self.sequence_length
        start_b = torch.tensor([row * length for row in rows])[:, None]
        place_bt = start_b + torch.arange(length)
        ids_bt = self._ids[place_bt]
        positions_bt = (torch.arange(length) + self._subject.first_position).expand_as(ids_bt)
        if self._is_causal:
            targets_bt = self._ids[place_bt + 1]
            return {"input_ids": ids_bt, "targets": targets_bt, "position_ids": positions_bt}
        hidden_bt = torch.stack([self._hidden(row) for row in rows])
        return {
            "input_ids": ids_bt.masked_fill(hidden_bt, self._subject.tokenizer.mask_token_id),
            "targets": ids_bt.masked_fill(~hidden_bt, IGNORE_INDEX),
            "position_ids": positions_bt,
        }

    def _hidden(self, row: int) -> torch.Tensor:
        length = self.sequence_length
        draws = Draws(seed=0, purpose=Purpose.MASKED_LM, row=row)
        chosen = draws.subset(max(1, round(self._share * length)), of=length)
        hidden_t = torch.zeros(length, dtype=torch.bool)
        hidden_t[torch.from_numpy(chosen)] = True
        return hidden_t


def read_texts(*, corpus: Path | None, files: Sequence[Path]) -> list[str]:
    """The text to be predicted: a prepared corpus' validation documents, or files.

    Raises:
        DataError: If there is none.
    """
    if corpus is not None:
        return [document.text for document in PreparedCorpus.open(corpus).documents("validation")]
    names = [str(path) for path in files]
    source = LocalFiles(kind="files", paths=tuple(names))
    found = [document.text for document in read_files(source, find_files(names, key="--text"))]
    if not found:
        raise DataError(f"--text: {', '.join(names)}: no text in there")
    return found


def measure_loss(
    subject: Subject, texts: Sequence[str], config: ForgettingConfig, *, batch_size: int
) -> LossResult:
    """Losses of a model by row."""
    rows = TextRows(subject, texts, config)
    return evaluate_loss(
        subject.model,
        rows,
        batch_size=batch_size,
        device=subject.model.device,
        precision="float32",
    )


def forgetting_audit(before: LossResult, after: LossResult, config: AuditConfig) -> Audit:
    """Judge the change of the loss, in nats per token."""
    targets = before.num_targets.astype(np.float64)
    change = paired_difference(
        (after.nll_sum, targets),
        (before.nll_sum, targets),
        confidence=config.confidence,
        samples=config.bootstrap_samples,
        seed=config.seed,
    )
    return audit_row(
        SUITE,
        before=before.loss,
        after=after.loss,
        change=change,
        verdict=within(change, config.forgetting.max_loss_increase),
    )


def forgetting_details(before: LossResult, after: LossResult) -> dict[str, Any]:
    """Losses by row."""
    return {
        "num_targets": before.num_targets.tolist(),
        "before": before.nll_sum.tolist(),
        "after": after.nll_sum.tolist(),
    }
