"""The same examples in every run, new ones with ``--hypothesis-profile random``; the benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# "ci" is Hypothesis' own where it sees a CI machine; here it is the rule everywhere.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("ci")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Callable[[str], Any]]:
    """Imports a script as it imports its neighbours: from its own folder."""
    folder = str(BENCHMARKS)
    sys.path.insert(0, folder)
    loaded = [path.stem for path in BENCHMARKS.glob("*.py")]
    yield importlib.import_module
    sys.path.remove(folder)
    for name in loaded:
        sys.modules.pop(name, None)
