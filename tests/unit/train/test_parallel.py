from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samara.data.rows import Batch
from samara.errors import ResourceError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import named_weights
from samara.train.objective import CausalLM
from samara.train.parallel import autocast, choose_place, compile_model, uncompiled

MakeModel = Callable[..., SamaraForCausalLM]
MakeBatches = Callable[..., list[list[Batch]]]


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_one_process_on_the_cpu(device: str) -> None:
    place = choose_place(device)

    assert (place.device.type, place.rank, place.world_size) == ("cpu", 0, 1)


@pytest.mark.usefixtures("no_cuda")
def test_missing_cuda_is_said() -> None:
    with pytest.raises(ResourceError, match=r"training.device: cuda is asked for.*use auto or cpu"):
        choose_place("cuda")


def test_autocast_only_for_bfloat16() -> None:
    a = torch.ones(2, 2)
    with autocast(a.device, "float32"):
        assert (a @ a).dtype == torch.float32
    with autocast(a.device, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16


def test_compiled_model_keeps_names_and_loss(
    make_model: MakeModel, make_batches: MakeBatches
) -> None:
    # The graph is captured, but no code is generated: that takes a minute.
    plain, compiled = make_model(), make_model()
    batch = make_batches(1)[0][0]
    compile_model(compiled, backend="eager")

    expected, found = CausalLM()(plain, batch), CausalLM()(compiled, batch)
    found.loss.backward()

    torch.testing.assert_close(found.loss, expected.loss)
    assert named_weights(compiled).keys() == named_weights(plain).keys()
    assert all(p.grad is not None for p in compiled.parameters())


def test_evaluation_compiles_nothing(make_model: MakeModel, make_batches: MakeBatches) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = make_model()
    compile_model(model, backend=backend)
    batch = make_batches(1)[0][0]

    with uncompiled(model), torch.no_grad():
        CausalLM()(model, batch)
    assert graphs == []

    CausalLM()(model, batch)
    assert graphs != []


def test_layers_of_any_widths_share_two_graphs(make_batches: MakeBatches) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    design = ModelConfig(
        hidden_size=32,
        num_hidden_layers=6,
        head_dim=8,
        num_query_heads=(2, 2, 3, 3, 4, 5),
        num_kv_heads=(2, 2, 3, 3, 4, 5),
        ffn_dim=(24, 40, 48, 56, 72, 80),
        vocab_size=64,
        cola={"rank": 6},
    )
    torch.manual_seed(0)
    model = SamaraForCausalLM(SamaraConfig.from_design(design))
    batch = make_batches(1)[0][0]
    expected = CausalLM()(model, batch).loss
    compile_model(model, backend=backend)

    torch.testing.assert_close(CausalLM()(model, batch).loss, expected)
    assert len(graphs) <= 3


def test_compiling_needs_a_compiler(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)

    with pytest.raises(ResourceError, match=r"training.compile: needs a C\+\+ compiler"):
        compile_model(make_model())
