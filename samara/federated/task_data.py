"""The rows of a federation: the server's, and each client's, tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from samara.adapt.config import LabelsConfig
from samara.adapt.data import AnswerRows, LabelRows, TaskRows, answer_rows, label_position
from samara.data.rows import Batch, Rows
from samara.federated.config import FederateConfig, KeyPartition
from samara.federated.partition import ClientRows, IntArray, partition, split_rows
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
    """The data sets of a run that are on this machine: all, the server's, or one client's.

    Attributes:
        parts: Per client the numbers of its rows among the training rows.
        num_clients: Clients there are, wherever.
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
        only_client: int | None = None,
    ) -> None:
        """Tokenise, and deal the training rows out.

        Args:
            config: The recipe.
            rows: To train on and to validate with. Without the first this is a server whose clients
                have theirs on machines of their own.
            test: Scored at the end; a client's machine has none.
            labels: Of a task that has any.
            model: For how a prompted task is read.
            tokenizer: Of the model.
            only_client: All training rows are this client's.

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

        def all_of(own: Sequence[Row]) -> ChosenRows | None:
            return ChosenRows(tokenised(own), range(len(own))) if own else None

        self._train = tokenised(rows.train) if rows.train else None
        scored = spread(len(test), config.task.limit)
        self._validation = all_of(rows.validation)
        self._test = all_of([test[place] for place in scored])
        if only_client is not None:
            dealt = {only_client: np.arange(len(rows.train))}
        elif rows.train:
            dealt = dict(enumerate(deal_rows(config, rows.train, labels=labels)))
        else:
            dealt = {}
        self.num_clients = config.clients.number or len(dealt)
        self.parts: dict[int, ClientRows] = {
            client: split_rows(
                own,
                validation=config.clients.validation_fraction,
                test=config.clients.test_fraction,
                seed=config.seed,
                client=client,
            )
            for client, own in dealt.items()
        }

    @property
    def validation(self) -> ChosenRows:
        """The server's, for the best weights and going back to them."""
        assert self._validation is not None, "these rows are the server's"
        return self._validation

    @property
    def test(self) -> ChosenRows:
        """The server's, scored at the end."""
        assert self._test is not None, "these rows are the server's"
        return self._test

    def client(self, client: int) -> ClientData:
        """The data sets of one client."""
        assert self._train is not None, "these rows are with the client"
        own = self.parts[client]
        return ClientData(
            train=ChosenRows(self._train, own.train.tolist()),
            validation=ChosenRows(self._train, own.validation.tolist()),
            test=ChosenRows(self._train, own.test.tolist()),
        )


def deal_rows(
    config: FederateConfig, rows: Sequence[Row], *, labels: Sequence[str] | None
) -> list[IntArray]:
    """The numbers of each client's rows among all, ascending.

    Raises:
        ConfigError, DataError: If the rows do not fit the task or the partition.
    """
    chosen, task = config.clients.partition, config.task
    keys = positions = None
    if isinstance(chosen, KeyPartition):
        keys = [as_text(row.get(chosen.field)) for row in rows]
    if isinstance(task, LabelsConfig):
        assert labels is not None
        positions = [label_position(row, task, labels) for row in rows]
    return partition(
        chosen,
        num_rows=len(rows),
        num_clients=config.clients.number,
        seed=config.seed,
        labels=positions,
        keys=keys,
    )
