"""Run folders as the other stages write them, small but with realistic figures."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from samara.data.config import InterpreterDocs, PrepareConfig, TrainTokenizer
from samara.measure.budget import budget
from samara.model.config import ColaConfig, LayerwiseScaling, ModelConfig
from samara.report.config import ReportConfig
from samara.runs import RunFolder, write_json

VOCAB = 4096
LENGTH = 256
STEPS = 244
BATCH_TOKENS = 16 * LENGTH
CORPUS_HASH = "c0ffee" * 10 + "beef"

COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "head_dim": 32,
    "gqa_group_size": 2,
    "vocab_size": VOCAB,
}
SCALING = LayerwiseScaling(alpha=(0.5, 1.0), beta=(1.0, 4.0))
DESIGNS = {
    "dense": ModelConfig(**COMMON, ffn_dim=640),
    "layer-wise": ModelConfig(**COMMON, ffn_dim_divisor=32, layerwise_scaling=SCALING),
    "CoLA + layer-wise": ModelConfig(
        **COMMON,
        ffn_dim_divisor=32,
        layerwise_scaling=SCALING,
        cola=ColaConfig(rank=64, activation="both"),
    ),
}
FINAL = {"dense": 4.212, "layer-wise": 4.197, "CoLA + layer-wise": 4.305}
SPEED = {"dense": 12_350.0, "layer-wise": 11_900.0, "CoLA + layer-wise": 16_480.0}
ENVIRONMENT = {
    "python": "3.11.9",
    "packages": {"samara": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.17.0"},
    "commit": "72bc27b0c1de",
    "system": "Linux x86_64",
    "cpu": "AMD EPYC 7B13",
    "cpu_count": 2,
    "memory_bytes": 8_324_665_344,
}
PROMPTS = {
    "Return the": " number of elements in the given array, or None if the *axis* argument is not "
    "specified.\n\nParameters\n----------\nx : array_like\n    Input array.",
    "Raise a ValueError if": " the given string is not a valid <b>name</b> of the object & the "
    "<script>alert(1)</script> of the class.",
    "This module": " provides the interface of the file object to be used with the default "
    "encoding for the current process.",
}


def write_run(
    folder: Path,
    name: str,
    *,
    state: str = "finished",
    steps: int = STEPS,
    log_every: int = 4,
    seed: int = 0,
) -> Path:
    """One pretraining run; ``state`` other than ``finished`` leaves no summary."""
    design = DESIGNS[name].expand()
    found = budget(design)
    per_token = found.flops_per_token(LENGTH).training
    generator = random.Random(f"{name}{seed}")
    final, speed = FINAL[name], SPEED[name]
    stopped_at = steps if state == "finished" else steps // 3
    records: list[dict[str, Any]] = []
    for step in range(1, stopped_at + 1):
        tokens = step * BATCH_TOKENS
        progress = step / steps
        loss = final + 0.02 + (math.log(VOCAB) - final) * math.exp(-6 * progress**0.6)
        common = {"step": step, "tokens": tokens, "flops": float(tokens * per_token)}
        if step % log_every == 0 or step == stopped_at:
            records.append(
                {
                    **common,
                    "loss": loss + generator.gauss(0, 0.045),
                    "lr": 3e-3 * progress,
                    "grad_norm": 0.8,
                    "tokens_per_second": speed,
                    "mfu": 0.31,
                    "memory_bytes": 700_000_000,
                    "seconds": tokens / speed,
                }
            )
        if step % 24 == 0 or step == steps:
            records.append({**common, "validation_loss": loss - 0.02 + generator.gauss(0, 0.004)})
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    write_json(folder / "environment.json", ENVIRONMENT)
    message = {"failed": "NonFiniteLossError: step 81: the loss is nan; see /root/runs/x/ckpt"}
    status = {"state": state, "message": message[state]} if state in message else {"state": state}
    write_json(folder / "status.json", status)
    recipe = {"schema": 1, "name": name, "pretrain": {"data": {"sequence_length": LENGTH}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    if state == "finished":
        parameters = found.parameters
        seconds = steps * BATCH_TOKENS / speed
        write_json(
            folder / "summary.json",
            {
                "schema": 1,
                "parameters": parameters.total,
                "embedding_parameters": parameters.embedding,
                "flops_per_token": per_token,
                "steps": steps,
                "tokens": steps * BATCH_TOKENS,
                "flops": float(steps * BATCH_TOKENS * per_token),
                "seconds": seconds,
                "tokens_per_second": speed,
                "peak_memory_bytes": round(4.1e8 + 60 * parameters.total),
                "mfu": 0.31,
                "train_loss": final + 0.01,
                "validation_loss": final,
                "energy_kwh": seconds * 20 / 3.6e6,
                "cost": seconds * 20 / 3.6e6 * 0.30,
                "currency": "USD",
                "device": "cpu",
                "device_profile": "AMD EPYC 7B13, 2 threads",
                "corpus_hash": CORPUS_HASH,
                "weights_hash": weights_hash(name),
                "design": design.model_dump(mode="json"),
            },
        )
    return folder


def weights_hash(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def bounds(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + 1.1 * spread}


def write_evaluation(
    folder: Path,
    names: list[str],
    *,
    verdicts: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """An evaluation of the arms; ``verdicts`` gives difference and half-width per arm."""
    known = verdicts or {"layer-wise": (-0.015, 0.021), "CoLA + layer-wise": (0.093, 0.031)}
    models = {
        name: {
            "path": f"/root/runs/{name}/model",
            "weights_hash": weights_hash(name),
            "loss": bounds(FINAL[name], 0.036),
            "perplexity": {
                key: math.exp(value) for key, value in bounds(FINAL[name], 0.036).items()
            },
            "bits_per_byte": bounds(FINAL[name] / math.log(2) / 3.92, 0.013),
            "samples": [{"prompt": p, "text": t} for p, t in PROMPTS.items()],
        }
        for name in names
    }
    comparisons = []
    for name in names[1:]:
        value, spread = known[name]
        low, high = value - spread, value + spread
        word = "better" if high < 0 else "worse" if low > 0 else "unresolved"
        comparisons.append(
            {
                "baseline": names[0],
                "model": name,
                "loss_difference": {"value": value, "low": low, "high": high},
                "verdict": word,
            }
        )
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"state": "finished"})
    write_json(
        folder / "results.json",
        {
            "schema": 1,
            "corpus_hash": CORPUS_HASH,
            "split": "validation",
            "num_documents": 1481,
            "num_tokens": 102_613,
            "models": models,
            "comparisons": comparisons,
            "confidence": 0.95,
        },
    )
    return folder


def write_corpus(folder: Path) -> Path:
    """The JSON file of a prepared corpus."""
    packages = {
        "numpy": 4211, "torch": 6120, "python": 7305, "transformers": 5260, "scipy": 2504,
        "sympy": 1820, "networkx": 880, "pydantic": 610, "rich": 402, "typer": 210,
        "hypothesis": 205, "pytest": 190, "fsspec": 160, "PyYAML": 31,
    }  # fmt: skip
    ranked = dict(sorted(packages.items(), key=lambda item: -item[1]))
    settings = PrepareConfig(source=InterpreterDocs(), tokenizer=TrainTokenizer(vocab_size=VOCAB))
    folder.mkdir(parents=True)
    write_json(
        folder / "corpus.json",
        {
            "schema": 1,
            "hash": CORPUS_HASH,
            "settings": settings.model_dump(mode="json"),
            "vocab_size": VOCAB,
            "special_tokens": {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
            "statistics": {
                "splits": {
                    "train": {
                        "documents": 27_020, "characters": 9_000_000, "bytes": 9_120_331,
                        "tokens": 2_310_444,
                    },
                    "validation": {
                        "documents": 1481, "characters": 400_000, "bytes": 405_112,
                        "tokens": 102_613,
                    },
                    "test": {
                        "documents": 1407, "characters": 390_000, "bytes": 391_004,
                        "tokens": 99_870,
                    },
                },
                "bytes_per_token": 3.95,
                "dropped": {
                    "exact_duplicate": 5120, "near_duplicate": 3204, "not_english": 911,
                    "not_prose": 2877, "too_short": 10_512,
                },
                "skipped": {"docstrings_without_summary": 57, "unparsable_files": 2},
                "num_packages": 61,
                "packages": ranked,
            },
        },
    )  # fmt: skip
    return folder


@pytest.fixture
def quickstart(tmp_path: Path) -> Callable[..., tuple[ReportConfig, RunFolder]]:
    """Make a chain's folder with three arms, a corpus and an evaluation."""

    def make(
        *,
        states: Mapping[str, str] | None = None,
        evaluated: bool = True,
        verdicts: Mapping[str, tuple[float, float]] | None = None,
        **changes: Any,
    ) -> tuple[ReportConfig, RunFolder]:
        return write_quickstart(
            tmp_path / "quickstart",
            states=states,
            evaluated=evaluated,
            verdicts=verdicts,
            **changes,
        )

    return make


def write_quickstart(
    base: Path,
    *,
    states: Mapping[str, str] | None = None,
    evaluated: bool = True,
    verdicts: Mapping[str, tuple[float, float]] | None = None,
    log_every: int = 4,
    **changes: Any,
) -> tuple[ReportConfig, RunFolder]:
    known = states or {}
    folders = {"dense": "dense", "layer-wise": "layerwise", "CoLA + layer-wise": "cola"}
    for name, folder in folders.items():
        write_run(base / folder, name, state=known.get(name, "finished"), log_every=log_every)
    write_corpus(base / "data")
    if evaluated:
        write_evaluation(base / "evaluation", list(folders), verdicts=verdicts)
    (base / "recipe.yaml").write_text("schema: 1\nname: quickstart\nstages: {}\n")
    settings: dict[str, Any] = {
        "title": "Three small language models, one token budget",
        "pretraining": {name: str(base / folder) for name, folder in folders.items()},
        "evaluation": str(base / "evaluation") if evaluated else None,
        "corpus": str(base / "data"),
        "demo_scale": True,
        **changes,
    }
    run = RunFolder(base / "report")
    run.path.mkdir()
    return ReportConfig.model_validate(settings), run
