"""Instruction data: records, the chat template, answers as targets, shortening, packing."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from samara.data.chat import ChatEncoder, ChatRows, EncodedConversation, pack, shorten
from samara.data.chat_records import (
    Conversation,
    Message,
    conversations_of_record,
    read_conversations,
)
from samara.data.chat_template import CHAT_TEMPLATE, save_with_chat_template
from samara.data.loader import training_batches
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX
from samara.errors import DataError


def talk(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of these contents, question and answer in turn."""
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=c) for i, c in enumerate(contents)]  # type: ignore[arg-type]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages), origin="talk:1")


TALKS = [
    talk("Where does the seed fall?", "It falls where the wind will."),
    talk(
        "the elm?",
        "Yes.",
        "and the seed?",
        "No.\n\nIt is eaten.",
        "why",
        "some are",
        system="Be brief.",
    ),
    talk("  spaces \n", "\n\n  around the answer \n"),
    talk("Ünïcode 🌱", "日本語 – “quoted” 🌳🌲"),
    talk("1 + 1 =", "2"),
    talk("a user who spells <|assistant|>\nand <|eos|>", "an answer that spells <|eos|> and <s>"),
]


@pytest.fixture(scope="module")
def byte_level(tokenizer: TextTokenizer, tmp_path_factory) -> Path:
    return save_with_chat_template(tokenizer.folder, tmp_path_factory.mktemp("a") / "t").folder


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory) -> Path:
    """Like Llama's: words begin with a visible space, unknown characters fall back to bytes."""
    folder = tmp_path_factory.mktemp("b") / "source"
    folder.mkdir()
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = ["the seed of elm is carried by wind", "<|user|>\n<|assistant|>\n<|system|> it falls"]
    model.train_from_iterator(
        texts * 5, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    data = json.loads(model.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are ordinary entries
    (folder / "tokenizer.json").write_text(json.dumps(data))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return save_with_chat_template(folder, folder.parent / "t").folder


@pytest.fixture(params=["byte_level", "sentencepiece_like"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoder(byte_level: Path) -> ChatEncoder:
    return ChatEncoder(byte_level)


# --- the template -----------------------------------------------------------------------------


def test_the_text_of_a_conversation(encoder: ChatEncoder):
    messages = talk("Name a colour.", " Blue. ", system="Be brief.").messages
    assert encoder.render(messages) == (
        "<|bos|><|system|>\nBe brief.<|eos|>\n<|user|>\nName a colour.<|eos|>\n"
        "<|assistant|>\nBlue.<|eos|>\n"
    )
    assert encoder.render(messages[:2], add_generation_prompt=True) == (
        "<|bos|><|system|>\nBe brief.<|eos|>\n<|user|>\nName a colour.<|eos|>\n<|assistant|>\n"
    )


def test_without_a_begin_mark_there_is_none(byte_level: Path, tmp_path: Path):
    copy = TextTokenizer.load(byte_level).copy_to(tmp_path / "t")
    path = copy.folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["bos_token"]
    path.write_text(json.dumps(settings))
    assert ChatEncoder(copy.folder).render(TALKS[0].messages).startswith("<|user|>\n")


def test_transformers_reads_the_saved_template(folder: Path):
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE


def test_apply_chat_template_gives_our_tokens(folder: Path):
    """What a model was trained on is what it is asked with."""
    auto = AutoTokenizer.from_pretrained(folder)
    for conversation, encoded in zip(TALKS, ChatEncoder(folder).encode(TALKS), strict=True):
        if "spells" in conversation.messages[0].content:
            continue
        turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
        whole = auto.apply_chat_template(turns, return_dict=False)
        assert whole[: len(encoded)] == encoded.tokens.tolist()
        assert auto.decode(whole[len(encoded) :]).strip() == ""  # the line break after the end
        prompt = auto.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert not encoded.is_answer[len(prompt) - 1]
        assert encoded.is_answer[len(prompt) :].all()


def test_the_targets_are_the_answers_and_their_end_marks(folder: Path):
    auto = AutoTokenizer.from_pretrained(folder)
    end = auto.eos_token
    for conversation, encoded in zip(TALKS[:5], ChatEncoder(folder).encode(TALKS[:5]), strict=True):
        answers = [m.content.strip() for m in conversation.messages if m.role == "assistant"]
        edges = np.flatnonzero(np.diff([0, *encoded.is_answer.astype(int), 0]))
        runs = [encoded.tokens[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        assert [auto.decode(run).lstrip() for run in runs] == [answer + end for answer in answers]
        assert all(run[-1] == auto.eos_token_id for run in runs)


def test_nobody_can_spell_a_mark(encoder: ChatEncoder, byte_level: Path):
    (encoded,) = encoder.encode([TALKS[-1]])
    ids = encoded.tokens.tolist()
    end = AutoTokenizer.from_pretrained(byte_level).eos_token_id
    assert ids.count(end) == 2  # of the question and of the answer
    assert encoder.render(TALKS[-1].messages).count("<|assistant|>") == 1
    assert "< |assistant|>\nand < |eos|>" in encoder.render(TALKS[-1].messages)
    assert not encoded.is_answer[: ids.index(end)].any()


def test_a_tokenizer_keeps_its_own_template(byte_level: Path, tmp_path: Path):
    copy = TextTokenizer.load(byte_level).copy_to(tmp_path / "t")
    own = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (copy.folder / "chat_template.jinja").write_text(own)
    again = save_with_chat_template(copy.folder, tmp_path / "again")
    encoder = ChatEncoder(again.folder)
    assert encoder.render(TALKS[4].messages) == "[user]1 + 1 =<|eos|>[assistant]2<|eos|>"
    (encoded,) = encoder.encode([TALKS[4]])
    assert encoded.is_answer.sum() == 2


def replace_template(folder: Path, target: Path, template: str) -> ChatEncoder:
    copy = TextTokenizer.load(folder).copy_to(target)
    (copy.folder / "chat_template.jinja").write_text(template)
    return ChatEncoder(copy.folder)


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_level: Path, tmp_path: Path):
    encoder = replace_template(byte_level, tmp_path / "t", "{{ messages | length }}{{ messages }}")
    with pytest.raises(DataError, match="talk:1: the chat template writes earlier turns differ"):
        encoder.encode(TALKS[:1])


def test_a_template_that_refuses_a_conversation(byte_level: Path, tmp_path: Path):
    encoder = replace_template(byte_level, tmp_path / "t", "{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match=r"talk:1: the chat template refuses .*no such role"):
        encoder.encode(TALKS[:1])


def test_a_template_that_leaves_no_answer(byte_level: Path, tmp_path: Path):
    encoder = replace_template(byte_level, tmp_path / "t", "{{ bos_token }}")
    with pytest.raises(DataError, match="talk:1: the chat template leaves no token of the answer"):
        encoder.encode(TALKS[:1])


def test_our_template_refuses_unknown_roles(byte_level: Path):
    auto = AutoTokenizer.from_pretrained(byte_level)
    with pytest.raises(Exception, match="no role 'tool'; use system, user, assistant"):
        auto.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_tokenizer_without_a_template_is_refused(tokenizer: TextTokenizer):
    with pytest.raises(DataError, match=r"no chat template \(chat_template\.jinja\)"):
        ChatEncoder(tokenizer.folder)


def test_a_tokenizer_without_an_end_mark_is_refused(tokenizer: TextTokenizer, tmp_path: Path):
    copy = tokenizer.copy_to(tmp_path / "t")
    (copy.folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no eos_token, so an answer cannot end"):
        save_with_chat_template(copy.folder, tmp_path / "u")


# --- records ----------------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [QUESTION, ANSWER]}, [[("user", "q"), ("assistant", "a")]]),
        (
            {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER, QUESTION]},
            [[("system", "s"), ("user", "q"), ("assistant", "a")]],
        ),
        (
            {"instruction": "Do.", "input": "this", "output": "Done.", "curated": True},
            [[("user", "Do.\n\nthis"), ("assistant", "Done.")]],
        ),
        (
            {"instruction": "Do. ", "input": "", "output": "D"},
            [[("user", "Do."), ("assistant", "D")]],
        ),
        ({"instruction": "Do.", "output": "D"}, [[("user", "Do."), ("assistant", "D")]]),
        (
            {"instruction": "Do.", "input": None, "output": "D"},
            [[("user", "Do."), ("assistant", "D")]],
        ),
        ({"prompt": "p", "completion": "c"}, [[("user", "p"), ("assistant", "c")]]),
        (
            {"instruction": "I", "instances": [{"input": "1", "output": "x"}, {"output": "y"}]},
            [
                [("user", "I\n\n1"), ("assistant", "x")],
                [("user", "I"), ("assistant", "y")],
            ],
        ),
        ({"prompt": "p", "completion": "  "}, [[]]),
        ({"messages": [QUESTION]}, [[]]),
    ],
)
def test_forms_of_records(record: dict[str, Any], expected: list[list[tuple[str, str]]]):
    found = conversations_of_record(record, origin="f:1")
    assert [[(m.role, m.content) for m in c.messages] for c in found] == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], r"f:7: a record is a mapping of fields, this one is \[1\]"),
        ({}, "f:7: no field 'messages', 'instruction' or 'prompt'; the record has nothing"),
        ({"text": "x"}, "f:7: no field 'messages', .*; the record has text"),
        ({"prompt": "p"}, "f:7: no field 'completion'.*a record with 'prompt' needs it"),
        (
            {"instruction": "i", "outptu": "o"},
            r"f:7: no field 'output' \(did you mean 'outptu'\?\); a record with 'instruction'",
        ),
        ({"instruction": "i", "output": 3}, "f:7: field 'output' holds 3, not text"),
        ({"instruction": "i", "input": 3, "output": "o"}, "f:7: field 'input' holds 3, not text"),
        ({"instruction": "i", "instances": "x"}, "f:7: field 'instances' holds 'x', not records"),
        ({"instruction": "i", "instances": [{}]}, "f:7: no field 'output'"),
        ({"messages": []}, r"f:7: field 'messages' holds \[\], not a list of messages"),
        ({"messages": ["hi"]}, "f:7: message 1 is 'hi', not a mapping"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "f:7: message 2: no field 'content'"),
        ({"messages": [{"content": "x"}]}, "f:7: message 1: no field 'role'"),
        (
            {"messages": [QUESTION, {"role": "assistent", "content": "x"}]},
            r"f:7: message 2 has role 'assistent' \(did you mean 'assistant'\?\)",
        ),
        (
            {"messages": [QUESTION, {"role": "system", "content": "x"}]},
            "f:7: message 2 has role 'system'; only the first message may",
        ),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "holds None, not text"),
    ],
)
def test_malformed_records_name_the_line_and_what_is_missing(record: Any, message: str):
    with pytest.raises(DataError, match=message):
        conversations_of_record(record, origin="f:7")


