"""Small weights of every type, a tuned copy, and a checkpoint folder of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from samara.runs import write_json

Weights = dict[str, torch.Tensor]


class Net(torch.nn.Module):
    """A module whose state dict is a given set of tensors, at given addresses."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


@pytest.fixture
def base() -> Weights:
    draw = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(24, 40, generator=draw).mul(0.02).to(torch.bfloat16),
        "b": torch.randn(16, 8, generator=draw).to(torch.float32),
        "c": torch.randn(30, generator=draw).to(torch.float16),
        "d": torch.randn(4, 3, 5, generator=draw).to(torch.bfloat16),
    }


@pytest.fixture
def tuned(base: Weights) -> Weights:
    draw = torch.Generator().manual_seed(1)
    changed = copies(base)
    for name in ("a", "b", "c"):
        flat = changed[name].view(-1)
        places = torch.randperm(len(flat), generator=draw)[: len(flat) // 10]
        flat[places] += (torch.randn(len(places), generator=draw) * 0.01).to(flat.dtype)
    changed["a"][0, 0] = float("nan")
    changed["c"][0] = -0.0
    return changed


def copies(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.fixture(name="copies")
def copies_fixture() -> Callable[[Weights], Weights]:
    return copies


@pytest.fixture
def net() -> Callable[[Weights], Net]:
    return lambda weights: Net(copies(weights))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMARA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def save_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write weights as a checkpoint folder, in two shards if asked."""

    def save(weights: Weights, name: str = "model", *, sharded: bool = False) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": "any"})
        if not sharded:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        where = {}
        for number, names in enumerate((["a"], [n for n in weights if n != "a"]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({n: weights[n] for n in names}, folder / file)
            where |= dict.fromkeys(names, file)
        write_json(folder / "model.safetensors.index.json", {"weight_map": where})
        return folder

    return save


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def same() -> Callable[..., bool]:
    """Whether two sets of weights, or a module and one, are equal bit for bit."""

    def compare(first: Weights | torch.nn.Module, second: Weights) -> bool:
        if isinstance(first, torch.nn.Module):
            first = dict(first.state_dict())
        return {n: bits(t) for n, t in first.items()} == {n: bits(t) for n, t in second.items()}

    return compare
