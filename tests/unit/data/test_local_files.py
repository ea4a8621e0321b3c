"""Local files as documents: every kind, plain or gzipped, and the message of every mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from samara.data.config import LocalFiles
from samara.data.documents import Document
from samara.data.local_files import find_files
from samara.data.sources import iterate_documents, iterate_validation_documents, source_key
from samara.errors import DataError


def read(*paths: Path | str, **options: object) -> list[Document]:
    source = LocalFiles(paths=tuple(str(path) for path in paths), **options)  # type: ignore[arg-type]
    return list(iterate_documents(source))


def write_lines(path: Path, *records: object) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_bytes("\ufeffFirst line.\r\n\r\nSecond é.\r\n".encode())
    (document,) = read(path)
    assert document == Document(
        id="note.txt", text="First line.\n\nSecond é.", module="note.txt", summary="First line."
    )


def test_passages_are_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 120
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join([paragraph.strip()] * 5))
    documents = read(path, text_documents="passages")
    assert [document.id for document in documents] == ["book.txt:1", "book.txt:5", "book.txt:9"]
    assert " ".join(d.text for d in documents).split() == paragraph.split() * 5


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_keep_id_and_labels(tmp_path: Path, name: str) -> None:
    full = {"id": 7, "text": "One.\nTwo.", "package": "p", "module": "m", "name": "n"}
    path = write_lines(tmp_path / name, full, {"text": "Three.", "other": [1]})
    first, second = read(path)
    assert first == Document(
        id="7", text="One.\nTwo.", package="p", module="m", name="n", summary="One."
    )
    assert second == Document(id=f"{name}:2", text="Three.", summary="Three.")


def test_summary_of_the_record_wins(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "Long text.", "summary": "Short."})
    assert read(path, text_field="body")[0].summary == "Short."


def test_lone_surrogates_become_writable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "broken \\ud800 half"}\n')
    (document,) = read(path)
    assert document.text.encode("utf-8").decode("utf-8") == document.text
    assert document.text.startswith("broken ")


def test_ids_do_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    ids = []
    for root in (tmp_path / "here", tmp_path / "there" / "deeper"):
        for part in ("x", "y"):
            (root / part).mkdir(parents=True)
            write_lines(root / part / "data.jsonl", {"text": part})
        ids.append([document.id for document in read(root / "*" / "data.jsonl")])
    assert ids[0] == ids[1] == ["x/data.jsonl:1", "y/data.jsonl:1"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["One.", "Two."], "package": ["p", None], "n": [1, 2]})
    parquet.write_table(table, path)
    zipped = tmp_path / "b.parquet.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    documents = read(path, zipped)
    assert [(d.id, d.text, d.package) for d in documents] == [
        ("a.parquet:1", "One.", "p"),
        ("a.parquet:2", "Two.", ""),
        ("b.parquet.gz:1", "One.", "p"),
        ("b.parquet.gz:2", "Two.", ""),
    ]
    with pytest.raises(DataError, match=r"a\.parquet: no field 'txt' \(did you mean 'text'\?\)"):
        read(path, text_field="txt")
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        read(path)


def test_files_are_sorted_and_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    found = find_files([f"{tmp_path}/*.txt", f"{tmp_path}/b.txt"], key="source.paths")
    assert [path.name for path in found] == ["a.txt", "b.txt"]


def test_validation_files_are_no_training_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    source = LocalFiles(paths=(f"{tmp_path}/*.txt",), validation_paths=(f"{tmp_path}/./b.txt",))
    assert [document.text for document in iterate_documents(source)] == ["a.txt"]
    assert [document.text for document in iterate_validation_documents(source)] == ["b.txt"]


def test_key_follows_content_not_place(tmp_path: Path) -> None:
    keys = []
    for folder, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
        keys.append(source_key(LocalFiles(paths=(f"{tmp_path}/{folder}/x.txt",))))
    assert keys[0] == keys[1] != keys[2]


# --- mistakes ---------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^source\.paths: '.*none\.txt': no such file"):
        read(tmp_path / "none.txt")


def test_pattern_without_match(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^source\.paths: '.*\*\.txt' matches no file"):
        read(tmp_path / "*.txt")


def test_folder_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; write"):
        read(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"a\.docx: cannot be read; give \.txt, \.jsonl or"):
        read(tmp_path / "a.docx")


def test_missing_text_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"texts": "y"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: no field 'text' \(did you mean 'texts'\?\)"):
        read(path)


def test_text_of_another_type(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": 3})
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'text' holds 3, not text"):
        read(path)
    path = write_lines(tmp_path / "b.jsonl", ["text"])
    with pytest.raises(DataError, match=r"b\.jsonl:1: a record is a mapping"):
        read(path)


def test_malformed_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON: .*mend or remove the line"):
        read(path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("ok\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8 \(byte 2 of the line is 0xef\)"):
        read(path)


@pytest.mark.parametrize(
    "data",
    [b"plain text", gzip.compress(b"cut off " * 99, mtime=0)[:-12]],
    ids=["not gzip", "cut off"],
)
def test_unreadable_gzip(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read to the end"):
        read(path)