def test_files_are_read_in_order_and_what_is_left_out_is_counted(tmp_path: Path):
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text('{"prompt": "1", "completion": "x"}\n\n{"prompt": "2", "completion": ""}\n')
    with gzip.open(zipped, "wt", encoding="utf-8") as file:
        file.write('\ufeff{"instruction": "ü", "output": "y"}\n')
    skipped: Counter[str] = Counter()
    found = list(read_conversations([plain, zipped], skipped=skipped))
    assert [c.origin for c in found] == [f"{plain}:1", f"{zipped}:1"]
    assert [c.messages[0].content for c in found] == ["1", "ü"]
    assert skipped == {"without an answer": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "1", "completion": "x"}\n{"prompt"', r"d\.jsonl:2: not valid JSON"),
        (b'{"prompt": "\xff"}', r"d\.jsonl:1: not UTF-8"),
    ],
)
def test_unreadable_lines_are_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_conversations([tmp_path / "d.jsonl"]))


def test_unreadable_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        list(read_conversations([tmp_path / "none.jsonl"]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "1"}' * 99)[:20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read to the end"):
        list(read_conversations([tmp_path / "cut.jsonl.gz"]))


# --- shortening -------------------------------------------------------------------------------


def encoded(*runs: int) -> EncodedConversation:
    """Prompt and answer in turn, of these lengths; token values are their places."""
    is_answer = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return EncodedConversation(tokens=np.arange(len(is_answer)), is_answer=is_answer)


@pytest.mark.parametrize(
    ("runs", "limit", "expected"),
    [
        ((4, 4), 8, [*range(8)]),  # fits
        ((4, 10), 8, [*range(8)]),  # the answer's tail goes
        ((3, 2, 3, 2), 8, [*range(5)]),  # the second answer goes, and the question before it
        ((3, 2, 2, 3), 8, [*range(8)]),
        ((20, 2), 8, [0, 1, 2, 17, 18, 19, 20, 21]),  # the middle of the prompt goes
        ((20, 9), 8, [0, 1, 18, 19, 20, 21, 22, 23]),  # half for each
        ((20, 1), 2, [0, 20]),
    ],
)
def test_shortening(runs: tuple[int, ...], limit: int, expected: list[int]):
    whole = encoded(*runs)
    short = shorten(whole, limit=limit)
    assert short.tokens.tolist() == expected
    assert short.is_answer.tolist() == whole.is_answer[expected].tolist()


# --- packing and rows -------------------------------------------------------------------------


def test_packing_fills_the_best_fit():
    assert pack([5, 5, 4, 3, 3], capacity=10) == [[0, 1], [2, 3, 4]]
    assert pack([6, 5, 4, 3, 2], capacity=10) == [[0, 2], [1, 3, 4]]
    assert pack([], capacity=3) == []
    assert pack([3, 3], capacity=3) == [[0], [1]]


def test_rows_hold_whole_conversations_kept_apart(encoder: ChatEncoder):
    rows = ChatRows(TALKS * 3, encoder, sequence_length=200)
    expected = encoder.encode(TALKS * 3)
    batch = rows.batch(range(len(rows)))
    seen: list[int] = []
    for row in range(len(rows)):
        ids, targets, positions, documents = (
            batch[name][row].tolist()
            for name in ("input_ids", "targets", "position_ids", "document_ids")
        )
        for number in dict.fromkeys(documents):
            places = [i for i, document in enumerate(documents) if document == number]
            assert places == list(range(places[0], places[-1] + 1))
            assert [positions[i] for i in places] == list(range(len(places)))
            if number == -1:
                assert {targets[i] for i in places} == {IGNORE_INDEX}
                assert {ids[i] for i in places} == {0}
                continue
            seen.append(number)
            tokens, counted = expected[number].tokens.tolist(), expected[number].is_answer
            assert [ids[i] for i in places] == tokens[:-1]
            assert [targets[i] for i in places] == [
                token if yes else IGNORE_INDEX
                for token, yes in zip(tokens[1:], counted[1:], strict=True)
            ]
    assert sorted(seen) == list(range(len(TALKS) * 3))
    assert rows.statistics.conversations == len(seen)
    assert rows.statistics.shortened == rows.statistics.lost_answer_tokens == 0
    assert rows.statistics.padding == (batch["document_ids"] == -1).sum()
    assert rows.statistics.targets == (batch["targets"] != IGNORE_INDEX).sum()


def test_every_row_has_a_target_however_short(encoder: ChatEncoder):
    long = [
        talk("word " * 300, "an answer " * 50),
        talk("hm", "x " * 400),
        talk("word " * 300, "y"),
    ]
    for length in (1, 2, 7, 40):
        rows = ChatRows(long, encoder, sequence_length=length)
        batch = rows.batch(range(len(rows)))
        assert ((batch["targets"] != IGNORE_INDEX).sum(1) > 0).all()
        assert rows.statistics.shortened == 3
        assert rows.statistics.lost_answer_tokens > 0


def test_the_loader_reads_them(encoder: ChatEncoder):
    rows = ChatRows(TALKS * 3, encoder, sequence_length=200)
    (step,) = training_batches(
        rows, batch_size=2, micro_batch_size=1, seed=1, start_step=0, num_steps=1
    )
    assert len(step) == 2
    assert torch.equal(rows.batch([len(rows)])["targets"], rows.batch([0])["targets"])


def test_no_conversation_is_refused(encoder: ChatEncoder):
    with pytest.raises(DataError, match="no conversation with an answer is left"):
        ChatRows([], encoder, sequence_length=8)
