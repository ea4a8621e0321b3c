"""The errors a user can mend.

Every one is a ``ValueError`` whose message is a single clear line: it names the key or file, the
value found, and what to do. The command line prints that line and leaves with status 2; anything
else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SamaraError(ValueError):
    """Base of all errors that the user can mend."""


class ConfigError(SamaraError):
    """A recipe, an override or an argument is wrong; the message starts with its full path."""


class DataError(SamaraError):
    """A corpus, tokenizer, or token shard is missing, empty, or damaged."""


class CheckpointError(SamaraError):
    """A checkpoint or run folder is missing, incomplete, or made for something else."""


class ResourceError(SamaraError):
    """The machine cannot do it: not enough memory or disk."""


class NonFiniteLossError(SamaraError):
    """Training met a loss or gradient that is not a finite number, and stopped before using it."""


class RaceError(SamaraError):
    """No candidate of a growth is left to go on with."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest of ``options``, else the list of them.

    Args:
        name: What the user wrote.
        options: The valid spellings.

    Returns:
        A suffix for an error message, with its leading space.
    """
    choices = sorted(options)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(choices)})" if choices else ""


class Stopped(Exception):  # noqa: N818 - not an error: the work was asked to stop, and saved first
    """A signal asked the work to stop; its state is saved and running it again goes on.

    Attributes:
        signal_number: The signal received.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
