"""The default corpus: real documentation of this interpreter, read from two small packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from samara.config import validate
from samara.data.cleaning import prose_problem
from samara.data.config import PrepareConfig
from samara.data.loader import training_batches
from samara.data.near_duplicates import NearDuplicates
from samara.data.prepare import PreparedCorpus, open_corpus
from samara.data.splits import SPLITS
from samara.data.tokens import PackedSequences

CONFIG = validate(
    PrepareConfig,
    {
        "source": {
            "kind": "interpreter_docs",
            "packages": ["rich", "typer"],
            "standard_library": False,
        },
        "tokenizer": {"kind": "train", "vocab_size": 1024},
    },
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    return open_corpus(CONFIG, cache=tmp_path_factory.mktemp("cache"))


def test_documents_are_labelled_clean_and_apart(corpus: PreparedCorpus) -> None:
    documents = [document for split in SPLITS for document in corpus.documents(split)]
    assert len(documents) > 300
    assert {document.package for document in documents} == {"rich", "typer"}
    for document in documents:
        place = f"{document.package}/{document.module}:{document.name}"
        assert document.id.partition("#")[0] == place  # x#2: defined twice, as in if and else
        assert document.summary == document.text.split("\n")[0].strip()
        assert prose_problem(document.text) is None
        assert ">>> " not in document.text
        assert len(document.text) >= 40
    assert len({document.id for document in documents}) == len(documents)
    assert all(NearDuplicates(0.8).keep([document.text for document in documents]))


def test_the_same_environment_gives_the_same_corpus(corpus: PreparedCorpus, tmp_path: Path) -> None:
    again = open_corpus(CONFIG, cache=tmp_path)
    assert again.hash == corpus.hash
    assert again.folder.name == corpus.folder.name
    again.verify()


def test_it_can_be_trained_on(corpus: PreparedCorpus) -> None:
    rows = PackedSequences(corpus.tokens("train"), sequence_length=64)
    step = next(
        training_batches(rows, batch_size=8, micro_batch_size=4, seed=0, start_step=0, num_steps=1)
    )
    assert [batch["input_ids"].shape for batch in step] == [(4, 64), (4, 64)]
    assert all(int(batch["input_ids"].max()) < corpus.vocab_size for batch in step)
