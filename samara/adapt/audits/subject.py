"""A model that is audited: causal, masked, or a classifier, asked in one way.

Shapes: t positions, v vocabulary, n labels, r texts, c classes of a distribution (v or n).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

from samara.adapt.audits.config import Precision
from samara.adapt.models import TaskModel, load_task_model
from samara.errors import ConfigError
from samara.measure.language_model import LanguageModel, context_length
from samara.measure.language_model_folder import (
    load_strictly,
    load_tokenizer,
    quiet_transformers,
    refuse_missing,
    saved_head,
)
from samara.model.heads import CAUSAL, CLASSIFICATION
from samara.runs import model_folder, read_json

Kind = Literal["causal", "masked", "labels"]


def open_model(path: Path) -> tuple[TaskModel, Kind]:
    """Load a model as it is stored, on the CPU, under the head that its configuration names.

    Raises:
        CheckpointError: If the folder holds no complete model with its tokenizer.
        ConfigError: If it is no model that can be audited.
    """
    folder = model_folder(path.expanduser())
    kind = model_kind(folder)
    if kind == "masked":
        return TaskModel(
            model=_masked(folder), tokenizer=load_tokenizer(folder), folder=folder
        ), kind
    labels = None
    if kind == "labels":
        names = read_json(folder / "config.json").get("id2label") or {"0": "0", "1": "1"}
        labels = [names[key] for key in sorted(names, key=int)]
    return load_task_model(folder, labels=labels, dtype=None, seed=0), kind


def model_kind(folder: Path) -> Kind:
    """What a model folder's configuration says that it is."""
    head = saved_head(folder)
    if head is not None:
        if head is CAUSAL:
            return "causal"
        return "labels" if head is CLASSIFICATION else "masked"
    names = read_json(folder / "config.json").get("architectures") or ["ForCausalLM"]
    name = str(names[0])
    if name.endswith("ForSequenceClassification"):
        return "labels"
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        return "masked"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    raise ConfigError(
        f"{folder / 'config.json'}: architectures: a {name} cannot be audited; give a causal or "
        "masked language model or a text classifier"
    )


def _masked(folder: Path) -> PreTrainedModel:
    with quiet_transformers():
        model, report = load_strictly(AutoModelForMaskedLM, folder, dtype=None)
    refuse_missing(folder, report["missing_keys"])
    return model  # type: ignore[no-any-return]


