"""Verb ``report``: run folders in; one HTML page out that needs nothing but a browser."""

from __future__ import annotations

from samara.report.config import ReportConfig
from samara.report.inputs import read_inputs
from samara.report.page import render_page
from samara.runs import RunFolder, write_text


def report(config: ReportConfig, run: RunFolder) -> None:
    """Write ``report.html`` into the run folder.

    Runs that have not finished, failed, or were not evaluated are said to be so on the page.

    Raises:
        CheckpointError: If a folder named does not exist, or a file in it is damaged.
    """
    write_text(run.path / "report.html", render_page(read_inputs(config, run)))
