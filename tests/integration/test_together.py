"""Two processes that train together do what one does; a checkpoint does not know how many wrote it.

All jobs run in one pair of processes, which imports once; the last job ends one of them.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import distributed

from samara.config import dump_yaml, validate
from samara.errors import ConfigError
from samara.lifecycle import run_recipe
from samara.recipe import load_recipe
from samara.runs import RunFolder, read_json
from samara.train.checkpoint import verify
from samara.train.config import PretrainConfig, TrainingConfig
from samara.train.parallel import join_processes
from samara.train.pretrain import training_place

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

Settings = Callable[..., dict[str, Any]]
WORKER = Path(__file__).with_name("together.py")

DESIGNS: dict[str, list[str]] = {
    "dense": [],
    # Layer-wise widths and low rank: shards of other sizes in every layer, some of them uneven.
    "cola": [
        "pretrain.model.ffn_dim=[33, 48]",
        "pretrain.model.cola.rank=7",
        "pretrain.training.activation_checkpointing=cola_m",
        "pretrain.checkpoint.average_last=2",
    ],
    # A small rate: its iteration in bfloat16 makes much of the last bit of a gradient.
    "muon": ["pretrain.optimizer.kind=muon", "pretrain.optimizer.lr=0.0005"],
}
TOGETHER = (("dense", "ddp"), ("cola", "fsdp"), ("dense", "fsdp"), ("cola", "ddp"), ("muon", "ddp"))
"""Designs, and how two processes share them."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Runs:
    """What a pair of processes and single ones made of the same recipe."""

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text(dump_yaml({"schema": 1, "name": "small", "pretrain": settings}))
        self.said: list[dict[str, str]] = []
        self.errors = ""
        self.failed, self.verified = "", 0

    def job(self, name: str, *settings: str, **options: Any) -> dict[str, Any]:
        out = str(self.root / name)
        return {
            "name": name,
            "recipe": str(self.recipe),
            "settings": settings,
            "out": out,
            "port": free_port(),
            **options,
        }

    def alone(self, name: str, *settings: str) -> RunFolder:
        """Work off in this process; what is finished is left."""
        run_recipe(load_recipe(self.recipe, settings), self.root / name, say=lambda _: None)
        return RunFolder(self.root / name)

    def together(self, jobs: list[dict[str, Any]]) -> None:
        """Work off in two processes; each one's last words per job are kept in ``said``."""
        path = self.root / "jobs.json"
        path.write_text(json.dumps(jobs))
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(path), str(rank), "2"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300) for process in processes]
        self.said = [
            dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
            for out, _ in outputs
        ]
        self.errors = "\n".join(errors for _, errors in outputs)


@pytest.fixture(scope="module")
def kept() -> dict[str, Runs]:
    return {}


