"""What a benchmark found, in one JSON file that is whole and up to date after every case.

A machine may be lent for minutes only: what was measured before it goes is kept. The file holds

    command       what to type to get it again
    environment   versions, commit, machine; ``device`` is what it ran on, ``threads`` torch's
    settings      the benchmark's options
    complete      whether all cases are in
    rows          one mapping per case

``benchmarks/results.py`` makes docs/results.md of such files.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samara.runs import environment, write_json


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures, with commit and machine"
    )


class Record:
    """The rows of one benchmark; written after each of them if there is a file to write."""

    def __init__(
        self,
        path: Path | None,
        *,
        script: str,
        arguments: Sequence[str],
        device: str,
        settings: Mapping[str, Any],
    ) -> None:
        """Note what runs and where.

        Args:
            path: The file; None: keep the rows only.
            script: The benchmark's file.
            arguments: Its command line; ``--json FILE`` is left out of what is recorded.
            device: ``cpu`` or ``cuda``.
            settings: Its options.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._head: dict[str, Any] = {}
        if path is not None:
            self._head = {
                "command": " ".join(
                    ["python", f"benchmarks/{Path(script).name}", *without_json_option(arguments)]
                ),
                "environment": machine(device),
                "settings": {key: value for key, value in settings.items() if key != "json"},
            }

    def add(self, row: dict[str, Any]) -> None:
        """Take a case in."""
        self.rows.append(row)
        self._write(complete=False)

    def finish(self) -> None:
        """All cases are in."""
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        if self.path is not None:
            write_json(self.path, {**self._head, "complete": complete, "rows": self.rows})


def machine(device: str) -> dict[str, Any]:
    """Versions, commit and machine, with the name of the device and torch's threads."""
    import torch

    found = environment()
    on_cuda = torch.device(device).type == "cuda"
    name = (
        torch.cuda.get_device_name() if on_cuda else f"{found['cpu']}, {found['cpu_count']} cores"
    )
    return {**found, "device": name, "threads": torch.get_num_threads()}


def without_json_option(arguments: Sequence[str]) -> list[str]:
    """The command line without ``--json FILE`` (or ``--json=FILE``)."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith("--json"):
            kept.append(argument)
        skip = argument == "--json" and not skip
    return kept
