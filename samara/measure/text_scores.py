"""How well a written answer agrees with a reference: exact match, F1, ROUGE."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from samara.errors import ConfigError

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE = ("rouge1", "rouge2", "rougeL")


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    plain = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals one of the references in normal form, else 0."""
    return float(normalize_answer(answer) in {normalize_answer(text) for text in references})


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 over words in normal form (SQuAD). Nothing agrees with nothing only."""
    return max(_f1(normalize_answer(answer), normalize_answer(text)) for text in references)


def _f1(answer: str, reference: str) -> float:
    found, wanted = answer.split(), reference.split()
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


class RougeScorer:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures with stemming, by the package ``rouge-score``."""

    def __init__(self) -> None:
        """Load the scorer.

        Raises:
            ConfigError: If ``rouge-score`` is not installed.
        """
        try:
            from rouge_score.rouge_scorer import RougeScorer as Scorer
        except ImportError:
            raise ConfigError(
                "summarization needs the package rouge-score; pip install 'samara[evaluate]'"
            ) from None
        self._scorer: Any = Scorer(list(ROUGE), use_stemmer=True)

    def score(self, summary: str, references: Sequence[str]) -> dict[str, float]:
        """The best F-measure of each kind over the references."""
        best = self._scorer.score_multi(list(references), summary)
        return {name: float(best[name].fmeasure) for name in ROUGE}