class Subject:
    """A model with its tokenizer, ready to be asked.

    Attributes:
        model: In evaluation mode. With ``precision`` float32 a copy where it is stored otherwise,
            since rounding would decide ties between greedy answers.
        tokenizer: Its tokenizer.
        kind: Its head.
        batch_size: Texts at a time.
        first_position: Number of a row's first position.
        max_length: Tokens it can read.
    """

    def __init__(
        self, loaded: TaskModel, kind: Kind, *, precision: Precision = "float32", batch_size: int
    ) -> None:
        """Wrap a model.

        Raises:
            ConfigError: If a masked model's tokenizer has no mask, or cannot say where its tokens
                stand in the text.
        """
        model: Any = loaded.model
        is_exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
        if precision == "float32" and not is_exact:
            model = copy.deepcopy(model).float()
        model.train(False)
        self.model: PreTrainedModel = model
        self.tokenizer: Any = loaded.tokenizer
        self.kind, self.batch_size = kind, batch_size
        self.first_position = _first_position(model)
        known = context_length(model, loaded.tokenizer) - self.first_position
        self.max_length = min(known, int(loaded.tokenizer.model_max_length))
        if kind == "masked" and (
            self.tokenizer.mask_token_id is None or not self.tokenizer.is_fast
        ):
            raise ConfigError(
                f"{loaded.folder}: a masked model needs a fast tokenizer with a mask token; add "
                "tokenizer.json and mask_token"
            )

    def language_model(self, batch_size: int | None = None) -> LanguageModel:
        """The causal model as one that is asked for texts."""
        assert self.kind == "causal"
        return LanguageModel(self.model, self.tokenizer, batch_size=batch_size or self.batch_size)

    # --- text to tokens -------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids, at least one, cut to what the model reads: a prompt at its beginning."""
        if self.kind == "causal":
            asked = self.language_model()
            return (asked.encode([text])[0] or [asked.prefix_token_id])[-self.max_length :]
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"][: self.max_length]
        return ids or [self.tokenizer.pad_token_id or 0]

    # --- what the model says --------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *, batch_size: int) -> Iterator[Tensor]:
        """Logits of rows of tokens, one after another: (t, v), or (n,) of a classifier."""
        device = self.model.device
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            length = max(len(row) for row in batch)
            ids_bt = torch.tensor([[*row, *[row[0]] * (length - len(row))] for row in batch])
            mask_bt = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
            found = self.model(
                input_ids=ids_bt.to(device), attention_mask=mask_bt.to(device)
            ).logits
            found = found if found.dtype == torch.float64 else found.float()
            for row, logits in zip(batch, found, strict=True):
                yield logits if self.kind == "labels" else logits[: len(row)]

    def distributions(self, texts: Sequence[str], *, batch_size: int | None = None) -> Tensor:
        """Probabilities (r, c): of the next token, of the last word masked, or of the labels."""
        rows, places = [], []
        for text in texts:
            row, place = self._asked(self.encode(text))
            rows.append(row)
            places.append(place)
        found = self.logits(rows, batch_size=batch_size or self.batch_size)
        asked = [
            logits if self.kind == "labels" else logits[place]
            for logits, place in zip(found, places, strict=True)
        ]
        return torch.stack(asked).softmax(dim=-1).cpu()

    def _asked(self, ids: list[int]) -> tuple[list[int], int]:
        """A row and the position whose logits answer it."""
        if self.kind != "masked":
            return ids, len(ids) - 1
        special = set(self.tokenizer.all_special_ids)
        words = [place for place, token in enumerate(ids) if token not in special]
        place = words[-1] if words else len(ids) - 1
        return [*ids[:place], self.tokenizer.mask_token_id, *ids[place + 1 :]], place

    def answers(self, texts: Sequence[str], *, batch_size: int, max_new_tokens: int) -> list[str]:
        """Greedy answers: generated text, or the number of the likeliest token or label."""
        if self.kind == "causal":
            written = self.language_model(batch_size).generate_until(
                texts, max_new_tokens=min(max_new_tokens, self.max_length - 1)
            )
            return [generation.text for generation in written]
        likeliest = self.distributions(texts, batch_size=batch_size).argmax(dim=-1)
        return [str(number) for number in likeliest.tolist()]

    def continuation_scores(
        self, contexts: Sequence[str], continuations: Sequence[str]
    ) -> list[float]:
        """Summed log-probability of what follows each context, in nats.

        A masked model is asked for one token at a time, all others in sight (Salazar et al. 2020,
        arXiv 1910.14659); only the continuation's are counted, as CrowS-Pairs does with what two
        sentences share (arXiv 2010.00133).
        """
        if self.kind == "causal":
            found = self.language_model().loglikelihood(
                contexts, [f" {continuation}" for continuation in continuations]
            )
            return [score.loglikelihood for score in found]
        assert self.kind == "masked"
        rows, owners, asked = [], [], []
        for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            ids, places = self._places(context, continuation)
            for place in places:
                rows.append([*ids[:place], self.tokenizer.mask_token_id, *ids[place + 1 :]])
                owners.append(number)
                asked.append((place, ids[place]))
        sums = [0.0] * len(contexts)
        found_logits = self.logits(rows, batch_size=self.batch_size)
        for owner, (place, token), logits_tv in zip(owners, asked, found_logits, strict=True):
            sums[owner] += float(logits_tv[place].log_softmax(dim=-1)[token])
        return sums

    def _places(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the whole sentence, and the positions of those of the continuation."""
        start = len(context) + 1
        stop = start + len(continuation)
        encoded = self.tokenizer(
            f"{context} {continuation}.", return_offsets_mapping=True, verbose=False
        )
        places = [
            place
            for place, (low, high) in enumerate(encoded["offset_mapping"])
            if low < high and high > start and low < stop
        ]
        return encoded["input_ids"], places


def _first_position(model: PreTrainedModel) -> int:
    """RoBERTa numbers its positions from behind that of the padding; others from 0."""
    config: Any = model.config
    return int(config.pad_token_id) + 1 if "roberta" in config.model_type else 0
