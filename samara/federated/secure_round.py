"""The server's side of a secure sum: four stages of messages around the clients' training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samara.federated.fixed_point import IntVector
from samara.federated.messages import Instruction, Reply
from samara.federated.privacy_config import SecureSumConfig
from samara.federated.secure_sum import MASKED, Refused, threshold_of, unmask

Exchange = Callable[[str, Mapping[int, dict[str, Any]]], Mapping[int, dict[str, Any]]]
"""Sends each client a stage's payload, and returns the answers of those that gave one."""


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """What a round came to.

    Attributes:
        replies: Of the clients, their vectors masked.
        total: The exact sum over those in it; None: it was not opened.
        clients: Those in it, ascending.
        problem: Why it was not opened.
    """

    replies: list[Reply]
    total: IntVector | None = None
    clients: tuple[int, ...] = ()
    problem: str = ""


def secure_sum(
    instructions: Sequence[Instruction],
    *,
    settings: SecureSumConfig,
    context: str,
    exchange: Exchange,
    train: Callable[[Sequence[Instruction]], list[Reply]],
    usable: Callable[[Sequence[Reply]], Collection[int]],
) -> SecureSum:
    """One round.

    Args:
        instructions: Of the clients that were drawn.
        settings: Of the recipe.
        context: Names run and round.
        exchange: Carries a stage.
        train: Has clients trained; their replies are masked.
        usable: Of the replies, the clients whose values may be summed: well, and in time.
    """
    drawn = [own.client for own in instructions]
    answers = exchange("keys", {c: {"client": c, "context": context} for c in drawn})
    keys = {client: answers[client]["keys"] for client in sorted(answers)}
    threshold = threshold_of(settings.threshold, len(keys))
    needed = max(threshold, settings.min_clients)
    if len(keys) < needed:
        return SecureSum(replies=[], problem=_too_few(len(keys), settings.min_clients))
    answers = exchange("shares", {c: {"keys": keys, "threshold": threshold} for c in keys})
    sealed = {c: _numbered(answers[c]["sealed"]) for c in answers if "sealed" in answers[c]}
    if len(sealed) < needed:
        return SecureSum(replies=[], problem=_too_few(len(sealed), needed))
    inboxes = {c: {"sealed": {o: sealed[o][c] for o in sealed if o != c}} for c in sealed}
    ready = exchange("inbox", inboxes)
    trained = train([i for i in instructions if "refused" not in ready.get(i.client, _LOST)])
    came = set(usable(trained))
    masked: dict[int, Any] = {r.client: r.tensors[MASKED] for r in trained if r.client in came}
    if len(masked) < needed:
        return SecureSum(replies=trained, problem=_too_few(len(masked), needed))
    split = {"survivors": sorted(masked), "dropped": sorted(set(sealed) - set(masked))}
    answers = exchange("unmask", {client: dict(split) for client in sorted(masked)})
    revealed = {c: answers[c]["revealed"] for c in answers if "revealed" in answers[c]}
    try:
        total = unmask(
            masked, revealed, keys=keys, members=sealed, threshold=threshold, context=context
        )
    except Refused as error:
        return SecureSum(replies=trained, problem=str(error))
    return SecureSum(replies=trained, total=total, clients=tuple(sorted(masked)))


_LOST = {"refused": "gave no answer"}


def _too_few(number: int, needed: int) -> str:
    return f"the sum was not opened: {number} clients were left, {needed} are needed"


def _numbered(data: Mapping[Any, str]) -> dict[int, str]:
    return {int(client): sealed for client, sealed in data.items()}
