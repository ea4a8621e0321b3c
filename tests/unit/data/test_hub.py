"""Hub datasets through ``datasets``, without a network."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from samara.data.config import HubDataset
from samara.data.sources import iterate_documents, source_key
from samara.errors import DataError


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [{"id": "first", "text": "One.", "package": "p"}, {"id": "second", "text": "Two."}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_streams_a_local_folder(dataset: Path) -> None:
    documents = list(iterate_documents(HubDataset(name=str(dataset))))
    assert [(d.id, d.text, d.package) for d in documents] == [
        ("first", "One.", "p"),
        ("second", "Two.", ""),
    ]


def test_key_of_a_local_folder_follows_its_content(dataset: Path) -> None:
    before = source_key(HubDataset(name=str(dataset)))
    assert before == source_key(HubDataset(name=str(dataset), streaming=False))
    (dataset / "train.jsonl").write_text('{"text": "Three."}\n')
    assert before != source_key(HubDataset(name=str(dataset)))


def test_missing_text_field(dataset: Path) -> None:
    source = HubDataset(name=str(dataset), text_field="txt")
    with pytest.raises(DataError, match=r"hub/train:1: no field 'txt' \(did you mean 'text'\?\)"):
        list(iterate_documents(source))


def test_unknown_split(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"split tests\) cannot be read: .*; check the name"):
        list(iterate_documents(HubDataset(name=str(dataset), split="tests")))


def test_unreachable_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"dataset 'nobody/nothing' .* cannot be read: .*HF_HUB_OFF"
    ):
        list(iterate_documents(HubDataset(name="nobody/nothing")))


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(
        DataError, match=r"needs the package datasets; pip install 'samara\[data\]'"
    ):
        list(iterate_documents(HubDataset(name="nobody/nothing")))
