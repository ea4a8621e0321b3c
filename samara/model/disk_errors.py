"""A full disk as safetensors reports it, turned into what every other write raises."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from safetensors import SafetensorError


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a failed write of safetensors into an ``OSError``, as those of every other write are."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
