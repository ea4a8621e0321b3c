"""Verb ``evaluate``: models and a prepared corpus in, scores with intervals out.

Every model reads the same documents of the corpus. The run folder gets ``results.json``: loss,
perplexity and bits per byte with document bootstrap intervals, text samples, and for every model
but the first its paired difference to the first, the baseline.

Under another objective than next-token prediction every model gets the same masks or denoisers.
Then rows are resampled instead of documents (:mod:`samara.measure.loss`), there are no bits per
byte, and the perplexity of a masked model is that of its masked tokens, each predicted from both
sides: a pseudo-perplexity, comparable only between masked models.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from samara.data.objective_rows import objective_rows, objective_tokenizer
from samara.data.objectives import CausalObjective, MaskedObjective, UL2Objective
from samara.data.prepare import PreparedCorpus
from samara.data.rows import Rows
from samara.data.tokenizer import TextTokenizer
from samara.errors import ConfigError
from samara.measure.compare import Interval, paired_difference, ratio_interval, verdict
from samara.measure.config import EvaluateConfig
from samara.measure.language_model import LanguageModel
from samara.measure.language_model_folder import open_head, open_language_model
from samara.measure.loss import LossResult, evaluate_loss, perplexity, rows_within
from samara.measure.sampling import Sample, sample_texts
from samara.model.heads import MASKED
from samara.model.modeling import SamaraForCausalLM
from samara.progress import ProgressLine
from samara.runs import Lineage, RunFolder, write_json

# Documents that must give the same tokens before a model is scored on a corpus.
COMPARED_DOCUMENTS = 32


@dataclass(frozen=True, kw_only=True)
class ModelScore:
    """What was measured of one model."""

    path: str
    weights_hash: str
    result: LossResult
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model on its device, ready to be scored; ``language_model`` where it can write."""

    model: PreTrainedModel
    folder: Path
    weights_hash: str
    max_length: int
    language_model: LanguageModel | None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """What every model is asked: rows of a corpus' split, and the tokenizer that made them."""

    corpus: PreparedCorpus
    tokenizer: TextTokenizer
    rows: Rows


def evaluate(config: EvaluateConfig, run: RunFolder) -> None:
    """Score the models and write ``results.json`` to the run folder.

    Raises:
        ConfigError: If a model's tokens are not the corpus', or its context is too short.
        CheckpointError: If a folder holds no complete model of the objective's kind with its
            tokenizer.
        DataError: If the corpus or its split is missing or damaged.
    """
    corpus = PreparedCorpus.open(config.corpus)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = objective_tokenizer(
            config.objective,
            corpus.tokenizer_folder,
            Path(scratch) / "tokenizer",
            sequence_length=config.sequence_length,
        )
        rows = objective_rows(
            config.objective,
            corpus.tokens(config.split),
            tokenizer,
            sequence_length=config.sequence_length,
        )
        held_out = _HeldOut(corpus=corpus, tokenizer=tokenizer, rows=rows)
        scores = {
            name: _score(name, Path(path).expanduser(), config, held_out)
            for name, path in config.models.items()
        }
    weights = {f"models.{name}": score.weights_hash for name, score in scores.items()}
    run.write_lineage(Lineage(parents={"data": corpus.hash, **weights}))
    write_json(run.path / "results.json", _results(config, corpus, scores))


def _score(name: str, path: Path, config: EvaluateConfig, held_out: _HeldOut) -> ModelScore:
    opened = _open(name, path, config)
    _check_tokens(name, opened, held_out, config.split)
    _check_context(name, opened.max_length, config.sequence_length)
    num_rows = rows_within(held_out.rows, config.max_tokens)
    with ProgressLine(f"evaluate {name}", total=num_rows, unit="rows") as line:
        result = evaluate_loss(
            opened.model,
            held_out.rows,
            batch_size=config.batch_size,
            device=opened.device,
            precision=config.precision,
            max_tokens=config.max_tokens,
            on_progress=line.update,
        )
    samples: list[Sample] = []
    if config.sampling is not None and opened.language_model is not None:
        samples = sample_texts(opened.language_model, config.sampling, seed=config.seed)
    return ModelScore(
        path=str(path),
        weights_hash=opened.weights_hash,
        result=result,
        samples=tuple(samples),
    )


