"""Verb ``evaluate``: models and a prepared corpus in, scores with intervals out.

Every model reads the same documents of the corpus. The run folder gets ``results.json``: loss,
perplexity and bits per byte with document bootstrap intervals, text samples, and for every model
but the first its paired difference to the first, the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from samara.data.prepare import PreparedCorpus
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import PackedSequences
from samara.errors import ConfigError
from samara.measure.compare import Interval, paired_difference, ratio_interval, verdict
from samara.measure.config import EvaluateConfig
from samara.measure.language_model import LanguageModel
from samara.measure.language_model_folder import SavedLanguageModel, open_language_model
from samara.measure.loss import LossResult, evaluate_loss, perplexity, rows_within
from samara.measure.sampling import Sample, sample_texts
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


def evaluate(config: EvaluateConfig, run: RunFolder) -> None:
    """Score the models and write ``results.json`` to the run folder.

    Raises:
        ConfigError: If a model's tokens are not the corpus', or its context is too short.
        CheckpointError: If a folder holds no complete model with its tokenizer.
        DataError: If the corpus or its split is missing or damaged.
    """
    corpus = PreparedCorpus.open(config.corpus)
    dataset = PackedSequences(corpus.tokens(config.split), sequence_length=config.sequence_length)
    scores = {
        name: _score(name, Path(path).expanduser(), config, corpus, dataset)
        for name, path in config.models.items()
    }
    weights = {f"models.{name}": score.weights_hash for name, score in scores.items()}
    run.write_lineage(Lineage(parents={"data": corpus.hash, **weights}))
    write_json(run.path / "results.json", _results(config, corpus, scores))


def _score(
    name: str, path: Path, config: EvaluateConfig, corpus: PreparedCorpus, dataset: PackedSequences
) -> ModelScore:
    # Weights stay float32: bfloat16 is autocast here, as in training.
    saved = open_language_model(path, device=config.device, batch_size=config.batch_size)
    language_model = saved.language_model
    _check_tokens(name, saved, corpus, config.split)
    _check_context(name, language_model, config.sequence_length)
    num_rows = rows_within(dataset, config.max_tokens)
    with ProgressLine(f"evaluate {name}", total=num_rows, unit="rows") as line:
        result = evaluate_loss(
            language_model.model,
            dataset,
            batch_size=config.batch_size,
            device=language_model.device,
            precision=config.precision,
            max_tokens=config.max_tokens,
            on_progress=line.update,
        )
    samples: list[Sample] = []
    if config.sampling is not None:
        samples = sample_texts(language_model, config.sampling, seed=config.seed)
    return ModelScore(
        path=str(path),
        weights_hash=saved.weights_hash,
        result=result,
        samples=tuple(samples),
    )


def _check_tokens(name: str, saved: SavedLanguageModel, corpus: PreparedCorpus, split: str) -> None:
    """Refuse a model that was not trained on the corpus' tokens: its loss would mean nothing.

    The vocabularies must be equal, and the first documents give equal tokens (a normaliser or
    splitting rule may differ).
    """
    remedy = f"prepare the corpus with tokenizer: {{kind: load, path: {saved.folder}}}"
    own = TextTokenizer.load(saved.folder)
    theirs = TextTokenizer.load(corpus.tokenizer_folder)
    if _vocabulary(own) != _vocabulary(theirs):
        raise ConfigError(
            f"models.{name}: the vocabulary of {saved.folder} ({own.vocab_size} entries) is not "
            f"that of the corpus {corpus.folder} ({theirs.vocab_size}); {remedy}"
        )
    texts = [document.text for document in islice(corpus.documents(split), COMPARED_DOCUMENTS)]
    if own.encode_batch(texts) != theirs.encode_batch(texts):
        raise ConfigError(
            f"models.{name}: the tokenizer of {saved.folder} splits text differently from that of "
            f"the corpus {corpus.folder}; {remedy}"
        )
    rows = saved.language_model.model.config.get_text_config().vocab_size
    if rows < corpus.vocab_size:
        raise ConfigError(
            f"models.{name}: {saved.folder} has {rows} embedding rows, the tokens of the corpus "
            f"{corpus.folder} need {corpus.vocab_size}; {remedy}"
        )


def _vocabulary(tokenizer: TextTokenizer) -> dict[str, int]:
    loaded = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    return dict(loaded.get_vocab(with_added_tokens=True))


def _check_context(name: str, language_model: LanguageModel, sequence_length: int) -> None:
    if sequence_length > language_model.max_length:
        raise ConfigError(
            f"sequence_length: {sequence_length} exceeds the context of models.{name}, "
            f"{language_model.max_length} tokens; make it smaller"
        )


def _results(
    config: EvaluateConfig, corpus: PreparedCorpus, scores: dict[str, ModelScore]
) -> dict[str, Any]:
    baseline, *others = scores
    first = scores[baseline].result
    return {
        "schema": 1,
        "corpus_hash": corpus.hash,
        "split": config.split,
        "num_documents": len(first.num_targets),
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
    bits_per_byte = ratio_interval(result.bits, result.num_bytes, **options)
    return {
        "path": score.path,
        "weights_hash": score.weights_hash,
        "loss": _bounds(loss),
        "perplexity": _bounds(loss.map(perplexity)),
        "bits_per_byte": _bounds(bits_per_byte),
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
