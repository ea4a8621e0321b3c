"""Importance without the bias of the drop rate, a choice that does not flicker, and the audit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.config import validate
from samara.errors import ConfigError
from samara.federated.config import SharingConfig
from samara.federated.sharing import (
    SharingAudit,
    SharingState,
    population_mean,
    update_importance,
    update_personal,
)

FLAT = (0.25,) * 4
FRESH = SharingState()


def config(**changes):
    return SharingConfig.model_validate(
        {"direction": "share_common", "shared_layers": 2, **changes}
    )


def choose(importances, settings, state=FRESH, population=FLAT):
    for importance in importances:
        state = update_personal(state, importance, population=population, config=settings)
    return state


@settings(max_examples=25)
@given(counts=st.lists(st.integers(1, 200), min_size=2, max_size=8), value=st.floats(1e-3, 1e3))
def test_equal_layers_that_are_dropped_unequally_get_equal_scores(counts, value):
    sums = [value * count for count in counts]
    found = update_importance(sums, counts, before=(), memory=0.5)
    np.testing.assert_allclose(found, 1 / len(counts), rtol=1e-9)


def test_a_layer_that_was_never_active_keeps_its_share():
    first = update_importance([3.0, 1.0, 0.0], [1, 1, 0], before=(), memory=0.5)
    np.testing.assert_allclose(first, [0.5, 1 / 6, 1 / 3])
    second = update_importance([0.0, 0.0, 9.0], [0, 0, 3], before=first, memory=0.5)
    np.testing.assert_allclose(second, first)


def test_the_first_participation_is_taken_as_it_is_and_later_ones_by_their_memory():
    first = update_importance([3.0, 1.0], [1, 1], before=(), memory=0.25)
    np.testing.assert_allclose(first, [0.75, 0.25])
    second = update_importance([1.0, 3.0], [1, 1], before=first, memory=0.25)
    np.testing.assert_allclose(second, [0.75 * 0.75 + 0.25 * 0.25, 0.75 * 0.25 + 0.25 * 0.75])


@pytest.mark.parametrize("sums", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_scores_that_say_nothing_change_nothing(sums):
    assert update_importance(sums, [1, 1], before=(0.3, 0.7), memory=0.5) == (0.3, 0.7)


def test_the_layers_that_matter_more_here_than_elsewhere_stay_personal():
    mine = (0.1, 0.4, 0.1, 0.4)
    assert choose([mine] * 3, config()).personal == (1, 3)
    assert choose([mine] * 3, config(direction="share_important")).personal == (0, 2)
    # Relative to the others: layer 1 matters to all of them.
    others = (0.1, 0.6, 0.1, 0.2)
    assert choose([mine] * 3, config(shared_layers=3), population=others).personal == (3,)


def test_the_other_directions():
    mine = (0.1, 0.4, 0.1, 0.4)
    assert choose([mine], config(direction="all")).personal == ()
    assert choose([mine], config(direction="depth")).personal == (2, 3)
    assert choose([mine], config(direction="none")).personal == (0, 1, 2, 3)


def test_a_layer_changes_side_only_after_its_patience():
    mine = (0.1, 0.4, 0.1, 0.4)
    assert choose([mine], config(patience=2)).personal == ()
    assert choose([mine] * 2, config(patience=2)).personal == (1, 3)
    flicker = [mine, mine[::-1]] * 5
    assert choose(flicker, config(patience=2)).personal == ()


def test_a_layer_close_to_the_cut_does_not_move():
    settled = choose([(0.1, 0.4, 0.1, 0.4)] * 2, config())
    close = (0.24, 0.26, 0.26, 0.24)
    assert choose([close] * 5, config(hysteresis=0.1), settled).personal == (1, 3)
    assert choose([close] * 5, config(hysteresis=0.0), settled).personal == (1, 2)


@settings(max_examples=40)
@given(data=st.data())
def test_the_policy_bounds_what_a_client_keeps_whatever_it_says(data):
    num_layers = data.draw(st.integers(2, 6))
    limit = data.draw(st.integers(0, num_layers))
    chosen = config(
        direction=data.draw(st.sampled_from(["share_common", "share_important", "depth"])),
        shared_layers=data.draw(st.integers(1, num_layers)),
        max_personal_layers=limit,
        patience=1,
    )
    state = SharingState()
    for _ in range(4):
        scores = data.draw(st.lists(st.floats(0.01, 1), min_size=num_layers, max_size=num_layers))
        state = update_personal(state, scores, population=(), config=chosen)
        assert len(state.personal) <= min(limit, num_layers - 1)


def test_no_policy_with_nothing_shared():
    with pytest.raises(ConfigError, match="max_personal_layers: direction none keeps every layer"):
        validate(SharingConfig, {"direction": "none", "max_personal_layers": 2})


def test_the_state_and_the_audit_go_through_json_and_back():
    state = choose([(0.1, 0.4, 0.2, 0.3)] * 3, config())
    assert SharingState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    audit = SharingAudit(num_layers=4)
    audit.record(3, client=12, state=state, sent=[0, 2], hash="ab")
    audit.record(3, client=2, state=SharingState(importance=FLAT), sent=[0, 1], hash=None)
    again = SharingAudit.from_dict(json.loads(json.dumps(audit.to_dict())))
    assert again == audit
    assert again.population() == population_mean([FLAT, state.importance])


def test_the_audit_says_who_holds_what_and_which_layers_nobody_shared_for_long():
    audit = SharingAudit(num_layers=3)
    assert audit.must_share(2, every=3) == ()
    audit.record(
        2, client=5, state=SharingState(personal=(1,), importance=FLAT), sent=[0], hash="x"
    )
    assert audit.holders() == [[], [5], []]
    assert audit.must_share(3, every=3) == (1, 2)
    audit.record(4, client=6, state=SharingState(importance=FLAT), sent=[1, 2], hash=None)
    assert audit.must_share(5, every=3) == ()
    audit.forget(5)
    assert audit.holders() == [[], [], []]
