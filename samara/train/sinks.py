"""Other places that metrics go to, besides ``metrics.jsonl``: TensorBoard and Trackio.

Both are optional (extra ``tracking``) and imported when a recipe names them. They follow the run;
``metrics.jsonl`` is the record: after a crash, the steps done again appear twice in Trackio.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from samara.errors import ConfigError
from samara.runs import RunFolder


class Sink(Protocol):
    """Takes the records of ``metrics.jsonl`` one by one."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Flush what is pending."""
        ...


@contextlib.contextmanager
def open_sinks(names: Sequence[str], *, run: RunFolder, start_step: int) -> Iterator[list[Sink]]:
    """Open the sinks a recipe names, and close them afterwards.

    Args:
        names: ``tensorboard``, ``trackio``.
        run: The run they follow.
        start_step: Steps done before: where a resumed run goes on.

    Raises:
        ConfigError: If a sink's package is not installed.
    """
    makers: dict[str, type[TensorBoard | Trackio]] = {
        "tensorboard": TensorBoard,
        "trackio": Trackio,
    }
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = []
        for name in names:
            try:
                sink: Sink = makers[name](run, start_step=start_step)
            except ImportError as error:
                raise ConfigError(
                    f"logging.sinks: {name} is not installed ({error}); "
                    "pip install 'samara[tracking]', or remove it from the list"
                ) from error
            stack.callback(sink.close)
            sinks.append(sink)
        yield sinks


class TensorBoard:
    """Writes event files to ``RUN/tensorboard``."""

    def __init__(self, run: RunFolder, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a crashed process wrote after the checkpoint.
        self._writer: Any = SummaryWriter(
            log_dir=str(run.path / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Add each number under its own name."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class Trackio:
    """Logs to the local Trackio project ``samara``, as the run ``PARENT/NAME`` of its folder."""

    def __init__(self, run: RunFolder, *, start_step: int) -> None:
        import trackio

        self._trackio: Any = trackio
        path = run.path.resolve()
        with contextlib.redirect_stdout(sys.stderr):  # Trackio announces itself by print
            trackio.init(
                project="samara",
                name=f"{path.parent.name}/{path.name}",
                resume="allow" if start_step else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's numbers at its step."""
        self._trackio.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Send what is pending to the local database."""
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float))
    }
