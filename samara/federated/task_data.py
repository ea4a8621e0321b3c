"""The rows of a federation: the server's, and each client's, tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from samara.adapt.config import LabelsConfig
from samara.adapt.data import AnswerRows, LabelRows, TaskRows, answer_rows
from samara.data.rows import Batch, Rows
from samara.federated.config import FederateConfig, KeyPartition
from samara.federated.partition import ClientRows, partition, split_rows
from samara.measure.language_model import LanguageModel
from samara.measure.task_rows import Row, as_text, spread

TokenRows = LabelRows | AnswerRows


class ChosenRows(Rows):
    """Some rows of a data set, as a data set."""

    def __init__(self, rows: TokenRows, chosen: Sequence[int]) -> None:
        assert len(chosen), "a data set has rows"
        self.sequence_length = rows.sequence_length
        self._rows, self._chosen = rows, [int(row) for row in chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def batch(self, rows: Sequence[int]) -> Batch:
        """See :class:`~samara.data.rows.Rows`."""
        return self._rows.batch([self._chosen[int(row) % len(self)] for row in rows])

    @property
    def targets(self) -> list[int]:
        """The labels, of a task that has any."""
        assert isinstance(self._rows, LabelRows)
        return [self._rows.targets[row] for row in self._chosen]


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """One client's data sets."""

    train: ChosenRows
    validation: ChosenRows
    test: ChosenRows


class FederatedData:
    """All data sets of a run.

    Attributes:
        validation: The server's, for the best weights and going back to them.
        test: Scored at the end.
        parts: Per client the numbers of its rows among the training rows.
    """

    def __init__(
        self,
        config: FederateConfig,
        rows: TaskRows,
        test: Sequence[Row],
        *,
        labels: Sequence[str] | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Tokenise, and deal the training rows out.

        Raises:
            ConfigError, DataError: If the rows do not fit the task or the partition.
        """
        self._config = config

        def tokenised(own: Sequence[Row]) -> TokenRows:
            length = config.data.sequence_length
            if isinstance(config.task, LabelsConfig):
                assert labels is not None
                return LabelRows(own, config.task, labels, tokenizer, sequence_length=length)
            asked = LanguageModel(model, tokenizer)
            return answer_rows(own, config.task, asked, sequence_length=length)

        self._train = tokenised(rows.train)
        self.validation = _all(tokenised(rows.validation))
        scored = spread(len(test), config.task.limit)
        self.test = _all(tokenised([test[place] for place in scored]))
        chosen = config.clients.partition
        keys = None
        if isinstance(chosen, KeyPartition):
            keys = [as_text(row.get(chosen.field)) for row in rows.train]
        dealt = partition(
            chosen,
            num_rows=len(rows.train),
            num_clients=config.clients.number,
            seed=config.seed,
            labels=self._train.targets if isinstance(self._train, LabelRows) else None,
            keys=keys,
        )
        self.parts: list[ClientRows] = [
            split_rows(
                own,
                validation=config.clients.validation_fraction,
                test=config.clients.test_fraction,
                seed=config.seed,
                client=client,
            )
            for client, own in enumerate(dealt)
        ]

    @property
    def num_clients(self) -> int:
        return len(self.parts)

    def client(self, client: int) -> ClientData:
        """The data sets of one client."""
        own = self.parts[client]
        return ClientData(
            train=ChosenRows(self._train, own.train.tolist()),
            validation=ChosenRows(self._train, own.validation.tolist()),
            test=ChosenRows(self._train, own.test.tolist()),
        )


def _all(rows: TokenRows) -> ChosenRows:
    return ChosenRows(rows, range(len(rows)))
