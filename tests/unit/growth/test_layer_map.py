"""Depth operators as layer maps: the tables, the identities between them, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.errors import ConfigError
from samara.growth import layer_map as maps
from samara.growth.layer_map import LayerMap
from samara.model.layerwise_scaling import layerwise_schedule

checked = settings(max_examples=40, deadline=None, derandomize=True)
few = st.integers(1, 12)


def sources(layer_map: LayerMap) -> list[int]:
    return [source for layer in layer_map.layers for source in layer.sources]


@pytest.mark.parametrize(
    ("layer_map", "written"),
    [
        (maps.stack(3, 6), "[0, 1, 2, 0, 1, 2]"),
        (maps.stack(3, 5), "[0, 1, 2, 0, 1]"),
        (maps.interpose(3, 6), "[0, 0, 1, 1, 2, 2]"),
        (maps.block(4, start=1, length=2), "[0, 1, 2, 1, 2, 3]"),
        (maps.first(4, 1), "[0, 0, 1, 2, 3]"),
        (maps.last(4, 1), "[0, 1, 2, 3, 3]"),
        (maps.middle(6, 2), "[0, 1, 2, 3, 2, 3, 4, 5]"),
        (maps.middle(4, 1), "[0, 1, 1, 2, 3]"),
        (maps.solar(4, 2), "[0, 1, 2, 1, 2, 3]"),
        (maps.llama_pro(4, 2), "[0, 1, 1*, 2, 3, 3*]"),
        (maps.random_top(2, 4), "[0, 1, new, new]"),
        (maps.random_interleaved(2, 4), "[0, new, 1, new]"),
        (maps.average(3, 6), "[0, 0+1, 1, 1+2, 2, 2]"),
        (maps.stack(2, 4).with_zero_outputs(), "[0, 1, 0*, 1*]"),
        (maps.random_top(1, 2).with_zero_outputs(), "[0, new*]"),
        (maps.average(2, 3).with_zero_outputs(), "[0, 0+1*, 1]"),
    ],
    ids=str,
)
def test_an_operator_gives_its_table(layer_map, written):
    assert str(layer_map) == written
    assert maps.parse(layer_map.num_sources, written.strip("[]").split(", ")) == layer_map


def test_solar_of_32_layers_makes_48_with_eight_cut_from_each_copy():
    assert sources(maps.solar(32, 16)) == [*range(24), *range(8, 32)]


@checked
@given(few, st.data())
def test_first_last_and_middle_are_blocks(num_layers, data):
    length = data.draw(st.integers(1, num_layers))
    assert maps.first(num_layers, length) == maps.block(num_layers, start=0, length=length)
    start = num_layers - length
    assert maps.last(num_layers, length) == maps.block(num_layers, start=start, length=length)
    if num_layers % length == 0:
        number = -(-(num_layers // length) // 2) - 1
        expected = maps.block(num_layers, start=number * length, length=length)
        assert maps.middle(num_layers, length) == expected


@checked
@given(few)
def test_growing_to_the_same_depth_changes_nothing(num_layers):
    unchanged = maps.copies(num_layers, range(num_layers))
    assert maps.stack(num_layers, num_layers) == unchanged
    assert maps.interpose(num_layers, num_layers) == unchanged
    assert unchanged.is_identity
    assert not any(unchanged.is_new)


@checked
@given(few, st.integers(1, 3), st.integers(1, 3))
def test_interpose_of_interpose_is_interpose(num_layers, once, twice):
    between, final = num_layers * once, num_layers * once * twice
    composed = maps.interpose(num_layers, between).then(maps.interpose(between, final))
    assert composed == maps.interpose(num_layers, final)


@checked
@given(few, st.data())
def test_composition_is_that_of_the_maps(num_layers, data):
    between, final = (data.draw(st.lists(st.integers(0, 50), min_size=1)) for _ in range(2))
    lower = maps.copies(num_layers, [i % num_layers for i in between])
    upper = maps.copies(len(between), [i % len(between) for i in final])
    expected = [sources(lower)[i] for i in sources(upper)]
    assert sources(lower.then(upper)) == expected


@checked
@given(few, few)
def test_uniform_widths_make_the_largest_fitting_map_interpose(num_layers, more):
    final = num_layers + more
    fitting = maps.largest_fitting(num_layers, final, lambda source, target: True)
    assert fitting == maps.interpose(num_layers, final)


def test_composition_keeps_zero_outputs_means_and_fresh_layers():
    lower = maps.parse(2, [0, "1*", "new", "0+1"])
    upper = maps.parse(4, [0, 1, 2, 3, "0*", "0+0"])
    assert str(lower.then(upper)) == "[0, 1*, new, 0+1, 0*, 0+0]"
    with pytest.raises(ConfigError, match=r"0\+3 is a mean of 0 and 0\+1, .* grow in two steps"):
        lower.then(maps.parse(4, ["0+3"]))


def schedule(num_layers: int) -> list[tuple[int, int]]:
    widths = layerwise_schedule(
        num_layers=num_layers, hidden_size=1280, head_dim=64, gqa_group_size=4
    )
    return list(zip(widths.ffn_dims, widths.num_query_heads, strict=True))


@pytest.mark.parametrize(
    ("num_layers", "expected", "stack_shrinks", "interpose_shrinks"),
    [
        (
            32,
            "0 0 1 1 2 2 3 3 4 4 4 5 5 6 6 7 8 8 9 9 10 10 11 11 11 12 12 13 13 14 14 15",
            15,
            7,
        ),
        (24, "0 0 1 2 2 3 4 4 5 5 6 7 8 8 9 10 10 11 11 12 13 14 14 15", 15, 2),
    ],
)
def test_the_largest_fitting_map_of_layerwise_widths(
    num_layers, expected, stack_shrinks, interpose_shrinks
):
    small, large = schedule(16), schedule(num_layers)

    def fits(source: int, target: int) -> bool:
        return all(a <= b for a, b in zip(small[source], large[target], strict=True))

    def shrinking(layer_map: LayerMap) -> int:
        return sum(not fits(s, t) for t, s in enumerate(sources(layer_map)))

    fitting = maps.largest_fitting(16, num_layers, fits)
    assert " ".join(map(str, sources(fitting))) == expected
    assert shrinking(fitting) == 0
    assert fitting.unused == ()
    # The other operators would have to shrink layers.
    assert shrinking(maps.stack(16, num_layers)) == stack_shrinks
    assert shrinking(maps.interpose(16, num_layers)) == interpose_shrinks


@pytest.mark.parametrize(
    ("written", "is_identity"),
    [
        ([0, 1, 2], True),
        ([0, "0*", 1, "new*", 2, "1+2*"], True),
        ([0, 1, 2, "0*", "1*", "2*"], True),
        ([0, 1, 2, 2], False),
        ([0, 1, "2*"], False),
        (["0*", 0, 1, 2], True),
        ([1, 0, 2], False),
        ([0, 1, "new", 2], False),
    ],
    ids=str,
)
def test_a_map_is_the_identity_if_all_that_was_added_adds_zero(written, is_identity):
    assert maps.parse(3, written).is_identity is is_identity


def test_the_second_copy_of_a_source_counts_as_new():
    layer_map = maps.parse(3, [0, 0, "1+2", 1, "new", 2])
    assert layer_map.is_new == (False, True, True, False, True, False)
    assert maps.parse(3, [0, 2, 2]).unused == (1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: maps.parse(2, [0, 2]), "entry 1 is 2, but the source has layers 0 to 1"),
        (lambda: maps.parse(2, ["nwe"]), "'nwe' is no entry; write a layer number"),
        (lambda: maps.parse(2, [-1]), "'-1' is no entry"),
        (lambda: maps.block(4, start=3, length=2), "block of 2 layers from layer 3 ends beyond"),
        (lambda: maps.last(4, 5), "block of 5 layers from layer 0 ends beyond"),
        (lambda: maps.middle(6, 4), "middle block of 4 layers needs a source of whole blocks"),
        (lambda: maps.solar(4, 3), "cannot lay two copies of 4 layers over each other by 3"),
        (lambda: maps.solar(4, 6), "cannot lay two copies of 4 layers over each other by 6"),
        (lambda: maps.llama_pro(4, 3), "llama_pro spreads 3 new layers evenly over 4"),
        (
            lambda: maps.largest_fitting(2, 2, lambda source, target: target == 1),
            "no source layer up to 0 fits into target layer 0",
        ),
    ],
)
def test_what_cannot_be_mapped_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
