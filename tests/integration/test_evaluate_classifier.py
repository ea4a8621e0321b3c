"""Text classification models on local tasks: accuracy and macro-F1, by label names or numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from samara.data.tokenizer import train_tokenizer
from samara.errors import ConfigError, DataError
from samara.measure.paired import paired_report
from samara.measure.task_evaluation import evaluate_tasks
from samara.measure.task_results import ITEMS_FILE, task_table
from samara.model.classification import SamaraForSequenceClassification
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM

FRUIT, TOOLS = "apple pear plum grape fig".split(), "hammer saw drill wrench file".split()


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        words = FRUIT if number % 2 else TOOLS
        text = " ".join(draw.choices(words, k=draw.randint(1, 12)))
        made.append({"text": text, "label": "fruit" if number % 2 else "tool"})
    return made


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(attention: str = "causal", **fields: Any) -> SamaraConfig:
    design = ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "head_dim": 16,
            "ffn_dim": 32,
            "vocab_size": 290,
            "max_position_embeddings": 24,
        }
    )
    made = SamaraConfig.from_design(design, attention=attention)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def save(folder: Path, model: Any) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(FRUIT + TOOLS, k=9)) for _ in range(60)]
    train_tokenizer(texts, folder / "model", vocab_size=290)
    save_model(model, folder / "model")
    return folder


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a little on rows like the test's."""
    torch.manual_seed(0)
    names = {"id2label": {0: "tool", 1: "fruit"}, "label2id": {"tool": 0, "fruit": 1}}
    model = SamaraForSequenceClassification(config(request.param, **names))
    folder = save(tmp_path_factory.mktemp("classifier") / "run", model)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = rows(64, seed=1)
    batch = tokenizer([row["text"] for row in data], padding=True, return_tensors="pt")
    labels = torch.tensor([names["label2id"][row["label"]] for row in data])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, folder / "model")
    return folder


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ITEMS_FILE).read_text().splitlines()]


def test_it_is_scored_on_what_it_chooses(classifier: Path, tmp_path: Path) -> None:
    data = rows(21, seed=2)
    data[3]["label"] = "tool" if data[3]["label"] == "fruit" else "fruit"
    path = write(tmp_path / "test.jsonl", data)
    result = evaluate_tasks(classifier, out=tmp_path / "out", tasks=[str(path)], batch_size=4)
    (task,) = result["tasks"].values()
    assert task["kind"] == "classification"
    assert task["scores"]["accuracy"]["value"] == pytest.approx(20 / 21)
    confused = [(item["gold"][0], item["prediction"]) for item in items(tmp_path / "out")]
    f1 = []
    for label in ("fruit", "tool"):
        right = confused.count((label, label))
        wrong = sum((gold == label) != (said == label) for gold, said in confused)
        f1.append(2 * right / (2 * right + wrong))
    assert task["scores"]["macro_f1"]["value"] == pytest.approx(sum(f1) / 2)
    bounds = task["scores"]["macro_f1"]
    assert bounds["low"] <= bounds["value"] <= bounds["high"]
    assert "macro_f1" in task_table(result)
    # Each text on its own, unpadded, gives the same.
    model = load_model(classifier / "model", model_class=SamaraForSequenceClassification).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier / "model")
    for row, item in zip(data, items(tmp_path / "out"), strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(row["text"])["input_ids"][:24]])
            expected = model(input_ids=ids).logits[0].tolist()
        assert item["details"]["logits"] == pytest.approx(expected, abs=1e-5)


def test_the_batch_size_changes_nothing_and_long_texts_are_counted(
    classifier: Path, tmp_path: Path
) -> None:
    data = [*rows(6, seed=3), {"text": "apple " * 40, "label": "fruit"}]
    path = write(tmp_path / "test.jsonl", data)
    for size in (1, 16):
        out = tmp_path / str(size)
        result = evaluate_tasks(classifier, out=out, tasks=[str(path)], batch_size=size)
        (task,) = result["tasks"].values()
        assert task["num_truncated"] == 1
    one, many = items(tmp_path / "1"), items(tmp_path / "16")
    for left, right in zip(one, many, strict=True):
        assert left["details"]["logits"] == pytest.approx(right["details"]["logits"], abs=1e-5)


def test_labels_may_be_numbers_and_the_text_a_template(classifier: Path, tmp_path: Path) -> None:
    numbered = [
        {"a": row["text"], "class": int(row["label"] == "fruit")} for row in rows(12, seed=4)
    ]
    write(tmp_path / "rows.jsonl", numbered)
    (tmp_path / "task.yaml").write_text(
        "name: numbers\nkind: classification\ndata: rows.jsonl\nlabel: class\n"
        "prompt: '{a}'\ntext: '{a}'\nnum_fewshot: 2\n"
    )
    result = evaluate_tasks(classifier, out=tmp_path / "out", tasks=[str(tmp_path / "task.yaml")])
    task = result["tasks"]["numbers"]
    assert task["scores"]["accuracy"]["value"] == 1.0
    assert task["num_fewshot"] == 0


def test_it_is_compared_with_a_language_model_row_by_row(classifier: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = save(tmp_path / "lm", SamaraForCausalLM(config()))
    path = write(tmp_path / "test.jsonl", rows(20, seed=5))
    for name, model in (("a", other), ("b", classifier)):
        evaluate_tasks(model, out=tmp_path / name, tasks=[str(path)])
    report = paired_report(tmp_path / "a", tmp_path / "b")
    (task,) = report["tasks"].values()
    assert json.dumps(task).count("better")


def test_what_it_cannot_answer_is_refused(classifier: Path, tmp_path: Path) -> None:
    def refused(message: str, error: type[Exception] = ConfigError, **options: Any) -> None:
        with pytest.raises(error, match=message) as caught:
            evaluate_tasks(classifier, out=tmp_path / "out", **options)
        assert "\n" not in str(caught.value)

    good = str(write(tmp_path / "good.jsonl", rows(4, seed=6)))
    refused("num_fewshot: .* reads no solved examples; leave it out", tasks=[good], num_fewshot=1)
    text = write(tmp_path / "text.jsonl", [{"text": "apple"}])
    refused("task 'text': is no classification, and .* is a text class", tasks=[str(text)])
    strange = [{"text": "x", "label": "fruit"}, {"text": "y", "label": "vegetable"}]
    refused(
        r"label 'vegetable' is none of .* \(tool, fruit\); name them in id2label",
        tasks=[str(write(tmp_path / "strange.jsonl", strange))],
    )
    empty = [{"text": "apple", "label": "fruit"}, {"text": " ", "label": "tool"}]
    refused(
        r"empty.jsonl:2: the text is empty: nothing to classify",
        DataError,
        tasks=[str(write(tmp_path / "empty.jsonl", empty))],
    )


def test_a_regression_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "r", SamaraForSequenceClassification(config(num_labels=1)))
    path = write(tmp_path / "test.jsonl", rows(4, seed=7))
    with pytest.raises(ConfigError, match=r"gives 1 score\(s\) .* chooses one of two labels"):
        evaluate_tasks(folder, out=tmp_path / "out", tasks=[str(path)])
