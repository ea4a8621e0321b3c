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


class DeltaError(SamaraError):
    """A delta file, or what it is to be applied to, is not what it must be."""


class CorruptDelta(DeltaError):  # noqa: N818 - the file format's own names, here and below
    """A delta file is cut short, changed, or no delta file."""


class WrongBase(DeltaError):  # noqa: N818
    """The weights are not those that the delta was made for."""


class ShapeMismatch(WrongBase):
    """A tensor is missing, or of another shape or type than in the delta's base."""


class AlreadyApplied(DeltaError):  # noqa: N818
    """The weights carry this delta already."""


class OutOfOrder(DeltaError):  # noqa: N818
    """The delta belongs on other deltas than those applied, or is not the last of them."""


class LicenseDenied(DeltaError):  # noqa: N818
    """The delta's licence record forbids what was asked."""


class SignatureRefused(DeltaError):  # noqa: N818
    """A delta's signature is missing, damaged, of something else, or of another key."""


class TiedTensorDuplicate(DeltaError):  # noqa: N818
    """One tensor would be changed under two names."""


class OverlapConflict(DeltaError):  # noqa: N818
    """Deltas to be composed change the same weights."""


class RegistryError(SamaraError):
    """A registry refuses: unknown name, damaged object or log, or somebody else was faster."""


class GateError(RegistryError):
    """A version does not pass the gates of the alias it was to be given."""


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
