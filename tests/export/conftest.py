"""Models and a tokenizer for the runtimes of others; a runtime that is not installed is a skip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samara.data.tokenizer import train_tokenizer
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.convert import convert
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM

TEXTS = [
    "Once upon a time there was a little girl named Lily, who loved to play in the park.",
    "In 2024 we've trained 12 models; they're small (260 thousand parameters), it's fine!\n",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n",
    "Grüße aus Zürich, naïve café, 東京 и Москва.",
] * 8

# Unequal heads and widths, head width below hidden_size / heads, a context that is no power of two.
OPENELM = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_query_heads": [2, 4, 6],
    "num_kv_heads": [1, 2, 3],
    "ffn_dim": [32, 96, 160],
    "max_position_embeddings": 200,
    "rope_theta": 5000.0,
    "vocab_size": 320,
}
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "head_dim": 24,  # not hidden_size / heads
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 96,
    "qk_norm": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 200,
    "vocab_size": 320,
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TEXTS, folder, vocab_size=310)
    return folder


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer_folder):
    """Write a random model of a design with a tokenizer; returns its folder and the model."""

    def make(**design):
        torch.manual_seed(3)
        config = SamaraConfig.from_design(
            ModelConfig(**design), bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
        model = SamaraForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)  # norms start at 1, which hides mistakes
        folder = tmp_path_factory.mktemp("model") / "model"
        folder.mkdir()
        save_model(model, folder)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder, model

    return make


@pytest.fixture(scope="session")
def openelm(make_model):
    return make_model(**OPENELM)


@pytest.fixture(scope="session")
def llama(make_model):
    return make_model(**LLAMA)


@pytest.fixture
def converted(tmp_path):
    """Convert a folder and return the new one."""

    def run(folder: Path, to: str, **options) -> Path:
        return convert(folder, tmp_path / to, to=to, **options).folder

    return run
