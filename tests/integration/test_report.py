"""The report of real runs: what the other stages write is what the report reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samara.config import validate
from samara.data.prepare import PreparedCorpus
from samara.measure.config import EvaluateConfig
from samara.measure.evaluate import evaluate
from samara.report.config import ReportConfig
from samara.report.report import report
from samara.runs import RunFolder, read_json
from samara.train.config import PretrainConfig
from samara.train.pretrain import pretrain

Settings = Callable[..., dict[str, Any]]


def new_run(path: Path) -> RunFolder:
    path.mkdir()
    return RunFolder(path)


def test_two_real_arms_become_a_page(
    tmp_path: Path, small_corpus: PreparedCorpus, pretrain_settings: Settings
):
    arms = {"dense": pretrain_settings(), "CoLA": pretrain_settings(model__cola={"rank": 8})}
    for name, settings in arms.items():
        run = new_run(tmp_path / name)
        run.start({"schema": 1, "pretrain": settings})
        pretrain(validate(PretrainConfig, settings), run)
    folders = {name: str(tmp_path / name) for name in arms}
    evaluation = {
        "models": folders,
        "corpus": str(small_corpus.folder),
        "sequence_length": 32,
        "device": "cpu",
        "bootstrap_samples": 200,
        "sampling": {"prompts": ["return the"], "max_new_tokens": 4},
    }
    evaluate(validate(EvaluateConfig, evaluation), new_run(tmp_path / "evaluation"))
    config = ReportConfig(
        pretraining=folders,
        evaluation=str(tmp_path / "evaluation"),
        corpus=str(small_corpus.folder),
        demo_scale=True,
    )

    run = new_run(tmp_path / "page")
    report(config, run)

    page = (run.path / "report.html").read_text(encoding="utf-8")
    results = read_json(tmp_path / "evaluation" / "results.json")
    for name in arms:
        assert f"{results['models'][name]['loss']['value']:.3f}" in page
        assert read_json(tmp_path / name / "summary.json")["weights_hash"][:16] in page
    assert results["comparisons"][0]["verdict"] in page
    assert "other weights" not in page
    assert small_corpus.hash[:16] in page
    assert str(tmp_path) not in page
    assert len(re.findall(r'class="plot"', page)) == 3
