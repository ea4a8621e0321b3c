"""The evaluation of a finished run of a recipe as one JSON file.

    samara run recipes/quickstart.yaml
    python benchmarks/demo.py runs/quickstart --json benchmarks/results/evaluation-quickstart.json

Reads what the stages wrote (``results.json``, ``summary.json``, ``environment.json``); computes
nothing. A row is a model: its size, what its training cost, its scores with their intervals, and
its paired difference from the first model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samara.config import load_yaml
from samara.runs import read_json, write_json

SCORES = ("loss", "perplexity", "bits_per_byte")
COSTS = ("parameters", "flops_per_token", "steps", "tokens", "flops")


def rows(evaluation: Path, training: dict[str, Path]) -> list[dict[str, Any]]:
    """A row per model of an evaluation.

    Args:
        evaluation: Its run folder.
        training: Hash of the weights -> the run folder that trained them.
    """
    results = read_json(evaluation / "results.json")
    against = {item["model"]: item for item in results["comparisons"]}
    found = []
    for name, scores in results["models"].items():
        folder = training.get(scores["weights_hash"])
        summary = read_json(folder / "summary.json") if folder else {}
        found.append(
            {
                "model": name,
                "weights_hash": scores["weights_hash"],
                **{key: summary.get(key) for key in COSTS},
                **{key: scores[key] for key in SCORES},
                "against_first": against.get(name),
            }
        )
    return found


def trained(run: Path) -> dict[str, Path]:
    """Hash of the final weights -> run folder, of all stages that trained a model."""
    summaries = {path.parent: read_json(path) for path in run.glob("*/summary.json")}
    return {
        summary["weights_hash"]: folder
        for folder, summary in summaries.items()
        if "weights_hash" in summary
    }


def main(arguments: Sequence[str]) -> None:
    """Collect the run's figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run with an evaluation")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="where to")
    options = parser.parse_args(arguments)
    found = sorted(options.run.glob("*/results.json"))
    if len(found) != 1:
        parser.error(f"{options.run}: holds {len(found)} evaluations, one is needed")
    evaluation = found[0].parent
    results, machine = read_json(found[0]), read_json(evaluation / "environment.json")
    recipe = load_yaml(options.run / "recipe.yaml")
    write_json(
        options.json,
        {
            "command": f"samara run recipes/{recipe['name']}.yaml",
            "environment": {**machine, "device": f"{machine['cpu']}, {machine['cpu_count']} cores"},
            "settings": {key: results[key] for key in ("split", "confidence", "corpus_hash")},
            "num_documents": results["num_documents"],
            "num_tokens": results["num_tokens"],
            "complete": True,
            "rows": rows(evaluation, trained(options.run)),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
