"""The live line: what it shows, on a terminal and in a log."""

from __future__ import annotations

import io

from samara import progress
from samara.progress import ProgressLine, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_durations_are_words():
    assert [duration(s) for s in (0.4, 42, 185, 7800)] == [
        "0 s",
        "42 s",
        "3 min 05 s",
        "2 h 10 min",
    ]


def test_a_terminal_line_rewrites_itself(monkeypatch):
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.0)
    stream = Terminal()
    with ProgressLine("dense", total=10, unit="steps", stream=stream) as line:
        line.update(0)
        line.update(5, loss="3.21")
        line.update(10, loss="2.10")
    text = stream.getvalue()
    assert text.count("\r") == 3
    assert text.endswith("\n")
    assert "dense  5/10 steps  loss 3.21" in text
    assert "left" in text.split("\r")[2]
    assert "left" not in text.split("\r")[3]


def test_a_log_gets_plain_lines_now_and_then_and_the_last():
    stream = io.StringIO()
    with ProgressLine("dense", total=10, unit="steps", stream=stream) as line:
        for done in range(11):
            line.update(done)
    assert stream.getvalue() == "dense  10/10 steps\n"


def test_an_unknown_total_shows_the_count_alone(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    stream = io.StringIO()
    with ProgressLine("reading", total=None, unit="documents", stream=stream) as line:
        line.update(1200)
    assert stream.getvalue() == "reading  1,200 documents\n"


def test_what_is_said_stays(capsys):
    progress.say("stack: loss 3.2 before, 3.2 after growth (exact)")
    assert capsys.readouterr().err == "stack: loss 3.2 before, 3.2 after growth (exact)\n"
