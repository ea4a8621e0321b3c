from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from samara.errors import CheckpointError, ResourceError
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import (
    Checkpoints,
    TrainingState,
    Window,
    load_weights,
    named_weights,
    verify,
)
from samara.train.config import AdamW, Muon
from samara.train.optim import Optimizer

MakeModel = Callable[..., SamaraForCausalLM]


def trained(model: SamaraForCausalLM, config: AdamW | Muon | None = None) -> Optimizer:
    """An optimizer with state: one step on random gradients."""
    optimizer = Optimizer(model, config or AdamW(lr=0.01))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return optimizer


def make(folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints(folder, **{"keep_last": 2, "identity": {"corpus": "abc"}, **options})


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", [AdamW(lr=0.01), Muon(lr=0.01)])
@pytest.mark.parametrize("rank", [None, 4])
def test_round_trip_restores_everything(
    make_model: MakeModel, tmp_path: Path, config: AdamW | Muon, rank: int | None
) -> None:
    model = make_model(rank=rank)
    optimizer = trained(model, config)
    state = TrainingState(
        step=7, tokens=70, flops=1 / 3, seconds=0.1, window=Window(nll_sum=2 / 3, num_targets=5)
    )
    checkpoints = make(tmp_path / "checkpoints")
    checkpoints.save(model, optimizer, state)
    random_after = torch.rand(3)
    kept, kept_state = copies(named_weights(model)), copies(optimizer.state_dict())

    other = make_model(rank=rank)
    other_optimizer = Optimizer(other, config)
    found = checkpoints.latest()
    assert found is not None
    checkpoints.load(found, other, other_optimizer)

    assert found.path == tmp_path / "checkpoints" / "step-00000007"
    assert found.state == state
    assert same(named_weights(other), kept)
    assert same(other_optimizer.state_dict(), kept_state)
    assert torch.equal(torch.rand(3), random_after)


def test_holds_no_pickle_and_tied_weights_once(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    path = make(tmp_path).save(model, trained(model), TrainingState(step=1))

    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    assert "lm_head.weight" not in named_weights(model)
    assert "lm_head.weight" in named_weights(make_model(tie_word_embeddings=False))


def test_keeps_the_last_ones(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    optimizer = trained(model)
    checkpoints = make(tmp_path, keep_last=2)
    for step in (5, 10, 15, 20):
        checkpoints.save(model, optimizer, TrainingState(step=step))

    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]
    assert checkpoints.newest() == tmp_path / "step-00000020"


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    checkpoints = make(tmp_path / "none")

    assert checkpoints.latest() is None
    assert checkpoints.newest() is None


def test_half_written_folders_are_swept(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    checkpoints = make(tmp_path)
    checkpoints.save(model, trained(model), TrainingState(step=1))
    (tmp_path / ".step-00000002.xyz.tmp").mkdir()
    (tmp_path / ".step-00000002.xyz.tmp" / "model.safetensors").write_bytes(b"half")

    found = checkpoints.latest()

    assert found is not None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def alter(path: Path) -> None:
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def remove(path: Path) -> None:
    (path / "rng.safetensors").unlink()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def cut_json(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text()[:-20])


def change_step(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 9'))


def newer_schema(path: Path) -> None:
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 2}))


DAMAGES = [
    (truncate, r"model.safetensors: is cut off, \d+ of \d+ bytes"),
    (alter, r"optimizer.safetensors: was altered"),
    (remove, r"rng.safetensors: is missing"),
    (empty, r"state.json: no such file"),
    (cut_json, r"state.json: not valid JSON"),
    (change_step, r"state.json: was altered"),
    (newer_schema, r"state.json: schema 2 is not 1"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_named(
    make_model: MakeModel, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model = make_model()
    path = make(tmp_path).save(model, trained(model), TrainingState(step=2))
    verify(path)
    damage(path)

    with pytest.raises(CheckpointError, match=message):
        verify(path)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_newest_is_set_aside_and_said(
    make_model: MakeModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    model = make_model()
    optimizer = trained(model)
    checkpoints = make(tmp_path)
    for step in (1, 2):
        path = checkpoints.save(model, optimizer, TrainingState(step=step))
    damage(path)

    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()

    assert found is not None
    assert found.state.step == 1
    assert "step-00000002" in caplog.text
    assert "the checkpoint before is taken" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000001",
        "step-00000002.damaged",
    ]


def test_all_damaged_never_starts_over(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    optimizer = trained(model)
    checkpoints = make(tmp_path)
    for step in (1, 2):
        truncate(checkpoints.save(model, optimizer, TrainingState(step=step)))

    with pytest.raises(CheckpointError, match=r"step-00000002.*no whole checkpoint is left"):
        checkpoints.latest()

    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_checkpoint_of_another_run_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    make(tmp_path).save(model, trained(model), TrainingState(step=1))

    with pytest.raises(CheckpointError, match=r'run of something else \(corpus: "abc" -> "xyz"\)'):
        make(tmp_path, identity={"corpus": "xyz"}).latest()


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"hidden_size": 24}, r"embed_tokens.weight is 61 x 16 there, 61 x 24 in this model"),
        ({"ffn_dim": (24, 32)}, r"layers.1.mlp.gate_proj.weight is 24 x 16 there, 32 x 16 in"),
        ({"num_hidden_layers": 1}, r"layers.1.*there, absent in this model"),
        ({"rank": 4}, r"q_proj.cola_a is absent there, 16 x 4 in this model"),
    ],
)
def test_checkpoint_of_another_architecture_is_refused(
    make_model: MakeModel, tmp_path: Path, design: dict[str, Any], message: str
) -> None:
    model = make_model()
    checkpoints = make(tmp_path)
    checkpoints.save(model, trained(model), TrainingState(step=1))
    other = make_model(**design)
    before = copies(named_weights(other))
    found = checkpoints.latest()
    assert found is not None

    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.load(found, other, Optimizer(other, AdamW(lr=0.01)))

    assert "is of another architecture" in str(caught.value)
    assert same(named_weights(other), before)


def test_weights_load_across_dtypes(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    path = make(tmp_path).save(model, trained(model), TrainingState(step=1))
    other = make_model(dtype=torch.float64)

    load_weights(path / "model.safetensors", other)

    assert same({n: t.float() for n, t in named_weights(other).items()}, named_weights(model))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_checkpoints_before(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    model = make_model()
    optimizer = trained(model)
    checkpoints = make(tmp_path, keep_last=1)
    checkpoints.save(model, optimizer, TrainingState(step=1))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ResourceError, match="the disk is full"):
            checkpoints.save(model, optimizer, TrainingState(step=2))

    found = checkpoints.latest()
    assert found is not None
    assert found.state.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [mount or "", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(make_model: MakeModel, small_disk: Path) -> None:
    model = make_model()
    optimizer = trained(model)
    checkpoints = make(small_disk, keep_last=5)

    checkpoints.save(model, optimizer, TrainingState(step=1))
    checkpoints.save(model, optimizer, TrainingState(step=2))
    with pytest.raises(ResourceError, match="the disk is full"):
        checkpoints.save(model, optimizer, TrainingState(step=3))

    found = checkpoints.latest()
    assert found is not None
    assert found.state.step == 2
