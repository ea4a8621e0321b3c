"""Text from a model: the same again for the same seed, prompt by prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from samara.data.tokenizer import train_tokenizer
from samara.errors import ConfigError
from samara.measure.config import SamplingConfig
from samara.measure.language_model import LanguageModel
from samara.measure.sampling import sample_texts
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM

VOCAB = 270
PROMPTS = ("The elm", "A seed", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tokenizer = train_tokenizer(["The seed of the elm has a wing."] * 3, folder, vocab_size=VOCAB)
    torch.manual_seed(0)
    design = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    save_model(
        SamaraForCausalLM(SamaraConfig.from_design(design, **tokenizer.special_tokens)), folder
    )
    return folder


@pytest.fixture(scope="module")
def language_model(folder):
    from samara.measure.language_model_folder import open_language_model

    return open_language_model(folder, device="cpu").language_model


def texts(language_model: LanguageModel, *, seed: int = 0, **settings) -> list[str]:
    config = SamplingConfig(**{"prompts": PROMPTS, "max_new_tokens": 12, **settings})
    return [sample.text for sample in sample_texts(language_model, config, seed=seed)]


def test_equal_seeds_write_equal_texts(language_model):
    assert texts(language_model, seed=3) == texts(language_model, seed=3)
    assert texts(language_model, seed=3) != texts(language_model, seed=4)


def test_a_prompt_does_not_depend_on_its_neighbours(language_model):
    both = texts(language_model, prompts=("The elm", "A seed"))
    assert texts(language_model, prompts=("A seed",)) == both[1:]


def test_temperature_0_is_greedy(language_model):
    assert texts(language_model, seed=1, temperature=0) == texts(
        language_model, seed=2, temperature=0
    )


def test_a_tiny_top_p_is_greedy_too(language_model):
    assert texts(language_model, top_p=1e-6) == texts(language_model, temperature=0)


def test_the_random_state_is_left_as_it_was(language_model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts(language_model)
    assert torch.equal(torch.rand(3), expected)


def test_greedy_text_is_the_argmax_of_the_uncached_model(language_model):
    (written,) = texts(language_model, prompts=("The elm",), temperature=0, max_new_tokens=6)
    tokenizer = language_model.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    ids = tokenizer("The elm", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        with torch.no_grad():
            logits = language_model.model(input_ids=ids, use_cache=False).logits
        following = logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following[None, None]], dim=1)
    assert written == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_too_many_tokens_for_the_context_are_refused(language_model):
    with pytest.raises(ConfigError, match="max_new_tokens: 64 leaves no room"):
        texts(language_model, max_new_tokens=64)
