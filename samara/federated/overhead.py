"""What the server itself costs beside its clients: CPU time of planning, aggregating and saving.

Not in it: the clients' training and their own files, and the scoring of validation rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class CpuWatch:
    """Adds up the CPU time of this process while it runs and is not paused.

    Attributes:
        seconds: So far; may be set.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def read(self) -> float:
        """The seconds up to now."""
        now = time.process_time()
        if self._since is not None:
            self.seconds += now - self._since
            self._since = now
        return self.seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside."""
        self._since = time.process_time()
        try:
            yield
        finally:
            self.read()
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        self.read()
        was_running, self._since = self._since is not None, None
        try:
            yield
        finally:
            if was_running:
                self._since = time.process_time()
