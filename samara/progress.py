"""One live line for long work: where it stands, its figures, and the time left.

On a terminal the line rewrites itself; in a log file a plain line appears now and then.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

LOG_SECONDS = 15.0
TERMINAL_SECONDS = 0.2


class ProgressLine:
    """Shows ``label  done/total unit  figures  time left``; use it as a context manager."""

    def __init__(
        self, label: str, *, total: int | None, unit: str, stream: TextIO | None = None
    ) -> None:
        """Make a line that shows nothing yet.

        Args:
            label: What the work is called.
            total: Units of work in all; None where that is unknown.
            unit: What is counted, as ``tokens``.
            stream: Where to write; standard error by default.
        """
        self.label = label
        self.total = total
        self.unit = unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()
        self._first: int | None = None
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal and self._width:
            self._stream.write("\n")

    def update(self, done: int, **figures: str) -> None:
        """Show that ``done`` units are finished; ``figures`` are printed as they are given."""
        if self._first is None:
            self._first = done
        now = time.monotonic()
        finished = self.total is not None and done >= self.total
        wait = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        if not finished and now - self._shown < wait:
            return
        self._shown = now
        line = self._line(done, now, figures)
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _line(self, done: int, now: float, figures: dict[str, str]) -> str:
        amount = f"{done:,}" if self.total is None else f"{done:,}/{self.total:,}"
        parts = [self.label, f"{amount} {self.unit}"]
        parts += [f"{name} {value}" for name, value in figures.items()]
        fresh = done - (self._first or 0)
        if self.total is not None and fresh > 0 and done < self.total:
            left = (now - self._started) * (self.total - done) / fresh
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def say(line: str) -> None:
    """Tell the user something that stays: a line on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
