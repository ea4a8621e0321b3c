"""A base in several files, float32 and bfloat16: adapted, patched, put back, exported whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import samara
from samara.adapt.load import load_finetuned
from samara.runs import hash_file
from samara.sparse.delta_checkpoint import apply_to_checkpoint, revert_checkpoint
from samara.sparse.delta_exchange import export_checkpoint

from .test_finetune import SPARSE, build, rows, run_one, settings, weights

__all__ = ["rows"]  # the fixture


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.glob("model*"))}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers reads, copied: its tensors may be the file itself, patched or not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["llama", "llama_bf16"])
def test_a_sharded_base_is_adapted_patched_and_exported(rows, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("SAMARA_CACHE", str(tmp_path / "cache"))
    whole = build(kind, tmp_path / "whole")
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    shutil.copytree(whole, base, ignore=shutil.ignore_patterns("model*"))
    model.save_pretrained(base, max_shard_size="6KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1

    run = tmp_path / "run"
    run_one(settings(base, rows, "question", SPARSE, training={"max_steps": 2}), run)
    expected = weights(load_finetuned(run))
    delta = samara.Delta.load(run / "delta.safetensors")

    before = hashes(base)
    apply_to_checkpoint(delta, base)
    assert hashes(base) != before
    patched = loaded(base)
    revert_checkpoint(base)
    assert hashes(base) == before

    export_checkpoint([delta], base, tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    for name, tensor in expected.items():
        assert torch.equal(patched[name], tensor), name
        assert torch.equal(merged[name], tensor), name

    bare = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with delta.applied_to(model):
        assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    assert all(torch.equal(model.state_dict()[name], bare[name]) for name in bare)
