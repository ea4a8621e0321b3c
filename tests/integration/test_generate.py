"""Verb `generate` as a user meets it: prompts in, text out, one line for a mistake."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from samara.data.tokenizer import train_tokenizer
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import hash_weights


@pytest.fixture(scope="module")
def written_model(tmp_path_factory):
    """A model folder with its tokenizer, weights as they were drawn."""
    folder = tmp_path_factory.mktemp("written") / "model"
    tokenizer = train_tokenizer(["The seed of the elm has a wing."] * 3, folder, vocab_size=270)
    torch.manual_seed(0)
    design = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        vocab_size=270,
        max_position_embeddings=128,
    )
    save_model(
        SamaraForCausalLM(SamaraConfig.from_design(design, **tokenizer.special_tokens)), folder
    )
    return folder


@pytest.mark.parametrize("where", ["model", "run"])
def test_generate_prints_each_prompt_and_what_follows(samara, written_model, where):
    folder = str(written_model if where == "model" else written_model.parent)
    alone = [samara("generate", folder, prompt).stdout for prompt in ("The elm", "A seed")]
    assert alone[0].startswith("The elm")
    assert len(alone[0]) > len("The elm\n")
    both = samara("generate", folder, "The elm", "A seed")
    assert both.returncode == 0, both.stderr
    assert both.stdout == "\n".join(alone)
    assert samara("generate", folder, "The elm", "--cache", "static").stdout == alone[0]


def test_generate_guesses_ahead_and_writes_the_same(samara, written_model):
    folder = str(written_model)
    plain = samara("generate", folder, "The elm", "A seed").stdout
    for guesses in (["--prompt-lookup", "3"], ["--draft", folder]):
        done = samara("generate", folder, "The elm", "A seed", *guesses)
        assert done.returncode == 0, done.stderr
        assert done.stdout == plain


def test_generate_takes_threads(samara, written_model):
    before = torch.get_num_threads()
    try:
        done = samara("generate", str(written_model), "The elm", "--threads", "1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert done.stdout == samara("generate", str(written_model), "The elm").stdout


def test_generate_in_int8_tells_the_memory_and_leaves_the_folder(samara, written_model):
    pytest.importorskip("torchao")
    before = hash_weights(written_model)
    arguments = ("generate", str(written_model), "The elm", "--device", "cpu", "--cache", "static")
    for precision in ("float32", "bfloat16"):
        done = samara(*arguments, "--quantize", "int8", "--precision", precision)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("The elm")
        assert done.stderr == "weights in memory: 0.1 MB (int8)\n"
    assert hash_weights(written_model) == before


def test_generate_in_int8_without_torchao_is_refused_in_one_line(
    samara, written_model, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torchao", None)
    done = samara("generate", str(written_model), "elm", "--quantize", "int8")
    assert done.returncode == 2
    assert done.stderr.startswith("samara: quantize: int8 needs the package torchao; install")
    assert len(done.stderr.strip().splitlines()) == 1


def test_generate_reads_the_prompt_from_standard_input(samara, written_model, monkeypatch):
    expected = samara("generate", str(written_model), "The\nelm").stdout
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\nelm\n"))
    assert samara("generate", str(written_model), "-").stdout == expected


def test_generate_without_a_prompt_starts_a_text(samara, written_model):
    done = samara("generate", str(written_model), "--temperature", "0")
    assert done.returncode == 0
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["elm " * 80], "prompt 'elm"),
        (["elm", "--max-new-tokens", "128"], "max_new_tokens: 128 leaves no room"),
        (["elm", "--prompt-lookup", "2", "--compile"], "prompt_lookup: wrong guesses are cut off"),
        (["elm", "--draft", "nowhere"], "nowhere: no such folder; give a folder with a saved"),
        (["elm", "--chat"], "chat: the model's tokenizer has no chat template"),
    ],
)
def test_generate_refuses_in_one_line(samara, written_model, arguments, message):
    done = samara("generate", str(written_model), *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"samara: {message}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_generate_into_a_closed_pipe_ends_quietly(written_model):
    command = [sys.executable, "-m", "samara", "generate", str(written_model), "The elm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert errors == ""
    assert process.returncode == 1
