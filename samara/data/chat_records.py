"""Instruction data: files of records, each one or more conversations.

A JSON Lines file (also .gz) holds one record a line, in one of these forms:

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"instruction": …, "input": …, "output": …}           input may be left out (Alpaca, Dolly)
    {"prompt": …, "completion": …}                         (T0)
    {"instruction": …, "instances": [{"input": …, "output": …}, …]}     (Self-Instruct)

Other fields are ignored. A record of another form is refused, with the file, the line, and what is
missing. A conversation without an answer holds nothing to learn: it is left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from samara.data.text_lines import read_json_lines
from samara.errors import DataError, did_you_mean

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "instances": ("instruction", "instances"),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
"""A record's form is named by the first of these fields that it has; the fields it must have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns that belong together, the last of them an answer.

    Attributes:
        messages: The turns.
        origin: File and line, for messages.
    """

    messages: tuple[Message, ...]
    origin: str


def read_conversations(
    paths: Sequence[Path], *, skipped: Counter[str] | None = None
) -> Iterator[Conversation]:
    """Read the conversations of JSON Lines files, in order.

    Args:
        paths: Files, .jsonl or .jsonl.gz.
        skipped: Counts what is left out, by reason.

    Raises:
        DataError: If a file cannot be read or a record is malformed, with file and line.
    """
    skipped = skipped if skipped is not None else Counter()
    for path in paths:
        for number, record in read_json_lines(path):
            for conversation in conversations_of_record(record, origin=f"{path}:{number}"):
                if conversation.messages:
                    yield conversation
                else:
                    skipped["without an answer"] += 1


def conversations_of_record(record: Any, *, origin: str) -> list[Conversation]:
    """The conversations of one record; one without an answer has no messages.

    Args:
        record: A mapping of fields.
        origin: Where it stands; an error starts with it.

    Raises:
        DataError: If the record is of no known form, or a field is missing or of the wrong type.
    """
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a record is a mapping of fields, this one is {record!r:.60}")
    form = next((name for name in FORMS if name in record), None)
    if form is None:
        found = ", ".join(map(str, record)) or "nothing"
        raise DataError(
            f"{origin}: no field 'messages', 'instruction' or 'prompt'; the record has {found}"
        )
    for field in FORMS[form]:
        if field not in record:
            raise DataError(
                f"{origin}: no field '{field}'{did_you_mean(field, map(str, record))}; a record "
                f"with '{form}' needs it"
            )
    return [
        Conversation(messages=_up_to_last_answer(messages), origin=origin)
        for messages in _READERS[form](record, origin)
    ]


def _up_to_last_answer(messages: list[Message]) -> tuple[Message, ...]:
    """The turns up to the last answer that is not empty; nothing is learnt from those after it."""
    while messages and not (messages[-1].role == "assistant" and messages[-1].content.strip()):
        messages = messages[:-1]
    return tuple(messages)


# --- by form ----------------------------------------------------------------------------------


def _from_messages(record: dict[str, Any], origin: str) -> list[list[Message]]:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{origin}: field 'messages' holds {turns!r:.60}, not a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f"{origin}: message {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{place} is {turn!r:.60}, not a mapping with 'role' and 'content'")
        role, content = _text(turn, "role", place), _text(turn, "content", place)
        if role not in ROLES:
            raise DataError(f"{place} has role '{role}'{did_you_mean(role, ROLES)}")
        if role == "system" and number > 1:
            raise DataError(f"{place} has role 'system'; only the first message may")
        messages.append(Message(role=role, content=content))
    return [messages]


def _from_instruction(record: dict[str, Any], origin: str) -> list[list[Message]]:
    return [_exchange(record, record, origin)]


def _from_instances(record: dict[str, Any], origin: str) -> list[list[Message]]:
    instances = record["instances"]
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise DataError(f"{origin}: field 'instances' holds {instances!r:.60}, not records")
    return [_exchange(record, instance, origin) for instance in instances]


def _from_prompt(record: dict[str, Any], origin: str) -> list[list[Message]]:
    return [
        [
            Message(role="user", content=_text(record, "prompt", origin)),
            Message(role="assistant", content=_text(record, "completion", origin)),
        ]
    ]


_READERS = {
    "messages": _from_messages,
    "instances": _from_instances,
    "instruction": _from_instruction,
    "prompt": _from_prompt,
}


def _exchange(record: dict[str, Any], instance: dict[str, Any], origin: str) -> list[Message]:
    """One question, the input below the instruction where there is one, and its answer."""
    question = _text(record, "instruction", origin).strip()
    if instance.get("input") is not None:
        question = f"{question}\n\n{_text(instance, 'input', origin)}".strip()
    return [
        Message(role="user", content=question),
        Message(role="assistant", content=_text(instance, "output", origin)),
    ]


def _text(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise DataError(f"{place}: no field '{field}'{did_you_mean(field, map(str, record))}")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{place}: field '{field}' holds {value!r:.60}, not text")
    return value
