"""Settings of the data: where text comes from, how it is cleaned, split, tokenised and packed.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class InterpreterDocs(Config):
    """The documentation already on the machine: pydoc topics and docstrings, read, not imported."""

    kind: Literal["interpreter_docs"] = "interpreter_docs"
    packages: tuple[str, ...] | None = None
    """Installed packages to read. Left out: all of them."""
    standard_library: bool = True
    """Also read the standard library and pydoc's topics."""
    exclude: tuple[str, ...] = ()
    """Packages to leave out."""


class LocalFiles(Config):
    """Text, JSON Lines or Parquet files, plain or gzipped."""

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or glob patterns: .txt, .jsonl (one record a line), .parquet, each also with .gz. A
    record may bring `id`, `package`, `module`, `name` and `summary` beside its text."""
    validation_paths: tuple[str, ...] = ()
    """Files whose documents are the validation split; what is nearly the same is dropped from the
    rest. Left out: split by document."""
    text_field: str = "text"
    """The field that holds the text, in JSON Lines and Parquet."""
    text_documents: Literal["file", "passages"] = "file"
    """What is one document in a .txt file: the whole file, or a passage of paragraphs (cut at a
    blank line) of about a thousand characters."""


class HubDataset(Config):
    """A dataset of the Hugging Face hub, or a local folder in the same layout, by `datasets`."""

    kind: Literal["hub"] = "hub"
    name: str
    """The dataset's name, as `roneneldan/TinyStories`, or a local folder."""
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None
    """Commit or tag of the dataset: name one for a result that can be repeated."""
    streaming: bool = True
    """Read while downloading instead of downloading first."""


Source = Annotated[InterpreterDocs | LocalFiles | HubDataset, Field(discriminator="kind")]


class CleaningConfig(Config):
    """Which documents are kept."""

    min_characters: NonNegativeInt = 40
    """Shorter documents are dropped."""
    english_only: bool = True
    """Drop texts that are not English prose (other languages, code, tables)."""
    near_duplicate_threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.8
    """Drop a document whose word 5-grams have this estimated Jaccard similarity or more with one
    kept before (MinHash). Left empty: only exact duplicates are dropped."""


class SplitConfig(Config):
    """One split by document, shared by every stage: a hash of the document's id decides."""

    validation_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.05
    salt: str = "samara"
    """Another salt gives another split."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ConfigError("validation_fraction and test_fraction leave nothing to train on")
        return self


class TrainTokenizer(Config):
    """Train a byte-level BPE on the training split."""

    kind: Literal["train"] = "train"
    vocab_size: Annotated[int, Field(ge=260, le=2**20)] = 8192
    """Entries, special tokens included; at least the 256 bytes and the special tokens."""


class LoadTokenizer(Config):
    """Use a tokenizer that exists."""

    kind: Literal["load"] = "load"
    path: str
    """A folder with tokenizer.json (any Hugging Face tokenizer), or a prepared corpus."""


Tokenizer = Annotated[TrainTokenizer | LoadTokenizer, Field(discriminator="kind")]


class PrepareConfig(Config):
    """Verb `prepare`: text in, a folder of documents, tokenizer and token shards out."""

    source: Source
    cleaning: CleaningConfig = CleaningConfig()
    split: SplitConfig = SplitConfig()
    tokenizer: Tokenizer = TrainTokenizer()
    max_documents: PositiveInt | None = None
    """Stop after this many kept documents."""


class ChatConfig(Config):
    """What instruction tuning reads: conversations, one record a line."""

    paths: tuple[str, ...] = Field(min_length=1)
    """JSON Lines files or glob patterns, each also .gz; records of `messages`, of `instruction`
    (with `input`) and `output`, of `prompt` and `completion`, or of `instruction` and `instances`.
    """
    validation_paths: tuple[str, ...] = ()
    """Files whose conversations are the validation split. Left out: a fraction of the records."""
    validation_fraction: Fraction = 0.05
    """Share of the records that is held out where there are no validation_paths; a hash of a
    record's turns decides, so equal records stay together."""
    sequence_length: PositiveInt = 256
    """Tokens of one training sequence; conversations are packed whole."""
    too_long: Literal["shorten", "refuse"] = "shorten"
    """A conversation longer than a sequence loses what costs least (the end, or the middle of the
    prompt; never the whole answer), or stops the run."""
    num_workers: NonNegativeInt = 0
    """Processes that read ahead; the order does not depend on it."""


class PackedRows(Config):
    """Documents back to back, cut into rows: nothing is padded or lost."""

    kind: Literal["packed"] = "packed"


class OpenELMRows(Config):
    """OpenELM's rows: one chunk of a document each, tokenised on the fly, cut or padded.

    Needs no `document_boundaries`: a row holds one document. Validation stays packed, so that
    losses compare.
    """

    kind: Literal["openelm"] = "openelm"
    words: PositiveInt = 2048
    """Words of a chunk, what stands between single spaces."""
    min_characters: NonNegativeInt = 200
    """Chunks with fewer are dropped (lower case, no punctuation, runs of white space as one)."""
    min_tokens: NonNegativeInt = 256
    """Chunks with fewer, begin and end marks included, are dropped."""


RowsConfig = Annotated[PackedRows | OpenELMRows, Field(discriminator="kind")]


class DataConfig(Config):
    """What a training run reads."""

    corpus: str | PrepareConfig
    """A prepared folder (`stage:NAME` or a path), or the settings to prepare one; it is then made
    once in the cache folder and found again by its hash."""
    sequence_length: PositiveInt = 256
    """Tokens of one training sequence."""
    rows: RowsConfig = PackedRows()
    """How training text becomes sequences."""
    document_boundaries: bool = True
    """Packed documents do not see each other: attention and positions start anew at each one."""
    num_workers: NonNegativeInt = 0
    """Processes that read ahead; the order does not depend on it."""
