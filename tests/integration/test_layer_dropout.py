"""`samara pretrain` with layers dropped: resumed, counted, and whole afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from samara.config import validate
from samara.errors import ConfigError, ResourceError, Stopped
from samara.measure.budget import budget
from samara.measure.loss import evaluate_loss
from samara.model.loading import load_model
from samara.runs import RunFolder, hash_file, read_json
from samara.train import pretrain as pretrain_module
from samara.train.checkpoint import TrainingState
from samara.train.config import PretrainConfig
from samara.train.layer_dropout import draw_gates
from samara.train.pretrain import predict_memory, pretrain

Settings = Callable[..., dict[str, Any]]

TIMING = {"tokens_per_second", "mfu", "memory_bytes", "seconds"}
HALF = {"rate": 0.5, "scale": "inverse_keep"}


def run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    result = RunFolder(folder)
    pretrain(validate(PretrainConfig, settings), result)
    return result


def content(result: RunFolder) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    last = sorted((result.path / "checkpoints").iterdir())[-1]
    files = [result.path / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    summary = read_json(result.path / "summary.json")
    return {
        "files": {f"{f.parent.name}/{f.name}": hash_file(f) for f in files},
        "metrics": [
            {key: value for key, value in record.items() if key not in TIMING}
            for record in result.metrics()
        ],
        "counts": {key: summary[key] for key in ("steps", "tokens", "flops", "weights_hash")},
    }


@pytest.fixture
def settings(pretrain_settings: Settings) -> Settings:
    """Four layers, half of them in each pass; checkpoints at 4, 8 and 12."""

    def make(**changes: Any) -> dict[str, Any]:
        return pretrain_settings(
            **{"model__num_hidden_layers": 4, "training__layer_dropout": HALF, **changes}
        )

    return make


def test_rate_zero_is_the_plain_run(settings: Settings, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", settings(training__layer_dropout=None))
    gated = run(tmp_path / "gated", settings(training__layer_dropout={"rate": 0.0}))

    assert content(gated) == content(plain)


@pytest.mark.parametrize("fields", [HALF, {"rate": 0.4, "gate": "bernoulli", "shape": "decay"}])
def test_an_interrupted_run_is_the_straight_one(
    settings: Settings,
    fields: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = run(tmp_path / "straight", settings(training__layer_dropout=fields))
    show_progress = pretrain_module._progress

    def progress(line: Any, start: TrainingState) -> Callable[..., None]:
        show = show_progress(line, start)

        def on_step(state: TrainingState, *arguments: Any) -> None:
            show(state, *arguments)
            if state.step in (3, 7):
                signal.raise_signal(signal.SIGTERM)

        return on_step

    monkeypatch.setattr(pretrain_module, "_progress", progress)
    for _ in range(2):
        with pytest.raises(Stopped):
            run(tmp_path / "resumed", settings(training__layer_dropout=fields))
    resumed = run(tmp_path / "resumed", settings(training__layer_dropout=fields))

    assert content(resumed) == content(straight)


def test_what_is_counted_is_what_was_computed(settings: Settings, tmp_path: Path) -> None:
    fields = {"rate": 0.4, "gate": "bernoulli", "shape": "uniform"}
    changes = {"model__ffn_dim": [32, 40, 48, 56], "training__layer_dropout": fields}
    result = run(tmp_path / "run", settings(seed=3, **changes))
    summary = read_json(result.path / "summary.json")
    config = validate(PretrainConfig, settings(seed=3, **changes))
    assert config.training.layer_dropout is not None
    rates = config.training.layer_dropout.rates(4)
    costs = budget(load_model(result.path / "model").config.to_design())
    layers = [layer.flops_per_token(32).training for layer in costs.layers]
    expected = 0
    for step in range(12):
        for batch in range(2):
            gates = draw_gates(rates, seed=3, node=0, round=step, batch=batch)
            active = sum(cost for cost, runs in zip(layers, gates, strict=True) if runs)
            expected += 4 * 32 * (costs.head_flops.training + active)

    assert summary["flops"] == expected
    assert result.lineage().spent.flops == expected
    assert summary["flops_per_token"] == pytest.approx(
        costs.head_flops.training + 0.6 * sum(layers)
    )
    assert summary["layer_dropout"] == {"drop": [0.4] * 4, "keep": [0.6] * 4, "budget": None}
    assert 0 < summary["mfu"] < 1


def test_the_model_and_its_evaluation_are_whole(settings: Settings, tmp_path: Path) -> None:
    from samara.data.prepare import PreparedCorpus
    from samara.data.tokens import PackedSequences

    recipe = settings()
    result = run(tmp_path / "run", recipe)
    model = load_model(result.path / "model")
    corpus = PreparedCorpus.open(Path(recipe["data"]["corpus"]))
    rows = PackedSequences(corpus.tokens("validation"), sequence_length=32)
    loss = evaluate_loss(
        model, rows, batch_size=3, device=torch.device("cpu"), precision="float32"
    ).loss

    assert len(model.model.layers) == 4
    assert read_json(result.path / "summary.json")["validation_loss"] == pytest.approx(
        loss, rel=1e-5
    )
    losses = [r["loss"] for r in result.metrics() if "loss" in r]
    assert losses[-1] < losses[0]


def predicted(settings: dict[str, Any]) -> int:
    from samara.train.origin import Origin
    from samara.train.parallel import Place

    config = validate(PretrainConfig, settings)
    assert config.model is not None
    origin = Origin(design=config.model.expand(vocab_size=300))
    return predict_memory(config, origin, Place(device=torch.device("cpu")), micro_batch_size=4)


def test_memory_is_promised_for_a_budget_only(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predicted(settings(training__layer_dropout=None))
    half = predicted(settings())
    independent = predicted(settings(training__layer_dropout={"rate": 0.5, "gate": "bernoulli"}))
    assert half < whole == independent

    monkeypatch.setattr(
        pretrain_module,
        "check_memory",
        lambda *, predicted, device: _refuse(predicted, (half + whole) // 2),
    )
    run(tmp_path / "half", settings(training__max_steps=1))
    with pytest.raises(ResourceError):
        run(tmp_path / "whole", settings(training__max_steps=1, training__layer_dropout=None))


def _refuse(predicted: int, available: int) -> None:
    if predicted > available:
        raise ResourceError("too large")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rate": 0.5, "protect_first": 4},
            "training.layer_dropout.protect_first: 4 and protect_last 0 leave none of 4 layers",
        ),
        ({"rate": 0.05}, "training.layer_dropout.rate: 0.05 of 4 layers rounds to no layer"),
        (
            {"rate": 0.5, "scale": "survival_at_eval"},
            r"training: layer_dropout.scale: survival_at_eval changes how a model is evaluated",
        ),
        ({"rate": 0.5, "shape": "linear"}, "training.layer_dropout.shape"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_it_runs(
    settings: Settings, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(PretrainConfig, settings(training__layer_dropout=fields))


def test_a_model_to_go_on_from_is_checked_too(settings: Settings, tmp_path: Path) -> None:
    first = run(tmp_path / "first", settings(training__max_steps=1))
    recipe = settings(
        model=None,
        init_from=str(first.path),
        training__layer_dropout={"rate": 0.1},
        data__corpus={
            "source": {"kind": "files", "paths": ["nowhere"]},
        },
    )
    recipe["data"]["corpus"] = settings()["data"]["corpus"]
    with pytest.raises(ConfigError, match=r"training.layer_dropout.rate: 0.1 of 4 layers rounds"):
        run(tmp_path / "second", recipe)
