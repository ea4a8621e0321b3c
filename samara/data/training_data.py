"""What the training loop asks of its data, and a prepared corpus as such data."""

from __future__ import annotations

from typing import Protocol

from samara.data.config import DataConfig, PackedRows
from samara.data.openelm_path import ChunkRows, ChunkRules, DocumentLines
from samara.data.prepare import PreparedCorpus
from samara.data.rows import Rows
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import PackedSequences


class TrainingData(Protocol):
    """Rows to train on and to validate with, and the tokenizer that made them.

    Attributes:
        hash: Equal hash, equal data.
        tokenizer: What made the tokens; it is saved with the model.
    """

    @property
    def hash(self) -> str: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    def training_rows(self) -> Rows:
        """The rows of the training split."""
        ...

    def validation_rows(self) -> Rows | None:
        """The rows of the validation split; None if it is empty."""
        ...


class CorpusData:
    """A prepared corpus as :class:`TrainingData`."""

    def __init__(self, corpus: PreparedCorpus, config: DataConfig) -> None:
        self._corpus, self._config = corpus, config
        self.hash = corpus.hash
        self.tokenizer = TextTokenizer.load(corpus.tokenizer_folder)

    def training_rows(self) -> Rows:
        """See :class:`TrainingData`."""
        rows = self._config.rows
        if isinstance(rows, PackedRows):
            return self._packed("train")
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
        return None if is_empty else self._packed("validation")

    def _packed(self, split: str) -> PackedSequences:
        return PackedSequences(
            self._corpus.tokens(split),
            sequence_length=self._config.sequence_length,
            document_boundaries=self._config.document_boundaries,
        )
