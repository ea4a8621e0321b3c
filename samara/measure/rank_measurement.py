"""Effective ranks of one model on one text: activations in, a spectrum per place out.

Rows are pieces of single documents as the model's own tokenizer cuts them, marks included, and only
rows of one length run together: nothing is padded, so every position counts and any model of
``transformers`` can be asked without a mask. The order of the rows does not matter, since only sums
are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from samara.errors import CheckpointError, DataError
from samara.measure.activations import Place, Recorder, Site, find_sites
from samara.measure.spectrum import FloatArray, effective_rank

TOKENS_PER_CHANNEL = 10
"""Fewer tokens than this for each channel, and a spectrum looks lower in rank than it is."""
DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What was measured at one place."""

    place: Place
    num_tokens: int
    eigenvalues: FloatArray
    """Of x x^T over the tokens, falling."""
    centred: FloatArray
    """Of their covariance."""

    @property
    def width(self) -> int:
        return len(self.eigenvalues)

    def record(self, alphas: Sequence[float]) -> dict[str, Any]:
        """As it stands in ``ranks.json``."""
        return {
            "layer": self.place.layer,
            "projection": self.place.projection,
            "space": self.place.space,
            "width": self.width,
            "num_tokens": self.num_tokens,
            "ranks": [effective_rank(self.eigenvalues, alpha) for alpha in alphas],
            "centred_ranks": [effective_rank(self.centred, alpha) for alpha in alphas],
        }


def text_rows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    max_tokens: int,
) -> list[list[int]]:
    """The first ``max_tokens`` tokens of texts, in pieces of one document each.

    Raises:
        DataError: If there is no token.
    """
    rows: list[list[int]] = []
    left = max_tokens
    for ids in _encoded(texts, tokenizer):
        for start in range(0, min(len(ids), left), sequence_length):
            rows.append(ids[start : min(start + sequence_length, left)])
        left -= len(ids)
        if left <= 0:
            break
    if not rows:
        raise DataError("the text holds no token; give a file or split with text")
    return rows


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    remaining = iter(texts)
    while block := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        yield from tokenizer(block, verbose=False)["input_ids"]


def measure_ranks(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int,
    device: torch.device,
    precision: str = "float32",
    layers_at_once: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Spectrum]:
    """The spectra of all places of a model, layer by layer.

    Args:
        model: A decoder or encoder on ``device``, in evaluation mode.
        rows: Token ids of single pieces of text.
        batch_size: Rows at a time; the result depends on it by rounding only.
        device: Where the model is.
        precision: ``bfloat16``: autocast. Sums are float64.
        layers_at_once: Layers whose sums are in memory together; None: all.
        on_progress: Called with the number of rows done, over all passes.

    Raises:
        CheckpointError: If the model has no linears in numbered layers, or one is not finite.
    """
    sites = find_sites(model)
    if not sites:
        raise CheckpointError(
            f"{type(model).__name__}: has no linears in numbered layers, so there is nothing to see"
        )
    found: list[Spectrum] = []
    for group, own in enumerate(_groups(sites, layers_at_once)):
        recorder = Recorder(own)
        with recorder.attached():
            for done in _run(model, rows, batch_size, device, precision):
                on_progress(group * len(rows) + done)
        found += _spectra(recorder)
    return found


def num_passes(model: nn.Module, layers_at_once: int | None) -> int:
    """How often :func:`measure_ranks` reads the rows."""
    return len(_groups(find_sites(model), layers_at_once))


def _groups(sites: Sequence[Site], layers_at_once: int | None) -> list[list[Site]]:
    groups: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        groups[0 if layers_at_once is None else site.layer // layers_at_once].append(site)
    return list(groups.values())


@torch.no_grad()
def _run(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    device: torch.device,
    precision: str,
) -> Iterator[int]:
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for row in rows:
        by_length[len(row)].append(row)
    done = 0
    for alike in by_length.values():
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            input_ids = torch.tensor(batch, device=device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                model(input_ids=input_ids)
            done += len(batch)
            yield done


def _spectra(recorder: Recorder) -> list[Spectrum]:
    # What several linears read is one set of sums: its eigenvalues are taken once.
    known: dict[int, tuple[FloatArray, FloatArray]] = {}
    found = []
    for place, sums in recorder.sums.items():
        if id(sums) not in known:
            try:
                known[id(sums)] = (sums.eigenvalues(centred=False), sums.eigenvalues(centred=True))
            except CheckpointError as error:
                where = f"layer {place.layer}, {place.projection}, {place.space}"
                raise CheckpointError(f"{where}: {error}") from None
        plain, centred = known[id(sums)]
        found.append(
            Spectrum(place=place, num_tokens=sums.num_tokens, eigenvalues=plain, centred=centred)
        )
    return found
