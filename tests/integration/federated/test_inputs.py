"""Rows of a federation from prepared corpora, datasets, and files as they are shared."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from samara.config import validate
from samara.data.config import PrepareConfig
from samara.data.prepare import prepare_verb
from samara.errors import DataError
from samara.federated.job import Job
from samara.runs import RunFolder


@pytest.fixture(scope="module")
def texts(rows):
    return [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    """What ``samara prepare`` makes of documents of five packages, two of them small."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "all.jsonl").open("w") as file:
        for number in range(200):
            package = "large" if number % 2 else ("middle", "small", "tiny", "middle")[number % 4]
            if package == "tiny" and number > 40:
                package = "middle"
            text = f"{texts[number]['text']} {texts[number + 1]['text']} of {number} words ."
            file.write(json.dumps({"id": str(number), "text": text, "package": package}) + "\n")
    settings = {
        "source": {"kind": "files", "paths": [str(folder / "all.jsonl")]},
        "tokenizer": {"kind": "train", "vocab_size": 300},
        "cleaning": {
            "min_characters": 1, "english_only": False, "near_duplicate_threshold": None,
        },
        "split": {"validation_fraction": 0.1, "test_fraction": 0.1},
    }  # fmt: skip
    (folder / "data").mkdir()
    prepare_verb(validate(PrepareConfig, settings), RunFolder(folder / "data"))
    return folder / "data"


def _text_task(data):
    return {"kind": "perplexity", "name": "text", "data": str(data)}


def test_a_prepared_corpus_is_a_federation_of_its_packages(
    bases, rows, corpus, tmp_path, settings, finished
):
    config = settings(
        bases["samara"],
        rows,
        method="fedlora",
        task=_text_task(corpus),
        data={"train": str(corpus), "validation": str(corpus), "sequence_length": 16},
        clients__number=None,
        clients__partition={"kind": "key", "field": "package"},
    )
    counts = {}
    for line in (corpus / "documents/train.jsonl").read_text().splitlines():
        package = json.loads(line)["package"]
        counts[package] = counts.get(package, 0) + 1
    assert finished(config, tmp_path / "run")["clients"]["number"] == len(counts)


def test_the_largest_packages_are_clients_and_the_others_one_more(
    bases, rows, corpus, tmp_path, settings, folder_of
):
    def parts(**partition):
        config = settings(
            bases["samara"],
            rows,
            method="fedlora",
            task=_text_task(corpus),
            data={"train": str(corpus), "validation": str(corpus), "sequence_length": 16},
            clients__number=2,
            clients__partition={"kind": "key", "field": "package", **partition},
        )
        own = Job(config, folder_of(tmp_path / partition.get("small", "plain"))).trainer.data.parts
        return [len(p.train) + len(p.validation) + len(p.test) for p in own.values()]

    number = len((corpus / "documents/train.jsonl").read_text().splitlines())
    assert sum(parts(small="merge")) == number
    assert sum(parts()) < number


def test_users_of_a_compressed_file_are_clients(bases, rows, texts, tmp_path, settings, folder_of):
    """One record a speech, fields user and text, as LEAF's Shakespeare."""
    for split, own in (("train", texts[:100]), ("valid", texts[100:120])):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            for row in own:
                user = {"user": f"Play/{row['user'].upper()}", "text": row["text"]}
                file.write(json.dumps(user) + "\n")
    config = settings(
        bases["samara"],
        rows,
        task=_text_task(tmp_path / "valid.jsonl.gz"),
        data={"train": str(tmp_path / "train.jsonl.gz"), "sequence_length": 16},
        clients__number=5,
        clients__partition={"kind": "key", "field": "user"},
    )
    data = Job(config, folder_of(tmp_path / "run")).trainer.data
    assert data.num_clients == 5
    assert len(data.test) == 20


@pytest.mark.parametrize("kind", ["saved", "saved_split", "folder"])
def test_a_dataset_is_read_once_and_its_labels_by_name(
    bases, rows, texts, tmp_path, kind, settings, folder_of
):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "day": datasets.Value("date32"),
        }
    )
    day = __import__("datetime").date(2026, 1, 1)
    both = {
        split: datasets.Dataset.from_list(
            [{"text": r["text"], "label": r["label"], "day": day} for r in own], features=features
        )
        for split, own in (("train", texts[:100]), ("test", texts[100:120]))
    }
    folder, test = tmp_path / "set", str(tmp_path / "set")
    match kind:
        case "saved":
            datasets.DatasetDict(both).save_to_disk(str(folder))
        case "saved_split":
            both["train"].save_to_disk(str(folder))
            test = str(rows / "test.jsonl")
        case "folder":
            folder.mkdir()
            for split, own in both.items():
                own.to_parquet(str(folder / f"{split}.parquet"))
    changes = {
        "method": "fedlora",
        "task": {"kind": "labels", "name": "reviews", "data": test},
        "data": {"train": str(folder), "sequence_length": 16},
        "clients__number": 4,
    }
    config = settings(bases["samara"], rows, **changes)
    job = Job(config, folder_of(tmp_path / "run"))
    assert sum(len(p.train) for p in job.trainer.data.parts.values()) > 60
    written = (tmp_path / "run/inputs/train.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in written] == [r["label"] for r in texts[:100]]
    assert json.loads(written[0])["day"] == "2026-01-01"
    shutil.rmtree(folder)
    again = Job(config, folder_of(tmp_path / "run"))
    assert again.parents == job.parents
    with pytest.raises(DataError, match=r"data.train: dataset '.*/set' .* cannot be read"):
        Job(config, folder_of(tmp_path / "other"))


def test_rows_that_are_no_plain_values_are_refused(bases, rows, tmp_path, settings, folder_of):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a", "label": "b", "image": b"\x00"}]).save_to_disk(
        str(tmp_path / "set")
    )
    config = settings(bases["samara"], rows, data={"train": str(tmp_path / "set")})
    with pytest.raises(DataError, match=r"data.train: row 1 of dataset .* holds what is no text"):
        Job(config, folder_of(tmp_path / "run"))
