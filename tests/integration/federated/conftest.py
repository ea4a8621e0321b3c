"""A tiny model, the rows of eight users, and a run of two rounds over six clients."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from samara.config import dump_yaml, validate
from samara.errors import Stopped
from samara.federated.config import FederateConfig
from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import RunFolder
from samara.sparse.support import Support

WORDS = "the a film book was good bad great awful fine dull very quite not and".split()
VOCABULARY = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", *WORDS])}
DEVICE = {
    "memory_bytes": 1e9,
    "download_bytes_per_second": 1e6,
    "upload_bytes_per_second": 1e6,
    "compute_watts": 10,
    "communicate_watts": 4,
    "source": "by hand",
}
GIVEN = {
    "kind": "given",
    "seconds_fixed": 0.1,
    "seconds_per_layer": 0.2,
    "bytes_fixed": 1e6,
    "bytes_per_layer": 1e6,
    "source": "by hand",
}


def _build(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    if kind == "bert":
        BertForMaskedLM(
            BertConfig(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=24,
                max_position_embeddings=32,
            )
        ).save_pretrained(folder)
    else:
        design = ModelConfig.model_validate(
            {
                "hidden_size": 16,
                "num_hidden_layers": 4,
                "head_dim": 8,
                "ffn_dim": 24,
                "vocab_size": 32,
                "max_position_embeddings": 32,
            }
        )
        save_model(SamaraForCausalLM(SamaraConfig.from_design(design)), folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: _build(kind, root / kind) for kind in ("samara", "bert")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews of eight users, and two kinds of device."""
    folder = tmp_path_factory.mktemp("rows")
    for split, number in (("train", 240), ("test", 24)):
        draw = np.random.default_rng(len(split))
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(number):
                good = bool(draw.integers(2))
                word = draw.choice(["good", "great", "fine"] if good else ["bad", "awful", "dull"])
                filler = " ".join(draw.choice(["very", "quite", "the", "a"], draw.integers(1, 4)))
                row = {
                    "id": f"{split}{i}",
                    "text": f"the {draw.choice(['film', 'book'])} was {filler} {word} .",
                    "label": "positive" if good else "negative",
                    "user": f"user-{i % 8}",
                }
                file.write(json.dumps(row) + "\n")
    for name, slowness in (("quick", 1.0), ("slow", 20.0)):
        (folder / f"{name}.yaml").write_text(
            dump_yaml({"name": name, "slowness": slowness, **DEVICE})
        )
    return folder


def _settings(base: Path, rows: Path, **changes: Any) -> FederateConfig:
    """Six clients, two rounds; ``a__b`` changes a.b."""
    data: dict[str, Any] = {
        "seed": 5,
        "init_from": str(base),
        "task": {"kind": "labels", "name": "reviews", "data": str(rows / "test.jsonl")},
        "data": {"train": str(rows / "train.jsonl"), "sequence_length": 16},
        "lora": {"rank": 2, "dropout": 0.1},
        "configurator": {"rates": [0.25, 0.5], "shapes": ["incremental"]},
        "sharing": {"direction": "share_common", "patience": 1, "hysteresis": 0.0},
        "clients": {
            "number": 6,
            "per_round": 3,
            "partition": {"kind": "dirichlet", "alpha": 1.0},
            "devices": [{"profile": str(rows / f"{name}.yaml")} for name in ("quick", "slow")],
        },
        "local": {"steps": 2, "batch_size": 4, "optimizer": {"lr": 0.01}, "device": "cpu"},
        "server": {"rounds": 2},
        "clock": GIVEN,
    }
    for path, value in changes.items():
        node = data
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return validate(FederateConfig, data)


def _folder_of(path: Path) -> RunFolder:
    path.mkdir(exist_ok=True)
    return RunFolder(path)


def _finished(config: FederateConfig, path: Path) -> dict[str, Any]:
    federate(config, _folder_of(path))
    return json.loads((path / "results.json").read_text())


def _outcome(path: Path) -> dict[str, Any]:
    """Everything that has to be the same: values, state, log; without times that were measured."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if "cpu_seconds" not in k}
        return [clean(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*.safetensors")):
        if file.name == "delta.safetensors":  # says when it was made
            continue
        if file.name == "support.safetensors":  # the order of its header is none in particular
            found[file.name] = Support.load(file).support_id
            continue
        found[str(file.relative_to(path))] = file.read_bytes()
    newest = sorted((path / "checkpoints").iterdir())[-1]
    found["state"] = clean(json.loads((newest / "state.json").read_text())["state"])
    found["log"] = [clean(json.loads(x)) for x in (path / "metrics.jsonl").read_text().splitlines()]
    found["results"] = clean(json.loads((path / "results.json").read_text()))
    found["sharing"] = json.loads((path / "sharing.json").read_text())
    return found


@pytest.fixture
def settings() -> Callable[..., FederateConfig]:
    return _settings


@pytest.fixture
def folder_of() -> Callable[[Path], RunFolder]:
    return _folder_of


@pytest.fixture
def finished() -> Callable[[FederateConfig, Path], dict[str, Any]]:
    return _finished


@pytest.fixture
def outcome() -> Callable[[Path], dict[str, Any]]:
    return _outcome


@pytest.fixture
def device_fields() -> dict[str, Any]:
    """What a device says beside its name and slowness."""
    return DEVICE


@pytest.fixture
def stop_after_a_round(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Begins a federation and signals its process in the first round."""
    run_round = InProcessDriver.run_round

    def signalled(driver: InProcessDriver) -> Any:
        record = run_round(driver)
        signal.raise_signal(signal.SIGTERM)
        return record

    def begin(config: FederateConfig, run: RunFolder) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(InProcessDriver, "run_round", signalled)
            with pytest.raises(Stopped, match="stopped after round 1; saved"):
                federate(config, run)

    return begin
