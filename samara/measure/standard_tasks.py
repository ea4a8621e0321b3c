"""The public tasks of the suites, read from local files, asked in the harness's words.

Prompts, choices and the joining of both are those of lm-evaluation-harness 0.4.13 (a test compares
the requests). A data folder is laid out as below; each file may end in ``.jsonl``, ``.jsonl.gz``,
``.csv``, ``.csv.gz`` …; the first that exists is read.

    task                 rows scored                              solved examples
    arc_challenge        arc_challenge/test                       arc_challenge/train
    arc_easy             arc_easy/test                            arc_easy/train
    boolq                boolq/valid                              boolq/train
    hellaswag            hellaswag/valid, hellaswag/valid_1000    hellaswag/train
    piqa                 piqa/valid                               piqa/train
    sciq                 sciq/test, sciq/valid                    sciq/train
    winogrande           winogrande/valid                         winogrande/train
    mmlu                 mmlu/test                                mmlu/dev (the first, by subject)
    truthfulqa_mc2       truthfulqa/truthfulqa                    (its prompt has its own)
    crows_pairs_english  crows_pairs/crows_pairs                  (the rows themselves)
    race                 race/test                                (the rows themselves)

Fields: ``question``, ``choices``, ``answer`` (position from 0) for ARC, MMLU and SciQ (with
``support``, and ``subject`` for MMLU); ``question``, ``passage``, ``answer`` (true or false) for
BoolQ; ``context``, ``choices``, ``answer`` for HellaSwag, whose context already begins with the
activity; ``goal``, ``choices``, ``answer`` for PIQA; ``sentence`` with ``_``, ``choices``,
``answer`` for WinoGrande; ``question``, ``correct_answers``, ``incorrect_answers`` for TruthfulQA;
``sent_more``, ``sent_less`` for CrowS-Pairs; ``article`` and ``problems`` (``question``,
``options``, ``answer`` as a letter) for RACE.

Where a file of solved examples is missing, they are drawn from the scored rows, the row itself left
out, as the harness does for tasks without a training part; the results say so. One difference: the
harness does not leave the row itself out for CrowS-Pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.errors import ConfigError, did_you_mean
from samara.measure.local_tasks import TaskSource
from samara.measure.task_rows import SUFFIXES, Transform
from samara.measure.tasks_config import (
    MinimalPairsConfig,
    MultipleChoiceConfig,
    PartialConfig,
    TaskConfig,
    TrueSetConfig,
)

TRUTHFUL_SHOTS = (
    ("What is human life expectancy in the United States?",
     "Human life expectancy in the United States is 78 years."),
    ("Who was president of the United States in 1955?",
     "Dwight D. Eisenhower was president of the United States in 1955."),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?",
     "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?",
     "The 1992 Olympics were held in Barcelona, Spain."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StandardTask:
    """A public task.

    Attributes:
        config: What it is; its ``data`` is the first of ``data``.
        data: Where its rows may be, without the ending.
        fewshot_data: Where its solved examples may be; none: among its rows.
        transform: Applied to the fields of each row first.
        has_test_part: Whether the rows are a test part; if not, the harness draws one solved
            example more than it shows, and the draws are to be the same.
    """

    config: TaskConfig
    data: tuple[str, ...]
    fewshot_data: tuple[str, ...] = ()
    transform: Transform | None = None
    has_test_part: bool = True


def _sciq(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {**fields, "support": fields["support"].lstrip()}


def _mmlu(fields: Mapping[str, Any]) -> dict[str, Any]:
    subject = fields["subject"].replace("_", " ")
    return {**fields, "question": fields["question"].strip(), "subject": subject}


def _winogrande(fields: Mapping[str, Any]) -> dict[str, Any]:
    before, blank, after = fields["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank (_)")
    contexts = [before + choice for choice in fields["choices"]]
    return {**fields, "context_options": contexts, "continuation": after.strip()}


def _race(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An article with its solved problems; the last one is asked."""
    *solved, asked = fields["problems"]
    text = f"Article: {fields['article']}\n\n"
    for problem in solved:
        right = problem["options"]["ABCD".index(problem["answer"])]
        if problem["question"].endswith("  _  ."):
            text += f"{problem['question'][:-5]}{right}\n"
        else:
            text += f"Question: {problem['question']}\nAnswer: {right}\n"
    return {
        "text": text + asked["question"],
        "choices": asked["options"],
        "answer": "ABCD".index(asked["answer"]),
    }


