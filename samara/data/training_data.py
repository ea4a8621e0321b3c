"""What the training loop asks of its data, and a prepared corpus as such data."""

from __future__ import annotations

from typing import Protocol

from samara.data.config import DataConfig, PackedRows
from samara.data.objective_rows import EVALUATION_SEED, objective_rows
from samara.data.objectives import Objective
from samara.data.openelm_path import ChunkRows, ChunkRules, DocumentLines
from samara.data.prepare import PreparedCorpus
from samara.data.rows import Rows
from samara.data.tokenizer import TextTokenizer


class TrainingData(Protocol):
    """Rows to train on and to validate with, and the tokenizer that made them.

    Attributes:
        hash: Equal hash, equal data.
        objective: What the rows ask of the model.
        tokenizer: What made the tokens; it is saved with the model.
    """

    @property
    def hash(self) -> str: ...

    @property
    def objective(self) -> Objective: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    def training_rows(self) -> Rows:
        """The rows of the training split."""
        ...

    def validation_rows(self) -> Rows | None:
        """The rows of the validation split; None if it is empty."""
        ...


class CorpusData:
    """A prepared corpus as :class:`TrainingData`, under an objective."""

    def __init__(
        self,
        corpus: PreparedCorpus,
        config: DataConfig,
        *,
        objective: Objective,
        tokenizer: TextTokenizer,
        seed: int,
    ) -> None:
        """Lay out a corpus.

        Args:
            corpus: The corpus.
            config: How its rows are made.
            objective: What the rows ask.
            tokenizer: The corpus' own, with the special tokens that the objective needs.
            seed: Of the noise in training rows; validation rows are the same for every run.
        """
        self._corpus, self._config, self._seed = corpus, config, seed
        self.hash = corpus.hash
        self.objective = objective
        self.tokenizer = tokenizer

    def training_rows(self) -> Rows:
        """See :class:`TrainingData`."""
        rows = self._config.rows
        if isinstance(rows, PackedRows):
            return self._rows("train", seed=self._seed)
        return ChunkRows(
            DocumentLines(self._corpus.documents_path("train")),
            self.tokenizer,
            rules=ChunkRules(
                words=rows.words,
                min_characters=rows.min_characters,
                min_tokens=rows.min_tokens,
                sequence_length=self._config.sequence_length,
            ),
        )

    def validation_rows(self) -> Rows | None:
        """See :class:`TrainingData`."""
        is_empty = not self._corpus.statistics["splits"]["validation"]["tokens"]
        return None if is_empty else self._rows("validation", seed=EVALUATION_SEED)

    def _rows(self, split: str, *, seed: int) -> Rows:
        return objective_rows(
            self.objective,
            self._corpus.tokens(split),
            self.tokenizer,
            sequence_length=self._config.sequence_length,
            document_boundaries=self._config.document_boundaries,
            seed=seed,
        )
