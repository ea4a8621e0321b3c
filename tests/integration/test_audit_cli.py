"""`samara audit` from a model folder to evidence that the registry's gates read."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from samara.adapt.audits.forgetting import read_texts
from samara.runs import read_json
from samara.sparse.delta_exchange import delta_between

WORDS = "<pad> <s> </s> <unk> the man woman is was kind rude dog sat here .".split()
TEMPLATES = {
    "schema": 1,
    "language": "en",
    "sentences": [
        {"context": "the {term} is", "continuations": ["kind", "rude"]},
        {"context": "here the {term} was", "continuations": ["kind", "rude"]},
    ],
    "attributes": {"gender": {"pairs": [["man", "woman"]]}},
    "paraphrases": [["the dog sat", "the dog sat here"]],
}
LIMITS = {
    "bootstrap_samples": 200,
    "stability": {"batch_sizes": [1, 2], "max_new_tokens": 3},
    "forgetting": {"sequence_length": 8},
}
GATES = {"kpis": [{"task": "t", "metric": "m", "bound": 0.1, "min_samples": 10}]}


@pytest.fixture
def work(tmp_path):
    """A base, a delta, and the files that the command reads, in one folder."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    )
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for name in ("base", "tuned"):
        if name == "tuned":
            with torch.no_grad():
                model.lm_head.weight[4, :2] += 0.001
        model.save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
    delta_between(tmp_path / "base", tmp_path / "tuned").save(tmp_path / "small.sdelta")
    for name, data in (("templates", TEMPLATES), ("limits", LIMITS), ("gates", GATES)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    lines = [json.dumps({"text": "the dog sat here . the man is kind ."})] * 6
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    scores = [{"task": "t", "metric": "m", "value": 0.5, "ci": [0.4, 0.6], "n": 200}]
    (tmp_path / "scores.json").write_text(json.dumps({"evaluations": scores}))
    return tmp_path


OPTIONS = ("--templates", "templates.yaml", "--limits", "limits.yaml", "--device", "cpu")


def test_the_evidence_opens_the_gates_of_a_registry(work, samara):
    options = ("--delta", "small.sdelta", "--text", "text.jsonl", "--details", "all.json")
    done = samara("audit", "base", *OPTIONS, *options)
    assert done.returncode == 0, done.stderr
    found = {row["suite"]: row["verdict"] for row in read_json(work / "audit.json")["audits"]}
    assert {"bias", "bias/gender", "stability", "stability/revert", "forgetting"} <= set(found)
    assert set(found.values()) == {"pass"}
    assert "stability/extremes" in done.stdout
    assert len(read_json(work / "all.json")["bias"]["cases"]) == 4

    assert samara("registry", "add", "line", "base").returncode == 0
    promote = ("registry", "promote", "line:1", "--gates", "gates.yaml", "--evidence")
    refused = samara(*promote, "scores.json")
    assert refused.returncode == 2
    assert "audit bias: not audited" in refused.stderr
    done = samara(*promote, "audit.json")
    assert done.returncode == 0, done.stderr
    assert "stable is version 1" in done.stdout


def test_a_prepared_corpus_gives_its_validation_text(small_corpus):
    texts = read_texts(corpus=small_corpus.folder, files=())
    assert texts == [document.text for document in small_corpus.documents("validation")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "biass"), "--suite biass: no such audit (did you mean 'bias'?)"),
        (("--text", "text.jsonl", "--corpus", "c"), "--text and --corpus: give one of them"),
        (("--suite", "forgetting"), "forgetting: needs text the base knows"),
        (("--text", "none.txt", "--tuned", "tuned"), "--text: 'none.txt': no such file"),
        (("--templates", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_mistakes_are_one_clear_line(work, samara, options, message):
    done = samara("audit", "base", *OPTIONS, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
