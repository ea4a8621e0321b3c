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


def test_samara_first_and_nothing_before_its_time(folder: Path) -> None:
    code = """
import sys, samara
print([name for name in ("torch", "transformers", "pydantic") if name in sys.modules])
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
print(type(config).__name__, "samara.model.modeling" in sys.modules)
from transformers.modeling_utils import PreTrainedModel  # loads Auto's tables half way through
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    assert run(code, str(folder)).splitlines() == ["[]", "SamaraConfig False", "SamaraForCausalLM"]


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM; import samara",
        "from samara.model.modeling import SamaraForCausalLM",
    ],
)
def test_other_import_orders(first: str, folder: Path) -> None:
    code = f"""
import sys
{first}
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    assert run(code, str(folder)) == "SamaraForCausalLM"


def test_public_names() -> None:
    for name in samara.__all__:
        assert getattr(samara, name).__name__ == name
        assert name in dir(samara)
    with pytest.raises(AttributeError, match="module 'samara' has no attribute 'Nothing'"):
        _ = samara.Nothing