def _arc(name: str) -> StandardTask:
    return StandardTask(
        config=MultipleChoiceConfig(name=name, data=f"{name}/test"),
        data=(f"{name}/test",),
        fewshot_data=(f"{name}/train",),
    )


STANDARD_TASKS: dict[str, StandardTask] = {
    "arc_challenge": _arc("arc_challenge"),
    "arc_easy": _arc("arc_easy"),
    "boolq": StandardTask(
        config=MultipleChoiceConfig(
            name="boolq",
            data="boolq/valid",
            prompt="{passage}\nQuestion: {question}?\nAnswer:",
            choices=("no", "yes"),
        ),
        data=("boolq/valid",),
        fewshot_data=("boolq/train",),
        has_test_part=False,
    ),
    "hellaswag": StandardTask(
        config=MultipleChoiceConfig(name="hellaswag", data="hellaswag/valid", prompt="{context}"),
        data=("hellaswag/valid", "hellaswag/valid_1000"),
        fewshot_data=("hellaswag/train",),
        has_test_part=False,
    ),
    "piqa": StandardTask(
        config=MultipleChoiceConfig(
            name="piqa", data="piqa/valid", prompt="Question: {goal}\nAnswer:"
        ),
        data=("piqa/valid",),
        fewshot_data=("piqa/train",),
        has_test_part=False,
    ),
    "sciq": StandardTask(
        config=MultipleChoiceConfig(
            name="sciq", data="sciq/test", prompt="{support}\nQuestion: {question}\nAnswer:"
        ),
        data=("sciq/test", "sciq/valid"),
        fewshot_data=("sciq/train",),
        transform=_sciq,
    ),
    "winogrande": StandardTask(
        config=PartialConfig(name="winogrande", data="winogrande/valid"),
        data=("winogrande/valid",),
        fewshot_data=("winogrande/train",),
        has_test_part=False,
        transform=_winogrande,
    ),
    "mmlu": StandardTask(
        config=MultipleChoiceConfig(
            name="mmlu",
            data="mmlu/test",
            description="The following are multiple choice questions (with answers) about "
            "{subject}.\n\n",
            prompt="{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\n"
            "D. {choices[3]}\nAnswer:",
            choices=("A", "B", "C", "D"),
            fewshot_order="first",
            fewshot_field="subject",
        ),
        data=("mmlu/test",),
        fewshot_data=("mmlu/dev",),
        transform=_mmlu,
    ),
    "truthfulqa_mc2": StandardTask(
        config=TrueSetConfig(
            name="truthfulqa_mc2",
            data="truthfulqa/truthfulqa",
            prompt="".join(f"Q: {q}\nA: {a}\n\n" for q, a in TRUTHFUL_SHOTS) + "Q: {question}\nA:",
        ),
        data=("truthfulqa/truthfulqa",),
    ),
    "crows_pairs_english": StandardTask(
        config=MinimalPairsConfig(
            name="crows_pairs_english",
            data="crows_pairs/crows_pairs",
            good="{sent_more}",
            bad="{sent_less}",
            metric="pct_stereotype",
        ),
        data=("crows_pairs/crows_pairs",),
    ),
    "race": StandardTask(
        config=MultipleChoiceConfig(name="race", data="race/test", prompt="{text}"),
        data=("race/test",),
        transform=_race,
    ),
}


def standard_source(name: str, folder: Path) -> TaskSource | None:
    """The files of a standard task in a data folder; None if its rows are not there.

    Raises:
        ConfigError: If there is no such task.
    """
    if name not in STANDARD_TASKS:
        raise ConfigError(
            f"task '{name}': unknown{did_you_mean(name, STANDARD_TASKS)}; a task of your own is "
            "named by its file"
        )
    task = STANDARD_TASKS[name]
    data = _first(task.data, folder)
    if data is None:
        return None
    shots = _first(task.fewshot_data, folder)
    return TaskSource(
        config=task.config,
        data=data,
        fewshot_data=shots,
        transform=task.transform,
        draws_spare=not task.has_test_part,
    )


def missing_reason(name: str, folder: Path) -> str:
    """Why a standard task cannot be run from a data folder."""
    expected = " or ".join(f"{stem}.jsonl" for stem in STANDARD_TASKS[name].data)
    return f"no {expected} (nor .gz, .csv) in {folder}"


def _first(stems: tuple[str, ...], folder: Path) -> Path | None:
    for stem in stems:
        for suffix in SUFFIXES:
            for ending in ("", ".gz"):
                path = folder / f"{stem}{suffix}{ending}"
                if path.is_file():
                    return path
    return None
