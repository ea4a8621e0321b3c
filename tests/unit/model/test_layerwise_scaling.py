"""The widths of the four OpenELM sizes (arXiv 2404.14619), all 100 layers, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from samara.model import layerwise_scaling
from samara.model.layerwise_scaling import layerwise_schedule, make_divisible, multipliers


@dataclass(frozen=True)
class Size:
    hidden_size: int
    head_dim: int
    query_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]


def runs(*pairs: tuple[int, int]) -> tuple[int, ...]:
    """(value, how often) pairs, spelled out."""
    return tuple(value for value, count in pairs for _ in range(count))


SIZES = {
    "270m": Size(
        1280,
        64,
        runs((12, 5), (16, 7), (20, 4)),
        (768, 1024, 1280, 1536, 1792, 2048, 2560, 2816)
        + (3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120),
    ),
    "450m": Size(
        1536,
        64,
        runs((12, 3), (16, 7), (20, 6), (24, 4)),
        (768, 1024, 1280, 1536, 1792, 2304, 2560, 2816, 3072, 3328)
        + (3584, 3840, 4096, 4352, 4608, 5120, 5376, 5632, 5888, 6144),
    ),
    "1.1b": Size(
        2048,
        64,
        runs((16, 3), (20, 7), (24, 8), (28, 6), (32, 4)),
        (1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096, 4608)
        + (4608, 5120, 5376, 5632, 5888, 6144, 6400, 6656, 6912, 7168, 7424, 7680, 7936, 8192),
    ),
    "3b": Size(
        3072,
        128,
        runs((12, 4), (16, 14), (20, 12), (24, 6)),
        (1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 4096, 4352, 4608, 4864)
        + (5120, 5632, 5888, 6144, 6400, 6656, 7168, 7424, 7680, 7936, 8192, 8704)
        + (8960, 9216, 9472, 9728, 10240, 10496, 10752, 11008, 11264, 11776, 12032, 12288),
    ),
}


def schedule(size: Size) -> layerwise_scaling.LayerwiseSchedule:
    return layerwise_schedule(
        num_layers=len(size.ffn_dims),
        hidden_size=size.hidden_size,
        head_dim=size.head_dim,
        gqa_group_size=4,
    )


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_schedule_equals_published_tables(size: Size) -> None:
    widths = schedule(size)
    assert widths.num_query_heads == size.query_heads
    assert widths.num_kv_heads == tuple(heads // 4 for heads in size.query_heads)
    assert widths.ffn_dims == size.ffn_dims


def test_tables_have_a_hundred_rows() -> None:
    assert sum(len(size.ffn_dims) for size in SIZES.values()) == 100


def test_ten_percent_guard_decides_exactly_five_head_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_guard(value: float, divisor: int) -> int:
        return max(divisor, int((value + divisor / 2) // divisor) * divisor)

    guarded = {name: schedule(size) for name, size in SIZES.items()}
    monkeypatch.setattr(layerwise_scaling, "make_divisible", without_guard)
    changed = set()
    for name, size in SIZES.items():
        plain = schedule(size)
        assert plain.ffn_dims == guarded[name].ffn_dims
        changed |= {
            (name, layer)
            for layer, heads in enumerate(plain.num_query_heads)
            if heads != guarded[name].num_query_heads[layer]
        }
    assert changed == {("270m", 5), ("450m", 3), ("1.1b", 3), ("3b", 4), ("3b", 5)}


def test_skipping_the_two_decimal_rounding_gives_other_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unrounded(low: float, high: float, num_layers: int) -> tuple[float, ...]:
        return tuple(low + (high - low) * i / (num_layers - 1) for i in range(num_layers))

    monkeypatch.setattr(layerwise_scaling, "multipliers", unrounded)
    wrong_heads, wrong_ffn = set(), set()
    for name, size in SIZES.items():
        widths = schedule(size)
        for layer in range(len(size.ffn_dims)):
            if widths.num_query_heads[layer] != size.query_heads[layer]:
                wrong_heads.add((name, layer))
            if widths.ffn_dims[layer] != size.ffn_dims[layer]:
                wrong_ffn.add((name, layer))
    assert wrong_heads == {("270m", 5), ("1.1b", 3), ("1.1b", 10), ("1.1b", 17), ("3b", 17)}
    assert wrong_ffn == {("1.1b", 13), ("1.1b", 14)}


@pytest.mark.parametrize(
    ("value", "divisor", "expected"),
    [
        (857.6, 256, 1024),  # nearest is 768, but that loses more than 10 %
        (896.0, 256, 1024),  # half way rounds up
        (1.0, 256, 256),  # never below one unit
        (640.0, 256, 768),
        (2048.0, 256, 2048),
    ],
)
def test_make_divisible(value: float, divisor: int, expected: int) -> None:
    assert make_divisible(value, divisor) == expected


def test_multipliers_of_a_single_layer() -> None:
    assert multipliers(0.504, 1.0, 1) == (0.5,)


def test_multipliers_are_two_decimals() -> None:
    assert multipliers(0.5, 1.0, 16)[1:5] == (0.53, 0.57, 0.6, 0.63)
