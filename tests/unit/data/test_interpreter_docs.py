"""The documentation of the interpreter and of installed packages, read without importing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from samara.data import interpreter_docs
from samara.data.config import InterpreterDocs
from samara.data.documents import Document
from samara.data.sources import iterate_documents, source_key
from samara.errors import DataError

MODULE = '''"""The module.

Its second line.
"""
raise RuntimeError("imported!")

if True:
    class Seed:
        """A winged seed."""

        def fly(self):
            r"""Fly away.

                >>> fly()
            """
            def inner():
                """Beat a wing."""

try:
    pass
except ImportError:
    async def fallback():
        """Use the slow path."""

def undocumented(): ...

def parameters():
    """x (int): A number."""
'''


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Site-packages that hold nothing but what a test installs."""
    monkeypatch.setattr(interpreter_docs.site, "getsitepackages", lambda: [str(tmp_path)])
    real = interpreter_docs.sysconfig.get_path
    monkeypatch.setattr(
        interpreter_docs.sysconfig,
        "get_path",
        lambda name: str(tmp_path) if name == "purelib" else real(name),
    )
    return tmp_path


def install(folder: Path, name: str, files: dict[str, str], *, record: bool = True) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if record:
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, text in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(**options: object) -> tuple[list[Document], Counter[str]]:
    skipped: Counter[str] = Counter()
    source = InterpreterDocs(**{"standard_library": False, **options})  # type: ignore[arg-type]
    documents = list(iterate_documents(source, skipped=skipped))
    return documents, +skipped


def test_docstrings_with_their_labels(site_packages: Path) -> None:
    install(site_packages, "Elm_Tree", {"elm/__init__.py": MODULE})
    documents, skipped = read()
    assert documents == [
        Document(
            id=f"elm-tree/elm:{name}",
            text=text,
            package="elm-tree",
            module="elm",
            name=name,
            summary=text.split("\n")[0],
        )
        for name, text in [
            ("", "The module.\n\nIts second line."),
            ("Seed", "A winged seed."),
            ("Seed.fly", "Fly away."),
            ("Seed.fly.inner", "Beat a wing."),
            ("fallback", "Use the slow path."),
        ]
    ]
    assert skipped == {"docstrings_without_summary": 1}


def test_packages_come_in_order_and_can_be_chosen(site_packages: Path) -> None:
    for name in ("beech", "ash", "elm"):
        install(site_packages, name, {f"{name}/a.py": f'"""About {name}."""'})
    assert [document.package for document in read()[0]] == ["ash", "beech", "elm"]
    assert [document.package for document in read(packages=("Elm",))[0]] == ["elm"]
    assert [document.package for document in read(exclude=("ash",))[0]] == ["beech", "elm"]
    with pytest.raises(DataError, match=r"source\.packages: 'beach' is not .*did you mean 'beech'"):
        read(packages=("beach",))


def test_tests_copies_and_scripts_are_left_out(site_packages: Path) -> None:
    files = [
        "elm/wing.py",
        "elm/tests/wing.py",
        "elm/test_wing.py",
        "elm/conftest.py",
        "elm/_vendor/six.py",
        "../../bin/elm.py",
        "elm-scripts/run.py",
    ]
    install(site_packages, "elm", {file: f'"""In {file}."""' for file in files})
    assert [document.module for document in read()[0]] == ["elm.wing"]


def test_unreadable_packages_are_counted(site_packages: Path) -> None:
    install(
        site_packages, "elm", {"elm/a.py": '"""Fine."""', "elm/b.py": '"""Python 2."""\nprint 1'}
    )
    install(site_packages, "oak", {"oak/a.py": '"""Fine."""'}, record=False)
    (site_packages / "elm" / "c.py").write_text('"""Not listed."""')
    documents, skipped = read()
    assert [document.id for document in documents] == ["elm/elm.a:"]
    assert skipped == {"unparsable_files": 1, "packages_without_file_list": 1}


def test_samara_and_editable_installs_are_left_out(site_packages: Path) -> None:
    install(site_packages, "samara", {"samara/a.py": '"""Ourselves."""'})
    install(site_packages, "mine", {"__editable___mine_finder.py": '"""A finder."""'})
    origin = {"url": "file:///home/me/mine", "dir_info": {"editable": True}}
    (site_packages / "mine-1.0.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    assert read()[0] == []


def test_key_names_the_versions(site_packages: Path) -> None:
    install(site_packages, "elm", {"elm/a.py": '"""Fine."""'})
    key = source_key(InterpreterDocs())
    assert key["packages"] == {"python": key["python"], "elm": "1.0"}
    assert key["python"] == ".".join(map(str, sys.version_info[:3]))


def test_topics_and_standard_library(site_packages: Path) -> None:
    source = InterpreterDocs()
    found: dict[str, Document] = {}
    for document in iterate_documents(source):
        found[document.id] = document
        if document.module == "bisect":
            break  # the whole library takes seconds
    topic = found["python/topics:with"]
    assert (topic.package, topic.name) == ("python", "with")
    assert "context manager" in topic.text
    assert found["python/bisect:"].text == "Bisection algorithms."


def test_order_and_texts_repeat(site_packages: Path) -> None:
    install(site_packages, "elm", {"elm/a.py": MODULE, "elm/b.py": MODULE})
    assert read() == read()
