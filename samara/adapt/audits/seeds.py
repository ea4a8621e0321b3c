"""Whether answers depend on the seed: fine-tuning runs that differ in it alone, row by row.

Nothing is computed anew: each run kept what it answered to every scored row. What is judged is the
share of rows that two runs answer in the same way. Its interval is over rows; that the seeds are
few, two at the least, it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samara.adapt.results import RESULTS, read_items
from samara.config import load_yaml
from samara.errors import ConfigError
from samara.runs import read_json


@dataclass(frozen=True, kw_only=True)
class SeedAnswers:
    """How runs of several seeds answer.

    Attributes:
        seeds: Those compared, the audited run's first.
        agreement: (rows,) of each scored row the share of the pairs of runs that agree on it.
    """

    seeds: tuple[int, ...]
    agreement: npt.NDArray[np.float64]


def compare_seeds(tuned: Path, others: Sequence[Path]) -> SeedAnswers:
    """Compare a finished fine-tuning with others of the same settings.

    Raises:
        ConfigError: If one is no finished fine-tuning, or differs in more than its seed.
    """
    own = _settings(tuned)
    seeds = [own.pop("seed")]
    parents = read_json(tuned / RESULTS)["parents"]
    for other in others:
        settings = _settings(other)
        seeds.append(settings.pop("seed"))
        # Folders may have moved; what was adapted, trained on and scored is compared by content.
        for key in sorted(own.keys() | settings.keys()):
            if _told_by_hash(key, own.get(key)) != _told_by_hash(key, settings.get(key)):
                raise ConfigError(
                    f"seeds: {other} has another {key} than {tuned}; only the seed may differ"
                )
        if read_json(other / RESULTS)["parents"] != parents:
            raise ConfigError(f"seeds: {other} has another model or other rows than {tuned}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: the runs have the seeds {seeds}; each must have one of its own")
    answers = [[item.prediction for item in read_items(run)] for run in (tuned, *others)]
    equal = [
        [one == two for one, two in zip(a, b, strict=True)] for a, b in combinations(answers, 2)
    ]
    return SeedAnswers(seeds=tuple(seeds), agreement=np.array(equal, dtype=np.float64).mean(axis=0))


def _settings(run: Path) -> dict[str, Any]:
    if not (run / RESULTS).exists():
        raise ConfigError(f"seeds: {run} holds no {RESULTS}; give a finished fine-tuning run")
    settings: dict[str, Any] = dict(load_yaml(run / "recipe.yaml")["finetune"])
    return settings


def _told_by_hash(key: str, value: Any) -> Any:
    """A setting without the folders in it, and without what has no bearing on the answers."""
    if key in ("init_from", "checkpoint", "logging"):
        return None
    if key in ("task", "data"):
        return {k: v for k, v in value.items() if k not in ("data", "train", "validation")}
    return value
