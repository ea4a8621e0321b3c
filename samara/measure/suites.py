"""The evaluation suites of OpenELM (arXiv 2404.14619, section 4 and its tables), as data.

Tasks, numbers of solved examples, and the score that counts; the harness revision of the paper is
lm-evaluation-harness dc90fec with a start mark before each prompt. Where each task's rows are
looked for: :mod:`samara.measure.standard_tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of a suite: its standard name, solved examples, and the score that counts."""

    task: str
    num_fewshot: int
    metric: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named list of tasks.

    Attributes:
        tasks: In the order of the paper's table.
        averages: Name -> tasks whose scores are averaged, each task weighing the same.
    """

    tasks: tuple[SuiteTask, ...]
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _task(task: str, num_fewshot: int, metric: str) -> SuiteTask:
    return SuiteTask(task=task, num_fewshot=num_fewshot, metric=metric)


ZERO_SHOT = (
    _task("arc_challenge", 0, "acc_norm"),
    _task("arc_easy", 0, "acc"),
    _task("boolq", 0, "acc"),
    _task("hellaswag", 0, "acc_norm"),
    _task("piqa", 0, "acc_norm"),
    _task("sciq", 0, "acc"),
    _task("winogrande", 0, "acc"),
)
OPENLLM = (
    _task("arc_challenge", 25, "acc_norm"),
    _task("hellaswag", 10, "acc_norm"),
    _task("mmlu", 5, "acc"),
    _task("truthfulqa_mc2", 0, "mc2"),
    _task("winogrande", 5, "acc"),
)
LLM360 = (
    _task("arc_challenge", 25, "acc_norm"),
    # The share of stereotypes preferred: a bias. The paper averages it as if it were an accuracy.
    _task("crows_pairs_english", 25, "pct_stereotype"),
    _task("hellaswag", 10, "acc_norm"),
    _task("mmlu", 5, "acc"),
    _task("piqa", 0, "acc_norm"),
    _task("race", 0, "acc"),
    _task("truthfulqa_mc2", 0, "mc2"),
    _task("winogrande", 5, "acc"),
)


def _names(tasks: tuple[SuiteTask, ...], *, without: str = "") -> tuple[str, ...]:
    return tuple(item.task for item in tasks if item.task != without)


SUITES: dict[str, Suite] = {
    "openelm-zero-shot": Suite(
        tasks=ZERO_SHOT,
        averages={
            "average": _names(ZERO_SHOT),
            "average without sciq": _names(ZERO_SHOT, without="sciq"),
        },
    ),
    "openllm": Suite(tasks=OPENLLM, averages={"average": _names(OPENLLM)}),
    "llm360": Suite(
        tasks=LLM360,
        averages={
            "average": _names(LLM360),
            "average without crows_pairs_english": _names(LLM360, without="crows_pairs_english"),
        },
    ),
}
