"""`import samara` is light, and Auto classes know it whatever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samara
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM


def run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = SamaraConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, ffn_dims=[8])
    path = tmp_path_factory.mktemp("model")
    save_model(SamaraForCausalLM(config), path)
    return path


def test_import_loads_neither_torch_nor_transformers() -> None:
    code = "import samara, sys; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert run(code) == "[]"


LOAD = "print(type(A.from_pretrained(sys.argv[1])).__name__, 'torch' in sys.modules)"
ORDERS = {
    "samara-first": "import sys, samara; from transformers import AutoModelForCausalLM as A; ",
    "transformers-first": "import sys; from transformers import AutoModelForCausalLM as A; import samara; ",
    "class-first": (
        "import sys; from samara.model.modeling import SamaraForCausalLM; "
        "from transformers import AutoModelForCausalLM as A; "
    ),
    "base-class-between": (
        "import sys, samara; from transformers.modeling_utils import PreTrainedModel; "
        "from transformers import AutoModelForCausalLM as A; "
    ),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_auto_model_in_any_import_order(order: str, folder: Path) -> None:
    assert run(order + LOAD, str(folder)) == "SamaraForCausalLM True"


def test_auto_config_alone_builds_no_model(folder: Path) -> None:
    code = (
        "import sys, samara; from transformers import AutoConfig as A; "
        "print(type(A.from_pretrained(sys.argv[1])).__name__, 'samara.model.modeling' in sys.modules)"
    )
    assert run(code, str(folder)) == "SamaraConfig False"


def test_public_names() -> None:
    for name in samara.__all__:
        assert getattr(samara, name).__name__ == name
        assert name in dir(samara)
    with pytest.raises(AttributeError, match="module 'samara' has no attribute 'Nothing'"):
        _ = samara.Nothing
