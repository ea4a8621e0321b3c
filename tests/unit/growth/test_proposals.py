"""New candidates: neighbours of the leader, the promising ones first."""

from __future__ import annotations

import pytest

from samara.growth.operator_config import Interpose, OperatorConfig, RandomTop, Stack
from samara.growth.plan import check_growth
from samara.growth.proposals import propose
from samara.model.config import ModelConfig


def design(layers: int, **changes: object) -> ModelConfig:
    settings = {"hidden_size": 32, "num_hidden_layers": layers, "head_dim": 16, "ffn_dim": 48}
    return ModelConfig.model_validate({**settings, "vocab_size": 300, **changes}).expand()


def proposals(pool: list[OperatorConfig], losses: list[float], **changes: object) -> list[str]:
    labels = [operator.label for operator in pool]
    found = dict(zip(labels, losses, strict=True))
    settings: dict[str, object] = {
        "leader": min(found, key=lambda label: found[label]),
        "source": design(2),
        "target": design(4),
        "count": 20,
        "has_moments": True,
    }
    chosen = propose(
        dict(zip(labels, pool, strict=True)),
        found,
        **{**settings, **changes},  # type: ignore[arg-type]
    )
    return [operator.label for operator in chosen]


STACK, INTERPOSE = OperatorConfig(depth=Stack()), OperatorConfig(depth=Interpose())


def test_the_leader_s_output_moments_and_layer_map_are_varied():
    found = proposals([STACK], [3.0])
    assert found[0] == "stack.zero"
    assert "stack.moments-reset" in found
    assert "interpose" in found
    assert "random_top" in found


def test_nothing_that_does_the_same_comes_twice():
    found = proposals([STACK, INTERPOSE], [3.0, 3.1])
    plans = []
    for label in found:
        assert label not in ("stack", "interpose")
        # Without a wider axis there is nothing to scale: copied moments are mapped moments.
        assert "moments-copy" not in label
        plans.append(label)
    assert len(set(plans)) == len(plans)
    # last, first and block of two layers over the whole source give the map of stack
    assert not {"last", "first", "middle", "block-0"} & set(found)


def test_a_change_that_helped_others_comes_first_and_one_that_harmed_does_not_come():
    zero = INTERPOSE.model_copy(update={"new_layers": "zero"})
    reset = INTERPOSE.model_copy(update={"moments": "reset"})
    pool = [STACK, INTERPOSE, zero, reset]
    found = proposals(pool, [2.0, 3.0, 3.2, 2.7])
    assert found[0] == "stack.moments-reset"
    assert "stack.zero" not in found


def test_layer_maps_come_by_how_little_they_differ():
    found = proposals(
        [OperatorConfig(depth=Stack())], [3.0], source=design(4), target=design(6), count=40
    )
    maps = [name for name in found if "moments" not in name and "zero" not in name]
    # stack of 4 to 6 is 0 1 2 3 0 1; a random top differs in two layers, interpose in five
    assert maps.index("random_top") < maps.index("interpose")
    assert any(name.startswith("block") or name in ("first", "last", "middle") for name in maps)


def test_without_an_optimizer_state_moments_stay_reset():
    reset = STACK.model_copy(update={"moments": "reset"})
    found = proposals([reset], [3.0], has_moments=False)
    assert found
    assert all("moments-reset" in label for label in found)


def test_width_growth_tells_copied_from_mapped_moments():
    wide = {"source": design(2), "target": design(4, ffn_dim=96)}
    assert "stack.moments-copy" in proposals([STACK], [3.0], **wide)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_more_than_asked_and_all_of_them_fit(count):
    pool = [STACK, OperatorConfig(depth=RandomTop())]
    found = proposals(pool, [3.0, 3.3], count=count)
    assert len(found) == count


def test_proposals_can_be_grown():
    pool = {STACK.label: STACK}
    for operator in propose(
        pool,
        {STACK.label: 3.0},
        leader=STACK.label,
        source=design(2),
        target=design(4),
        count=30,
        has_moments=True,
    ):
        assert check_growth(design(2), design(4), operator)
