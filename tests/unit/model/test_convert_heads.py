"""Masked and classification models travel between Samara folders; other formats refuse them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import samara  # noqa: F401 # registers the models
from samara.errors import CheckpointError, ConfigError
from samara.model.classification import SamaraForSequenceClassification
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.heads import CAUSAL, CLASSIFICATION, HEADS, MASKED, head_of
from samara.model.interchange.average import average
from samara.model.interchange.convert import convert
from samara.model.loading import load_model, save_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM

DESIGN = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "ffn_dim": 24, "vocab_size": 40}
LABELS = {"id2label": {0: "bad", 1: "good", 2: "so so"}}


def save(folder, model_class, *, seed=0, attention="bidirectional", tied=True, **fields):
    torch.manual_seed(seed)
    design = ModelConfig(**DESIGN, tie_word_embeddings=tied)
    config = SamaraConfig.from_design(design, attention=attention)
    for name, value in fields.items():
        setattr(config, name, value)
    model = model_class(config).eval()
    folder.mkdir(parents=True)
    save_model(model, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return model


IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])


@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_model_is_rewritten_bit_for_bit(tmp_path, tied):
    model = save(tmp_path / "a", SamaraForMaskedLM, tied=tied)
    result = convert(tmp_path / "a", tmp_path / "b", to="samara")
    assert result.num_parameters == model.num_parameters()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert load_model(tmp_path / "b", model_class=SamaraForMaskedLM).config.attention
    card = (tmp_path / "b" / "README.md").read_text()
    assert "A masked language model of" in card
    assert 'AutoModelForMaskedLM.from_pretrained("path/to/this/folder")' in card


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_classification_model_keeps_its_labels(tmp_path, attention):
    model = save(
        tmp_path / "a", SamaraForSequenceClassification, attention=attention, num_labels=3, **LABELS
    )
    convert(tmp_path / "a", tmp_path / "b", to="samara", dtype="float32")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert loaded.config.id2label == LABELS["id2label"]
    assert "score.weight" in load_file(tmp_path / "b" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert "A text classification model of" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("to", ["llama", "openelm", "gguf"])
@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (SamaraForMaskedLM, "is a masked language model, {} holds causal ones only; keep it with"),
        (SamaraForSequenceClassification, "is a text classification model, {} holds causal ones"),
    ],
)
def test_other_formats_refuse_them(tmp_path, model_class, message, to):
    save(tmp_path / "a", model_class)
    with pytest.raises(CheckpointError, match=message.format(to)) as error:
        convert(tmp_path / "a", tmp_path / "b", to=to)
    assert str(error.value).endswith("loads after `import samara`")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("model_class", [SamaraForMaskedLM, SamaraForSequenceClassification])
def test_their_checkpoints_have_a_mean(tmp_path, model_class):
    members = [save(tmp_path / f"m{i}", model_class, seed=i) for i in range(2)]
    average([tmp_path / "m0", tmp_path / "m1"], tmp_path / "mean")
    mean = load_model(tmp_path / "mean", model_class=model_class).state_dict()
    first, second = (member.state_dict() for member in members)
    for name, tensor in mean.items():
        expected = (first[name].double() + second[name].double()) / 2
        assert torch.equal(tensor, expected.float()), name


def test_different_heads_or_labels_have_no_mean(tmp_path):
    save(tmp_path / "causal", SamaraForCausalLM, attention="causal")
    save(tmp_path / "masked", SamaraForMaskedLM)
    with pytest.raises(CheckpointError, match=r"another design .*causal.* -> .*masked language"):
        average([tmp_path / "causal", tmp_path / "masked"], tmp_path / "mean")
    save(tmp_path / "two", SamaraForSequenceClassification)
    save(tmp_path / "named", SamaraForSequenceClassification, id2label={0: "no", 1: "yes"})
    with pytest.raises(CheckpointError, match=r'labels.0: "LABEL_0" -> "no"'):
        average([tmp_path / "two", tmp_path / "named"], tmp_path / "mean")


def test_a_folder_says_what_it_is(tmp_path):
    config = SamaraConfig.from_design(ModelConfig(**DESIGN))
    assert head_of(config) is CAUSAL
    config.attention = "bidirectional"
    assert head_of(config) is MASKED
    config.architectures = ["SamaraForSequenceClassification"]
    assert head_of(config) is CLASSIFICATION
    assert list(HEADS) == [
        "SamaraForCausalLM",
        "SamaraForMaskedLM",
        "SamaraForSequenceClassification",
    ]
    config.architectures = ["SamaraForMaskedLm"]
    with pytest.raises(ConfigError, match=r"unknown class 'SamaraForMaskedLm' .*'SamaraForMasked"):
        head_of(config)
    save(tmp_path / "a", SamaraForMaskedLM)
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({**fields, "architectures": ["BertForMaskedLM"]})
    )
    with pytest.raises(CheckpointError, match=r"config.json: architectures: unknown class 'Bert"):
        convert(tmp_path / "a", tmp_path / "b", to="samara")
