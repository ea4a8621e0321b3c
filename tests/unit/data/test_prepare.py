"""Preparing a corpus: splits, identity, damage, and the message of every mistake."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from samara.config import validate
from samara.data import prepare as module
from samara.data.config import PrepareConfig, SplitConfig
from samara.data.prepare import PreparedCorpus, open_corpus, prepare, prepare_verb
from samara.data.splits import SPLITS, split_of
from samara.errors import DataError, ResourceError
from samara.runs import RunFolder


def write_records(path: Path, texts: list[str], **labels: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **labels}) + "\n" for text in texts))
    return path


def texts(count: int, *, start: int = 0) -> list[str]:
    """Sentences that are English, long enough, and unlike one another."""
    return [
        f"The tree number {n} of the {n * n}-th garden is as old as the house at {n + 3} Elm Road."
        for n in range(start, start + count)
    ]


def settings(*paths: Path, **options: Any) -> PrepareConfig:
    source = {"kind": "files", "paths": [str(path) for path in paths], **options.pop("source", {})}
    data = {"source": source, "tokenizer": {"kind": "train", "vocab_size": 300}, **options}
    return validate(PrepareConfig, data)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_records(tmp_path / "a.jsonl", texts(120), package="p")


@pytest.fixture
def corpus(records: Path, tmp_path: Path) -> PreparedCorpus:
    return prepare(settings(records), tmp_path / "corpus")


def ids(corpus: PreparedCorpus, split: str) -> list[str]:
    return [document.id for document in corpus.documents(split)]


# --- what comes out ---------------------------------------------------------------------------


def test_documents_are_split_once_each(corpus: PreparedCorpus) -> None:
    found = Counter(id_ for split in SPLITS for id_ in ids(corpus, split))
    assert found == Counter(f"a.jsonl:{n}" for n in range(1, 121))
    for split in SPLITS:
        assert all(split_of(id_, SplitConfig()) == split for id_ in ids(corpus, split))


def test_tokens_are_the_documents(corpus: PreparedCorpus) -> None:
    from samara.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(corpus.tokenizer_folder)
    for split in SPLITS:
        shards = corpus.tokens(split)
        documents = list(corpus.documents(split))
        assert shards.num_documents == len(documents)
        for number, document in enumerate(documents):
            start, stop = shards.document_offsets[number : number + 2]
            bos, *inner, eos = shards.read(int(start), int(stop)).tolist()
            assert (bos, eos) == (1, 2)
            assert tokenizer.decode(inner) == document.text
            assert shards.document_bytes[number] == len(document.text.encode())
    assert corpus.vocab_size == tokenizer.vocab_size == 300
    assert corpus.special_tokens == tokenizer.special_tokens


def test_statistics_add_up(corpus: PreparedCorpus) -> None:
    statistics = corpus.statistics
    for split in SPLITS:
        documents = list(corpus.documents(split))
        assert statistics["splits"][split] == {
            "documents": len(documents),
            "characters": sum(len(document.text) for document in documents),
            "bytes": sum(len(document.text.encode()) for document in documents),
            "tokens": corpus.tokens(split).num_tokens,
        }
    assert statistics["packages"] == {"p": 120}
    total = {
        name: sum(split[name] for split in statistics["splits"].values())
        for name in ("bytes", "tokens")
    }
    assert statistics["bytes_per_token"] == total["bytes"] / total["tokens"]


def test_reasons_of_dropping_are_counted(tmp_path: Path) -> None:
    extra = ["Too short.", texts(1)[0].upper(), "x = f(y) + g(z) ** 2 - h(1, 2, 3, 4, 5, 6, 7, 8)"]
    path = write_records(tmp_path / "a.jsonl", texts(120) + extra)
    statistics = prepare(settings(path), tmp_path / "corpus").statistics
    assert statistics["dropped"] == {
        "exact_duplicate": 1,
        "not_prose": 1,
        "too_short": 1,
    }


def test_the_same_settings_give_the_same_bytes(records: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    hashes = {prepare(settings(records), folder).hash for folder in folders}
    assert len(hashes) == 1
    files = sorted(p.relative_to(folders[0]) for p in folders[0].rglob("*") if p.is_file())
    assert len(files) > 10
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"split": {"salt": "other"}},
        {"tokenizer": {"kind": "train", "vocab_size": 301}},
        {"cleaning": {"min_characters": 41}},
        {"max_documents": 119},
    ],
)
def test_another_setting_is_another_hash(
    records: Path, tmp_path: Path, corpus: PreparedCorpus, change: dict[str, Any]
) -> None:
    assert prepare(settings(records, **change), tmp_path / "other").hash != corpus.hash


def test_the_hash_does_not_know_where_the_files_lie(
    records: Path, tmp_path: Path, corpus: PreparedCorpus
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = records.rename(tmp_path / "elsewhere" / "a.jsonl")
    assert prepare(settings(moved), tmp_path / "other").hash == corpus.hash


def test_validation_files(records: Path, tmp_path: Path) -> None:
    held_out = write_records(tmp_path / "valid.jsonl", texts(20, start=110))
    config = settings(records, source={"validation_paths": [str(held_out)]})
    corpus = prepare(config, tmp_path / "corpus")
    assert ids(corpus, "validation") == [f"valid.jsonl:{n}" for n in range(1, 21)]
    assert set(ids(corpus, "train")) | set(ids(corpus, "test")) == {
        f"a.jsonl:{n}" for n in range(1, 111)
    }
    assert corpus.statistics["dropped"]["exact_duplicate"] == 10


def test_max_documents(records: Path, tmp_path: Path) -> None:
    corpus = prepare(settings(records, max_documents=60), tmp_path / "corpus")
    assert sum(corpus.statistics["splits"][split]["documents"] for split in SPLITS) == 60


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", texts(120), id="same")
    corpus = prepare(settings(path), tmp_path / "corpus")
    found = {id_ for split in SPLITS for id_ in ids(corpus, split)}
    assert found == {"same", *(f"same#{n}" for n in range(2, 121))}


def test_loaded_tokenizer(records: Path, tmp_path: Path, corpus: PreparedCorpus) -> None:
    config = settings(records, tokenizer={"kind": "load", "path": str(corpus.folder)})
    loaded = prepare(config, tmp_path / "other")
    assert loaded.vocab_size == corpus.vocab_size
    assert loaded.hash == corpus.hash  # the same documents, the same tokenizer


def test_the_tokenizer_never_sees_validation(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", texts(120))
    held_out = write_records(tmp_path / "valid.jsonl", ["It is the qqqzzz of the qqqzzz. " * 40])
    corpus = prepare(
        settings(path, source={"validation_paths": [str(held_out)]}), tmp_path / "corpus"
    )
    vocabulary = json.loads((corpus.tokenizer_folder / "tokenizer.json").read_text())["model"]
    assert not [entry for entry in vocabulary["vocab"] if "qq" in entry or "zz" in entry]


@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0.0, 0.5), (0.0, 0.0)])
def test_split_fractions(fractions: tuple[float, float]) -> None:
    validation, test = fractions
    config = SplitConfig(validation_fraction=validation, test_fraction=test)
    counts = Counter(split_of(f"id {n}", config) for n in range(4000))
    assert abs(counts["validation"] / 4000 - validation) < 0.03
    assert abs(counts["test"] / 4000 - test) < 0.03


# --- opening ----------------------------------------------------------------------------------


def test_open_again(corpus: PreparedCorpus) -> None:
    again = PreparedCorpus.open(corpus.folder)
    assert (again.hash, again.statistics) == (corpus.hash, corpus.statistics)
    again.verify()


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared corpus there \(corpus\.json is missing\)"):
        PreparedCorpus.open(tmp_path)


def test_another_schema(corpus: PreparedCorpus) -> None:
    path = corpus.folder / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(DataError, match=r"schema 99, this version reads 1; prepare it anew"):
        PreparedCorpus.open(corpus.folder)


@pytest.mark.parametrize("name", ["documents/train.jsonl", "tokenizer/tokenizer.json"])
def test_damaged_files(corpus: PreparedCorpus, name: str) -> None:
    path = corpus.folder / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b"e", b"f"))
    with pytest.raises(DataError, match=rf"{name}: its content was altered; remove the prepared"):
        PreparedCorpus.open(corpus.folder).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{name}: has {len(data) - 1} bytes instead of"):
        PreparedCorpus.open(corpus.folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: is missing; remove the prepared folder"):
        PreparedCorpus.open(corpus.folder)


def test_truncated_shard(corpus: PreparedCorpus) -> None:
    path = corpus.folder / "tokens" / "train" / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"shard-00000\.bin: has \d+ bytes instead of \d+; remove"):
        corpus.tokens("train")
    with pytest.raises(DataError, match=r"shard-00000\.bin: has"):
        corpus.verify()


def test_split_without_documents(records: Path, tmp_path: Path) -> None:
    corpus = prepare(settings(records, split={"test_fraction": 0.0}), tmp_path / "corpus")
    assert list(corpus.documents("test")) == []
    corpus.verify()
    with pytest.raises(DataError, match="the corpus has no test documents"):
        corpus.tokens("test")


# --- the cache --------------------------------------------------------------------------------


def test_inline_corpus_is_prepared_once(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = open_corpus(settings(records), cache=cache)
    calls: list[Path] = []
    real = module.prepare
    monkeypatch.setattr(
        module, "prepare", lambda config, folder: (calls.append(folder), real(config, folder))[1]
    )
    assert open_corpus(settings(records), cache=cache).folder == first.folder
    assert calls == []
    write_records(records, texts(121), package="p")
    assert open_corpus(settings(records), cache=cache).folder != first.folder
    assert len(calls) == 1


def test_leftovers_of_a_killed_preparation_go(records: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = open_corpus(settings(records), cache=cache).folder
    (folder / "corpus.json").unlink()
    folder.rename(cache / f".{folder.name}.abc.tmp")
    open_corpus(settings(records), cache=cache)
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_open_by_path(corpus: PreparedCorpus, tmp_path: Path) -> None:
    assert open_corpus(str(corpus.folder), cache=tmp_path / "none").hash == corpus.hash
    assert not (tmp_path / "none").exists()


# --- mistakes ---------------------------------------------------------------------------------


def test_nothing_left(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", ["Too short."] * 3)
    with pytest.raises(DataError, match=r"^source: no document is left \(dropped: 3 too_short\)"):
        prepare(settings(path), tmp_path / "corpus")
    path.write_text("\n")
    with pytest.raises(DataError, match=r"^source: no document is left \(none was read\); give"):
        prepare(settings(path), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_nothing_to_validate_on(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(texts(200)))
    with pytest.raises(
        DataError,
        match=r"^split: none of the 1 documents fell into the train split.*text_documents=passages",
    ):
        prepare(settings(path), tmp_path / "corpus")
    split = {"validation_fraction": 1e-6, "test_fraction": 0.0}
    with pytest.raises(DataError, match="none of the 1 documents fell into the validation split"):
        prepare(settings(path, split=split), tmp_path / "corpus")
    passages = settings(path, source={"text_documents": "passages"}, split={"salt": "a"})
    assert prepare(passages, tmp_path / "corpus").statistics["splits"]["validation"]["documents"]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", texts(1))
    with pytest.raises(
        DataError, match=r"^split: none of the 1 documents fell into the train split"
    ):
        prepare(
            settings(path, split={"test_fraction": 0.99, "validation_fraction": 0.0}),
            tmp_path / "corpus",
        )


def test_validation_files_without_a_document(records: Path, tmp_path: Path) -> None:
    held_out = write_records(tmp_path / "valid.jsonl", ["Too short."])
    config = settings(records, source={"validation_paths": [str(held_out)]})
    with pytest.raises(
        DataError, match=r"^source\.validation_paths: no document of theirs is left"
    ):
        prepare(config, tmp_path / "corpus")


def test_a_folder_of_other_files_is_left_alone(records: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("Dear friend")
    with pytest.raises(DataError, match=r"home: holds other files; give a new or empty folder"):
        prepare(settings(records), tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").exists()


def test_full_disk(
    records: Path, tmp_path: Path, corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_token_shards", full)
    with pytest.raises(ResourceError, match=r"corpus: the disk is full"):
        prepare(settings(records, split={"salt": "x"}), corpus.folder)
    assert PreparedCorpus.open(corpus.folder).hash == corpus.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "corpus"]


# --- the verb ---------------------------------------------------------------------------------


def test_verb_fills_the_run_folder(records: Path, tmp_path: Path, corpus: PreparedCorpus) -> None:
    run = RunFolder(tmp_path / "run")
    run.start({"verb": "prepare"})
    prepare_verb(settings(records), run)
    opened = PreparedCorpus.open(run.path)
    opened.verify()
    assert opened.hash == corpus.hash
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["corpus_hash"] == corpus.hash
    assert summary["statistics"] == corpus.statistics
    assert summary["seconds"] > 0
    assert {path.name for path in run.path.iterdir()} == {
        *("corpus.json", "documents", "tokenizer", "tokens", "summary.json"),
        *("recipe.yaml", "environment.json"),
    }


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("survived", range(4))
def test_verb_killed_while_moving_goes_on(
    records: Path,
    tmp_path: Path,
    corpus: PreparedCorpus,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    run = RunFolder(tmp_path / "run")
    real, moves = module.os.replace, Counter[str]()

    def replace(source: Path, target: Path) -> None:
        if Path(source).parent.name == ".prepared":
            if moves["done"] == survived:
                raise Killed
            moves["done"] += 1
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", replace)
        with pytest.raises(Killed):
            prepare_verb(settings(records), run)
    with pytest.raises(DataError, match="no prepared corpus there"):
        PreparedCorpus.open(run.path)
    prepare_verb(settings(records), run)
    assert PreparedCorpus.open(run.path).hash == corpus.hash
    assert not (run.path / ".prepared").exists()


def test_finished_verb_does_nothing(records: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    prepare_verb(settings(records), run)
    records.unlink()
    prepare_verb(settings(records), run)
