"""The lm-evaluation-harness and our models: its tasks, our way of asking.

:func:`harness_model` makes a model the harness knows as its own kind, to be given to
``lm_eval.simple_evaluate`` in memory; :func:`evaluate_with_harness` runs task files of the harness
(YAML) from a folder. Only that folder is looked at, never the harness's own collection, whose tasks
are fetched from the hub (and whose index alone costs 10 seconds).

Log-likelihoods equal those of the harness's own Hugging Face backend. Two things differ, on
purpose: a rolling log-likelihood does not also score a start mark that the tokenizer gives, and
generation always ends at the model's end mark.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.errors import ConfigError, did_you_mean
from samara.measure.language_model import LanguageModel

MAX_NEW_TOKENS = 256
"""The harness's number where a task names none."""

TOKEN_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness_model(model: LanguageModel) -> Any:
    """The model as an ``lm_eval.api.model.LM``.

    Raises:
        ConfigError: If ``lm-eval`` is not installed.
    """
    return _harness_class()(model)


def evaluate_with_harness(
    model: LanguageModel,
    *,
    tasks: Sequence[str],
    folder: Path,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """Run task files of the harness on a model.

    Args:
        model: Who is asked.
        tasks: Names of tasks or groups in the folder.
        folder: Holds the harness's task files (YAML), searched through.
        num_fewshot: Solved examples. Left out: as each task says.
        limit: Score the first rows only, as the harness does.
        seed: Of the solved examples.

    Returns:
        The harness's own results, with its ``samples``.

    Raises:
        ConfigError: If ``lm-eval`` is not installed, or the folder has no such task.
    """
    wrapped = harness_model(model)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(
                f"task '{task}': {folder} has none of that name"
                f"{did_you_mean(task, manager.all_tasks)}"
            )
    results: dict[str, Any] = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        fewshot_random_seed=seed,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
    )
    return results


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Stop texts, the most tokens to write, and other options for ``model.generate``."""

    stop: tuple[str, ...]
    max_new_tokens: int
    options: Mapping[str, Any]


def generation_request(settings: Mapping[str, Any]) -> GenerationRequest:
    """Read the harness's generation settings; greedy unless they say ``do_sample``."""
    options = dict(settings)
    until = options.pop("until", None) or []
    stop = [until] if isinstance(until, str) else list(until)
    counts = [options.pop(key, None) for key in TOKEN_KEYS]
    max_new_tokens = next((int(count) for count in counts if count is not None), MAX_NEW_TOKENS)
    if not options.get("do_sample"):
        sampling = ("do_sample", "temperature", "top_p", "top_k")
        options = {key: value for key, value in options.items() if key not in sampling}
    return GenerationRequest(
        stop=tuple(text for text in stop if text), max_new_tokens=max_new_tokens, options=options
    )


@functools.cache
def _harness_class() -> type[Any]:
    """The class is made here, since its base class comes with an optional package."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ConfigError(
            "the harness needs the package lm-eval; pip install 'samara[evaluate]'"
        ) from None

    class SamaraHarnessModel(LM):  # type: ignore[misc] # lm-eval ships no types
        """Passes the harness's three requests on."""

        def __init__(self, model: LanguageModel) -> None:
            super().__init__()
            self.language_model = model
            self._device = model.device

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            scores = self.language_model.loglikelihood(
                [context for context, _ in pairs], [continuation for _, continuation in pairs]
            )
            results = [(score.loglikelihood, score.is_greedy) for score in scores]
            return self._cached("loglikelihood", requests, results)

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            texts = [request.args[0] for request in requests]
            scores = self.language_model.loglikelihood_rolling(texts)
            results = [score.loglikelihood for score in scores]
            return self._cached("loglikelihood_rolling", requests, results)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            answers: dict[int, str] = {}
            groups: dict[str, list[int]] = {}  # requests with equal settings go together
            for index, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(index)
            for indices in groups.values():
                asked = generation_request(requests[indices[0]].args[1])
                written = self.language_model.generate_until(
                    [requests[index].args[0] for index in indices],
                    stop=asked.stop,
                    max_new_tokens=asked.max_new_tokens,
                    options=asked.options,
                )
                answers |= {
                    index: answer.text for index, answer in zip(indices, written, strict=True)
                }
            results = [answers[index] for index in range(len(requests))]
            return self._cached("generate_until", requests, results)

        def _cached(self, kind: str, requests: Sequence[Any], results: list[Any]) -> list[Any]:
            """Tell the harness's cache, if one is on."""
            for request, result in zip(requests, results, strict=True):
                self.cache_hook.add_partial(kind, request.args, result)
            return results

        @property
        def tokenizer_name(self) -> str:
            return str(self.language_model.tokenizer.name_or_path)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            own = self.language_model.tokenizer.chat_template
            return str(own) if chat_template and own else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                self.language_model.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return SamaraHarnessModel
