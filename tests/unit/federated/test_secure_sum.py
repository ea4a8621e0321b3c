"""The sum is exact, what the server sees is uniform, and nothing more can be had."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.federated.messages import Instruction, Reply
from samara.federated.privacy_config import SecureSumConfig
from samara.federated.secure_client import secure_stage
from samara.federated.secure_round import secure_sum
from samara.federated.secure_sum import (
    MASKED,
    Participant,
    Refused,
    join_secret,
    split_secret,
    threshold_of,
    unmask,
)

CONTEXT = "1/0"


def _ready(clients, threshold):
    """Participants whose shares were passed on, gone through JSON as on a node."""
    people = {client: Participant.begin(client, CONTEXT) for client in clients}
    keys = {client: own.public_keys() for client, own in people.items()}
    sealed = {client: own.share(keys, threshold) for client, own in people.items()}
    for client, own in people.items():
        own.receive({other: sealed[other][client] for other in people if other != client})
    kept = {client: json.loads(json.dumps(own.to_dict())) for client, own in people.items()}
    return {client: Participant.from_dict(own) for client, own in kept.items()}, keys


def _open(people, keys, masked, threshold, answering=None):
    lost = sorted(set(people) - set(masked))
    answers = {c: people[c].reveal(sorted(masked), lost) for c in answering or masked}
    return unmask(masked, answers, keys=keys, members=people, threshold=threshold, context=CONTEXT)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_sum_is_exact_whoever_drops_out_up_to_the_threshold(data):
    clients = data.draw(st.lists(st.integers(0, 500), min_size=3, max_size=7, unique=True))
    threshold = data.draw(st.integers(len(clients) // 2 + 1, len(clients)))
    left = data.draw(
        st.lists(st.sampled_from(clients), min_size=threshold, unique=True), label="left"
    )
    vectors = {
        c: np.array(data.draw(st.lists(st.integers(-(2**27), 2**27), min_size=4, max_size=4)))
        for c in clients
    }
    people, keys = _ready(clients, threshold)
    masked = {client: people[client].mask(vectors[client]) for client in left}
    total = _open(people, keys, masked, threshold)
    np.testing.assert_array_equal(total, sum(vectors[client] for client in left))


def test_a_third_of_the_clients_may_be_lost_even_after_they_sent_their_vector():
    clients, threshold = list(range(10)), threshold_of(0.67, 10)
    assert threshold == 7
    people, keys = _ready(clients, threshold)
    vectors = {c: np.arange(5) * (c + 1) - 7 for c in clients}
    masked = {client: people[client].mask(vectors[client]) for client in clients[:9]}
    total = _open(people, keys, masked, threshold, answering=clients[:7])
    np.testing.assert_array_equal(total, sum(vectors[client] for client in clients[:9]))


@pytest.mark.parametrize("value", [0, 1, -12345])
def test_what_the_server_sees_of_a_client_is_uniform_whatever_the_client_has(value):
    """Chi-square over the four bytes of each word, and no correlation with the vector."""
    people, _ = _ready([3, 5, 8], 2)
    size = 40_000
    vector = np.full(size, value)
    vector[::2] = -value
    seen = people[5].mask(vector)
    words = seen.view(np.uint8).reshape(size, 4)
    for place in range(4):
        counts = np.bincount(words[:, place], minlength=256)
        chi_square = float(((counts - size / 256) ** 2 / (size / 256)).sum())
        assert 255 - 5 * np.sqrt(510) < chi_square < 255 + 5 * np.sqrt(510)
    means = seen[::2].mean() - seen[1::2].mean()
    assert abs(means) < 5 * 2**32 / np.sqrt(12) * np.sqrt(4 / size)


def test_two_rounds_of_the_same_vector_look_unrelated():
    vector = np.arange(1000)
    seen = [_ready([0, 1, 2], 2)[0][0].mask(vector) for _ in range(2)]
    assert (seen[0] == seen[1]).sum() < 5


def test_all_but_the_last_mask_still_hide_a_vector():
    """The server that knows a lost client's masking key has that client's own mask before it."""
    people, keys = _ready([0, 1, 2], 2)
    vector = np.zeros(1000, dtype=np.int64)
    bare = Participant.from_dict({**people[1].to_dict(), "seed": "00" * 32}).mask(vector)
    seen = people[1].mask(vector)
    assert (seen == bare).sum() < 5
    assert keys[1]["mask"] != people[1].mask_key


def test_fewer_than_the_threshold_open_nothing():
    people, keys = _ready([0, 1, 2, 3], 3)
    masked = {client: people[client].mask(np.arange(3)) for client in (0, 1)}
    with pytest.raises(Refused, match="2 clients survived, 3 are needed"):
        people[0].reveal([0, 1], [2, 3])
    masked[2] = people[2].mask(np.arange(3))
    with pytest.raises(Refused, match="2 clients lasted to the end, 3 are needed"):
        _open(people, keys, masked, 3, answering=[0, 1])


def test_shares_below_the_threshold_say_nothing_and_any_so_many_say_all():
    secret = bytes(range(32))
    shares = split_secret(secret, places=[1, 2, 3, 4, 5], threshold=3)
    assert join_secret({place: shares[place] for place in (2, 3, 5)}) == secret
    assert join_secret({place: shares[place] for place in (1, 4, 5)}) == secret
    with pytest.raises(Refused, match="do not belong together"):
        join_secret({place: shares[place] for place in (2, 5)})
    again = split_secret(secret, places=[1, 2, 3, 4, 5], threshold=3)
    assert all(shares[place] != again[place] for place in shares)


def test_a_server_that_asks_for_more_than_the_sum_is_refused():
    people, keys = _ready([0, 1, 2, 3], 3)
    with pytest.raises(Refused, match="are not the clients of the round"):
        people[0].reveal([0, 1, 2, 3], [3])  # both secrets of client 3
    with pytest.raises(Refused, match="are not the clients of the round"):
        people[0].reveal([0, 1, 2], [])
    people[0].reveal([0, 1, 2], [3])
    with pytest.raises(Refused, match="revealed its shares already"):
        people[0].reveal([0, 1, 3], [2])
    with pytest.raises(Refused, match="sealed its shares already"):
        people[0].share(keys, 3)
    fresh = Participant.begin(0, CONTEXT)
    with pytest.raises(Refused, match="came back changed"):
        fresh.share(keys, 3)
    with pytest.raises(Refused, match="threshold 2 of 4 clients is no majority"):
        fresh.share({**keys, 0: fresh.public_keys()}, 2)


def test_no_two_vectors_go_out_under_the_same_masks():
    people, _ = _ready([0, 1, 2], 2)
    people[0].mask(np.arange(3))
    again = Participant.from_dict(json.loads(json.dumps(people[0].to_dict())))
    with pytest.raises(Refused, match="has sent its vector of this round already"):
        again.mask(np.arange(3))


def test_a_share_for_another_round_or_client_does_not_open():
    people = {client: Participant.begin(client, CONTEXT) for client in range(3)}
    keys = {client: own.public_keys() for client, own in people.items()}
    sealed = {client: own.share(keys, 2) for client, own in people.items()}
    with pytest.raises(Refused, match="share of client 1 was not made for this one"):
        people[0].receive({1: sealed[1][2]})
    with pytest.raises(Refused, match="client 9 is not in the round"):
        people[0].receive({9: sealed[1][0]})
    people[0].context = "1/1"
    with pytest.raises(Refused, match="share of client 2 was not made for this one"):
        people[0].receive({2: sealed[2][0]})
    lonely = Participant.begin(0, CONTEXT)
    lonely.share({**keys, 0: lonely.public_keys()}, 2)
    with pytest.raises(Refused, match="1 clients are left, 2 are needed"):
        lonely.receive({})


class _Wire:
    """Carries stages to clients in this process; ``silent`` ones never answer from a stage on."""

    def __init__(self, silent):
        self.silent, self.memories, self.seen = silent, {}, []

    def is_silent(self, stage, client):
        order = ["keys", "shares", "inbox", "train", "unmask"]
        since = self.silent.get(client)
        return since is not None and order.index(stage) >= order.index(since)

    def exchange(self, stage, questions):
        self.seen.append((stage, json.dumps(questions)))
        answers = {}
        for client, question in questions.items():
            payload = json.loads(json.dumps(question))
            if not self.is_silent(stage, client):
                answers[client], self.memories[client] = secure_stage(
                    stage, payload, self.memories.get(client)
                )
        return answers

    def train(self, instructions):
        return [
            Reply(
                round=0,
                client=own.client,
                tensors={
                    MASKED: Participant.from_dict(self.memories[own.client]).mask(
                        np.array([own.client, -1])
                    )
                },
            )
            for own in instructions
            if not self.is_silent("train", own.client)
        ]

    def run(self, number=6, **changes):
        return secure_sum(
            [Instruction(round=0, client=client) for client in range(number)],
            settings=SecureSumConfig(clip=1.0, threshold=0.6, **changes),
            context=CONTEXT,
            exchange=self.exchange,
            train=self.train,
            usable=lambda replies: [own.client for own in replies],
        )


@pytest.mark.parametrize("stage", ["keys", "shares", "inbox", "train", "unmask"])
def test_a_client_may_be_lost_at_any_stage(stage):
    found = _Wire({2: stage}).run()
    expected = [0, 1, 3, 4, 5] if stage != "unmask" else [0, 1, 2, 3, 4, 5]
    assert found.clients == tuple(expected)
    np.testing.assert_array_equal(found.total, [sum(expected), -len(expected)])


@pytest.mark.parametrize(
    ("silent", "problem"),
    [
        (dict.fromkeys(range(4), "keys"), "2 clients were left, 3 are needed"),
        (dict.fromkeys(range(3), "shares"), "3 clients were left, 4 are needed"),
        (dict.fromkeys(range(3), "train"), "3 clients were left, 4 are needed"),
        (dict.fromkeys(range(3), "unmask"), "3 clients lasted to the end, 4 are needed"),
    ],
)
def test_a_round_that_loses_too_many_is_not_opened(silent, problem):
    found = _Wire(silent).run()
    assert (found.total, found.clients) == (None, ())
    assert problem in found.problem


def test_a_small_cohort_is_not_summed():
    assert _Wire({}).run(4, min_clients=5).total is None
    assert _Wire({}).run(5, min_clients=5).total is not None


def test_what_passes_through_the_server_holds_no_secret_in_the_clear():
    wire = _Wire({})
    wire.run()
    secrets_seen = Participant.begin(0, CONTEXT)
    assert secrets_seen.seed not in str(wire.seen)
    for client in range(1, 6):
        assert wire.memories[client] is None  # forgotten once revealed


def test_a_stage_of_an_unknown_round_is_refused():
    assert secure_stage("unmask", {"survivors": [0], "dropped": []}, None) == (
        {"refused": "knows nothing of this round"},
        None,
    )
