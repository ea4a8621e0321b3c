"""Padding and lost text of the two ways from documents to rows: OpenELM's, and packing.

    python benchmarks/data_paths.py runs/quickstart/data                        # the paper's rules
    python benchmarks/data_paths.py runs/quickstart/data --sequence-length 256 --words 256

Reads the training documents of a prepared corpus, with its tokenizer, and prints JSON: for each way
the rows of one pass, the share of their positions that is padding, and the share of the text's
tokens that no row holds, by reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from record import Record, add_json_option

from samara.data.openelm_path import ChunkRules, PathCost, compare_paths
from samara.data.prepare import PreparedCorpus
from samara.data.tokenizer import TextTokenizer


def cost(path: PathCost) -> dict[str, Any]:
    """A way's counts and shares."""
    return {
        **asdict(path),
        "padding_share": path.padding_share,
        "lost_share": path.lost_share,
    }


def main() -> None:
    """Measure a corpus and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="a folder made by `samara prepare`")
    for rule in fields(ChunkRules):
        option = f"--{rule.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=rule.default, help=f"({rule.default})")
    add_json_option(parser)
    arguments = vars(parser.parse_args())
    corpus = PreparedCorpus.open(arguments.pop("corpus"))
    path = arguments.pop("json")
    rules = ChunkRules(**arguments)
    texts = (document.text for document in corpus.documents("train"))
    found = compare_paths(texts, TextTokenizer.load(corpus.tokenizer_folder), rules=rules)
    result = {
        "corpus_hash": corpus.hash,
        "rules": asdict(rules),
        "documents": found.documents,
        "openelm": cost(found.openelm),
        "packed": cost(found.packed),
    }
    record = Record(
        path, script=__file__, arguments=sys.argv[1:], device="cpu", settings=asdict(rules)
    )
    record.add(result)
    record.finish()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
