"""Rows of task files, and prompts filled from them; each mistake is one line with file and line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from samara.errors import ConfigError, DataError
from samara.measure.task_rows import Row, fill, read_rows


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def row(**fields: object) -> Row:
    return Row(fields=fields, path=Path("rows.jsonl"), line=7)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_keep_their_line_numbers(tmp_path: Path, name: str):
    path = write(tmp_path / name, '{"id": "a", "n": 1}\n\n{"n": [1, 2], "t": "x\u2028y"}\n')
    first, second = read_rows(path)
    assert (first.id, first.line, first.origin) == ("a", 1, f"{path}:1")
    assert (second.id, second.line, second.fields) == (None, 3, {"n": [1, 2], "t": "x\u2028y"})


def test_tables_may_quote_and_break_lines(tmp_path: Path):
    path = write(tmp_path / "rows.csv", 'text,label\n"a, b\nc",x\nd,y\n\n')
    rows = read_rows(path)
    assert [r.fields for r in rows] == [
        {"text": "a, b\nc", "label": "x"},
        {"text": "d", "label": "y"},
    ]
    assert [r.line for r in rows] == [2, 4]
    tabs = write(tmp_path / "rows.tsv", "text\tlabel\na, b\tx\n")
    assert read_rows(tabs)[0].fields == {"text": "a, b", "label": "x"}


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path):
    path = write(tmp_path / "rows.csv", "\ufefftext\na\n")
    assert read_rows(path)[0].fields == {"text": "a"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": \n',
            r"a.jsonl:2: not valid JSON: .*; mend or remove the line",
        ),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: a row is a mapping of fields, not \[1\]"),
        ("a.jsonl", "\n", r"a.jsonl: holds no rows, so there is nothing to score"),
        ("a.csv", "a,b\n", r"a.csv: holds no rows"),
        ("a.csv", "", r"a.csv: holds no rows"),
        ("a.csv", "a,b\n1,2\n1\n", r"a.csv:3: 1 columns, the first line names 2"),
        ("a.csv", 'a,b\n1,"2\n', r"a.csv:2: not a valid table: unexpected end of data"),
        ("a.json", "{}", r"a.json: cannot be read; give .jsonl, .csv or .tsv, each also with .gz"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, name: str, text: str, message: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_or_damaged_file_is_one_clear_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"a": 1}\n')[:-6])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be read"):
        read_rows(cut)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not UTF-8 \(.*0xe9\); convert the file"):
        read_rows(latin)


def test_fields_are_filled_in():
    filled = fill(
        "Q: {q}\n{c[1]} {{n}} {n} {b} {x y}",
        row(q="a", c=["b", "c"], n=3, b=True, **{"x y": 1.5}),
        key="t",
    )
    assert filled == "Q: a\nc {n} 3 true 1.5"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{qestion}", r"rows.jsonl:7: no field 'qestion' \(did you mean 'question'\?\)"),
        ("{empty}", "rows.jsonl:7: field 'empty' is empty"),
        ("{choices}", r"rows.jsonl:7: field 'choices' holds \['a'\]; a prompt takes single val"),
        ("{choices}", r"takes single values, as {choices\[0\]}$"),
        ("{choices[1]}", "rows.jsonl:7: field 'choices' has no entry 1"),
        ("{question[0]}", "rows.jsonl:7: field 'question' has no entry 0"),
    ],
)
def test_a_row_that_lacks_a_field_is_named(template: str, message: str):
    with pytest.raises(DataError, match=message):
        fill(template, row(question="a", choices=["a"], empty=None), key="t.prompt")


@pytest.mark.parametrize("template", ["{a", "a}", "{}", "{a!r}", "{a:>3}", "{a[b]}", "{0[x]}"])
def test_a_malformed_template_names_its_key(template: str):
    with pytest.raises(ConfigError, match=r"t\.prompt: .*; a field is written {name}"):
        fill(template, row(a=1), key="t.prompt")


def test_no_attribute_of_a_value_can_be_reached():
    with pytest.raises(DataError, match=re.escape("no field 'a.__class__'")):
        fill("{a.__class__}", row(a="x"), key="t")


def test_a_field_of_texts_may_be_one_text():
    assert row(a="x").texts("a") == ["x"]
    assert row(a=["x", 2]).texts("a") == ["x", "2"]
    with pytest.raises(DataError, match=r"field 'a' holds .*, not texts"):
        row(a=[{"x": 1}]).texts("a")


def test_json_written_by_json_reads_back(tmp_path: Path):
    fields = {"text": 'quote " and \\ and ünï', "n": None}
    path = write(tmp_path / "r.jsonl", json.dumps(fields, ensure_ascii=False) + "\n")
    assert read_rows(path)[0].fields == fields
