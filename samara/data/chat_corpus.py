"""Files of conversations as training data: found, split by record, tokenised, packed, counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from samara.data.chat import ChatEncoder, ChatRows
from samara.data.chat_records import Conversation, read_conversations
from samara.data.config import ChatConfig, SplitConfig
from samara.data.local_files import find_files
from samara.data.objectives import CausalObjective
from samara.data.splits import split_of
from samara.data.tokenizer import TextTokenizer
from samara.errors import DataError
from samara.runs import hash_file, hash_json


class ChatCorpus:
    """Conversations as :class:`~samara.data.training_data.TrainingData`.

    Attributes:
        hash: Of the files' contents, the split and the tokenizer with its chat template.
        objective: Next-token prediction, counted on the answers.
        tokenizer: A tokenizer with a chat template.
        statistics: Per split the :class:`~samara.data.chat.ChatStatistics`, and what was skipped.
    """

    def __init__(self, config: ChatConfig, tokenizer: TextTokenizer) -> None:
        """Read and tokenise all of it.

        Args:
            config: Which files, and how they are split.
            tokenizer: See above.

        Raises:
            DataError: If a file is missing or a record malformed (with file and line), if one is
                too long and to be refused, or if a split that is asked for is empty.
        """
        self.objective = CausalObjective()
        self.tokenizer = tokenizer
        self._config, self._encoder = config, ChatEncoder(tokenizer.folder)
        self._validation_files = _files(config.validation_paths, key="data.validation_paths")
        held_out = {path.resolve() for path in self._validation_files}
        files = _files(config.paths, key="data.paths")
        self._files = [path for path in files if path.resolve() not in held_out]
        self.hash = hash_json(
            {
                "files": [hash_file(path) for path in self._files],
                "validation_files": [hash_file(path) for path in self._validation_files],
                "validation_fraction": config.validation_fraction,
                "tokenizer": tokenizer.hash,
            }
        )
        skipped: Counter[str] = Counter()
        self._training = self._rows(self._read("train", skipped), key="data.paths")
        self._validation: ChatRows | None = None
        if self._validation_files:
            held = read_conversations(self._validation_files, skipped=skipped)
            self._validation = self._rows(held, key="data.validation_paths")
        elif config.validation_fraction:
            held = self._read("validation", Counter())  # the same files: counted already
            self._validation = self._rows(held, key="data.validation_fraction")
        self.statistics: dict[str, Any] = {
            "train": asdict(self._training.statistics),
            "validation": self._validation and asdict(self._validation.statistics),
            "skipped": dict(skipped),
        }

    def training_rows(self) -> ChatRows:
        """See :class:`~samara.data.training_data.TrainingData`."""
        return self._training

    def validation_rows(self) -> ChatRows | None:
        """See :class:`~samara.data.training_data.TrainingData`."""
        return self._validation

    def _rows(self, conversations: Iterator[Conversation], *, key: str) -> ChatRows:
        first = next(conversations, None)
        if first is None:
            raise DataError(
                f"{key}: gives no conversation with an answer; name other files, or another "
                "data.validation_fraction (0: no validation)"
            )
        return ChatRows(
            itertools.chain([first], conversations),
            self._encoder,
            sequence_length=self._config.sequence_length,
            too_long=self._config.too_long,
        )

    def _read(self, split: str, skipped: Counter[str]) -> Iterator[Conversation]:
        """The conversations of ``data.paths`` that fall into a split, record by record."""
        fraction = 0.0 if self._validation_files else self._config.validation_fraction
        rule = SplitConfig(validation_fraction=fraction, test_fraction=0.0)
        conversations = read_conversations(self._files, skipped=skipped)
        for _, record in itertools.groupby(conversations, key=attrgetter("origin")):
            group = list(record)
            turns = [[(m.role, m.content) for m in c.messages] for c in group]
            if split_of(hash_json(turns), rule) == split:
                yield from group


def _files(patterns: Sequence[str], *, key: str) -> list[Path]:
    files = find_files(patterns, key=key)
    for path in files:
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            raise DataError(f"{key}: '{path}' is no JSON Lines file (.jsonl, .jsonl.gz)")
    return files