@pytest.fixture
def runs(
    kept: dict[str, Runs],
    pretrain_settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """All runs, done once."""
    if not kept:
        settings = pretrain_settings(
            training__max_steps=6,
            training__micro_batch_size=2,
            training__evaluate_every_steps=3,
            checkpoint__every_steps=3,
            logging__every_steps=1,
        )
        made = kept["runs"] = Runs(tmp_path_factory.mktemp("together"), settings)
        jobs = [
            made.job(
                f"{design}-{parallel}", *DESIGNS[design], f"pretrain.training.parallel={parallel}"
            )
            for design, parallel in TOGETHER
        ]
        left_off(made.alone("half", *DESIGNS["cola"]))
        jobs.append(made.job("half", *DESIGNS["cola"]))
        jobs += [
            made.job("stopped", at_step=(3, 1, "stop")),
            made.job("stopped-fsdp", "pretrain.training.parallel=fsdp", at_step=(3, 0, "stop")),
            made.job("none", "pretrain.training.parallel=none"),
            made.job(
                "muon-fsdp", "pretrain.optimizer.kind=muon", "pretrain.training.parallel=fsdp"
            ),
            made.job("uneven", "pretrain.training.batch_size=6"),
            made.job("dropping", "pretrain.training.layer_dropout.rate=0.5"),
            made.job("killed", at_step=(5, 1, "kill")),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            made.together(jobs)
        killed = RunFolder(made.root / "killed")
        made.failed = killed.status()["state"]
        made.verified = verify(killed.path / "checkpoints" / "step-00000003")["state"]["step"]
    return kept["runs"]


def losses(run: RunFolder, *names: str) -> list[float]:
    """All losses of the log, or what else it holds, in its order."""
    names = names or ("loss", "validation_loss")
    return [record[name] for record in run.metrics() for name in names if name in record]


def left_off(run: RunFolder) -> None:
    """Leave a finished run as if it had been killed after its checkpoint at step 3."""
    shutil.rmtree(run.path / "checkpoints" / "step-00000006")
    shutil.rmtree(run.path / "model")
    run.set_status("running", fingerprint=run.status()["fingerprint"])


@pytest.mark.parametrize(("design", "parallel"), TOGETHER)
def test_two_processes_train_as_one(runs: Runs, design: str, parallel: str) -> None:
    name = f"{design}-{parallel}"
    assert [said.get(name) for said in runs.said] == ["done", "done"], runs.errors
    one, two = runs.alone(design, *DESIGNS[design]), RunFolder(runs.root / name)
    assert len(losses(two)) == 6 + 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert losses(two, "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-4)
    first, second = (read_json(run.path / "summary.json") for run in (one, two))
    assert second["validation_loss"] == pytest.approx(first["validation_loss"], abs=1e-5)
    assert (second["tokens"], second["flops"]) == (first["tokens"], first["flops"])
    assert second["processes"] == 2
    expected, found = (load_file(run.path / "model" / "model.safetensors") for run in (one, two))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize("name", ["stopped", "stopped-fsdp", "killed"])
def test_one_process_goes_on_from_what_two_left(
    runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = []
    if name == "stopped-fsdp":  # its recipe says fsdp: one process, but started by torchrun
        settings.append("pretrain.training.parallel=fsdp")
        environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        for key, value in environment.items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run = runs.alone(name, *settings)
    straight = runs.root / "dense-ddp"
    assert losses(run) == pytest.approx(losses(RunFolder(straight)), abs=1e-5)
    assert read_json(run.path / "summary.json")["processes"] == 1


def test_two_processes_go_on_from_what_one_left(runs: Runs) -> None:
    assert [said.get("half") for said in runs.said] == ["done", "done"], runs.errors
    run = RunFolder(runs.root / "half")
    assert read_json(run.path / "summary.json")["processes"] == 2
    assert losses(run) == pytest.approx(losses(RunFolder(runs.root / "cola-ddp")), abs=1e-5)


@pytest.mark.parametrize("name", ["stopped", "stopped-fsdp"])
def test_a_signal_to_one_process_stops_both_after_the_same_step(runs: Runs, name: str) -> None:
    first, second = (said[name] for said in runs.said)
    assert first == second
    assert re.fullmatch(
        r"Stopped: stopped by SIGTERM after step [34]; saved; run the same.*", first
    )


def test_a_killed_process_ends_the_run_with_a_line_and_a_whole_checkpoint(runs: Runs) -> None:
    said = runs.said[0]["killed"]
    assert re.fullmatch(
        r"ResourceError: step [56]: another of the 2 processes has ended; the last checkpoint is "
        r".*step-00000003; run the same command to go on from the last checkpoint",
        said,
    )
    assert "killed" not in runs.said[1]
    assert runs.failed == "failed"
    assert runs.verified == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "training.parallel: none is for one process, and 2 were started; start one, or"),
        ("muon-fsdp", "training.parallel: fsdp keeps each matrix in shards, and optimizer.kind:"),
        ("uneven", "training.batch_size: 6 is not divisible by 2 processes times"),
        ("dropping", "training.layer_dropout: goes with one process, and 2 were started"),
    ],
)
def test_what_processes_cannot_do_is_said_in_one_line(runs: Runs, name: str, message: str) -> None:
    for said in runs.said:
        assert said[name].startswith(f"ConfigError: {message}"), runs.errors


def test_a_setting_for_several_processes_needs_torchrun(pretrain_settings: Settings) -> None:
    with (
        pytest.raises(ConfigError, match=r"training.parallel: ddp is for .*`torchrun --nproc"),
        join_processes("cpu", "ddp"),
    ):
        pass
    settings = pretrain_settings(training__parallel="fsdp", training__layer_dropout={"rate": 0.5})
    with pytest.raises(ConfigError, match="parallel: fsdp goes without layer_dropout"):
        validate(PretrainConfig, settings)
    with pytest.raises(ConfigError, match=r"parallel: ddp is for pretrain and instruct"):
        training_place(TrainingConfig(max_steps=1, batch_size=1, parallel="ddp"))


def test_chains_and_other_verbs_are_for_one_process(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(key, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    prepare = {"source": {"kind": "files", "paths": ["text.jsonl"]}}
    cases = {
        "chain: has stages, which one process works off, and 2": {
            "stages": {"data": {"prepare": prepare}}
        },
        "prepare: runs in one process, and 2 were started": {"prepare": prepare},
    }
    for message, content in cases.items():
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_yaml({"schema": 1, "name": "chain", **content}))
        with pytest.raises(ConfigError, match=message):
            run_recipe(load_recipe(path, ()), tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()