def _open(name: str, path: Path, config: EvaluateConfig) -> _Opened:
    # Weights stay float32: bfloat16 is autocast here, as in training.
    if isinstance(config.objective, MaskedObjective):
        saved = open_head(path, MASKED, device=config.device)
        return _Opened(
            model=saved.model,
            folder=saved.folder,
            weights_hash=saved.weights_hash,
            max_length=saved.model.config.max_position_embeddings,
            language_model=None,
        )
    causal = open_language_model(path, device=config.device, batch_size=config.batch_size)
    asked = causal.language_model
    if isinstance(config.objective, UL2Objective) and not isinstance(
        asked.model, SamaraForCausalLM
    ):
        raise ConfigError(
            f"models.{name}: {causal.folder} is no model of Samara's, whose decoder sees UL2's "
            "prefixes both ways; leave objective out to score it as a causal one"
        )
    return _Opened(
        model=asked.model,
        folder=causal.folder,
        weights_hash=causal.weights_hash,
        max_length=asked.max_length,
        language_model=asked,
    )


def _check_tokens(name: str, opened: _Opened, held_out: _HeldOut, split: str) -> None:
    """Refuse a model that was not trained on the corpus' tokens: its loss would mean nothing.

    The vocabularies must be equal, and the first documents give equal tokens (a normaliser or
    splitting rule may differ).
    """
    corpus, theirs = held_out.corpus, held_out.tokenizer
    remedy = f"prepare the corpus with tokenizer: {{kind: load, path: {opened.folder}}}"
    own = TextTokenizer.load(opened.folder)
    if _vocabulary(own) != _vocabulary(theirs):
        extended = theirs.vocab_size - corpus.vocab_size
        marks = f" with {extended} special tokens of the objective" if extended else ""
        raise ConfigError(
            f"models.{name}: the vocabulary of {opened.folder} ({own.vocab_size} entries) is not "
            f"that of the corpus {corpus.folder} ({theirs.vocab_size}{marks}); {remedy}"
        )
    texts = [document.text for document in islice(corpus.documents(split), COMPARED_DOCUMENTS)]
    if own.encode_batch(texts) != theirs.encode_batch(texts):
        raise ConfigError(
            f"models.{name}: the tokenizer of {opened.folder} splits text differently from that of "
            f"the corpus {corpus.folder}; {remedy}"
        )
    rows = opened.model.config.get_text_config().vocab_size
    if rows < theirs.vocab_size:
        raise ConfigError(
            f"models.{name}: {opened.folder} has {rows} embedding rows, the tokens of the corpus "
            f"{corpus.folder} need {theirs.vocab_size}; {remedy}"
        )


def _vocabulary(tokenizer: TextTokenizer) -> dict[str, int]:
    loaded = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    return dict(loaded.get_vocab(with_added_tokens=True))


def _check_context(name: str, max_length: int, sequence_length: int) -> None:
    if sequence_length > max_length:
        raise ConfigError(
            f"sequence_length: {sequence_length} exceeds the context of models.{name}, "
            f"{max_length} tokens; make it smaller"
        )


def _results(
    config: EvaluateConfig, corpus: PreparedCorpus, scores: dict[str, ModelScore]
) -> dict[str, Any]:
    baseline, *others = scores
    first = scores[baseline].result
    is_causal = isinstance(config.objective, CausalObjective)
    return {
        "schema": 1,
        "corpus_hash": corpus.hash,
        "split": config.split,
        "objective": config.objective.model_dump(mode="json"),
        "num_documents" if is_causal else "num_rows": len(first.num_targets),
        "num_tokens": int(first.num_targets.sum()),
        "models": {name: _model_entry(score, config) for name, score in scores.items()},
        "comparisons": [
            _comparison(baseline, first, name, scores[name].result, config) for name in others
        ],
        "confidence": config.confidence,
    }


def _model_entry(score: ModelScore, config: EvaluateConfig) -> dict[str, Any]:
    result = score.result
    options = _bootstrap(config)
    loss = ratio_interval(result.nll_sum, result.num_targets, **options)
    has_bytes = bool(result.num_bytes.any())
    bits_per_byte = ratio_interval(result.bits, result.num_bytes, **options) if has_bytes else None
    return {
        "path": score.path,
        "weights_hash": score.weights_hash,
        "loss": _bounds(loss),
        "perplexity": _bounds(loss.map(perplexity)),
        "bits_per_byte": None if bits_per_byte is None else _bounds(bits_per_byte),
        "samples": [{"prompt": s.prompt, "text": s.text} for s in score.samples],
    }


def _comparison(
    baseline: str, first: LossResult, name: str, result: LossResult, config: EvaluateConfig
) -> dict[str, Any]:
    difference = paired_difference(
        (result.nll_sum, result.num_targets),
        (first.nll_sum, first.num_targets),
        **_bootstrap(config),
    )
    return {
        "baseline": baseline,
        "model": name,
        "loss_difference": _bounds(difference),
        "verdict": verdict(difference),
    }


def _bootstrap(config: EvaluateConfig) -> dict[str, Any]:
    return {
        "confidence": config.confidence,
        "samples": config.bootstrap_samples,
        "seed": config.seed,
    }


def _bounds(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
