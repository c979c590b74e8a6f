"""The oracle itself, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from reference import oracle

ROWS = {"buckets": 32, "load": "rows"}
ORDER = {"num_ranks": 2, "scope": "rank", "protect_text": True}


def test_entropy_of_a_uniform_and_of_a_certain_row() -> None:
    entropy = oracle.entropy_score([[3.0] * 8, [0.0, 1000.0], [3.0] * 8], [0, 0, -1])
    assert entropy == [pytest.approx(math.log(8)), 0.0, 0.0]


def test_weight_is_one_deviation_apart() -> None:
    weight = oracle.entropy_weight([1.0, 3.0, 5.0, 0.0], [0, 0, 1, -1], 2, 1.0)
    assert weight == pytest.approx([oracle.sigmoid(1.0), oracle.sigmoid(-1.0), 0.5, 1.0], rel=1e-5)


@pytest.mark.parametrize(
    ("importance", "bucket"),
    [(0.5, 60), (0.74, 61), (0.75, 62), (1.0, 63), (9.0, 63), (2.0**-16, 0), (2.0**-15, 4), (0.0, 0), (math.nan, 0)],
)
def test_four_buckets_an_octave(importance: float, bucket: int) -> None:
    assert oracle.bucket_of(importance, 64) == bucket


@pytest.mark.parametrize(
    ("load", "alpha", "shift"), [(8, 1, 4), (8, 0.5, 2), (6, 1, 2), (4, 1, 0), (1e30, 1, 63), (16, 2.5, 20)]
)
def test_pressure_moves_down_by_octaves(load: float, alpha: float, shift: int) -> None:
    assert oracle.pressure(load, 4.0, alpha, 64) == shift


def test_fixed_rounds_half_to_even() -> None:
    assert [oracle.fixed(w / 256) for w in (0.0, 0.5, 1.5, 2.5, 255.5, 256)] == [1, 1, 2, 2, 256, 256]


def test_a_rank_over_its_bound_gives_up_visual_tokens_first() -> None:
    """Experts 0, 1 on rank 0 have 6 of 8 rows; the bound is 3: both visual rows and a text row go, one to rank 1."""
    ids = [[0], [1], [0], [1], [0], [1], [2], [2]]
    gates = [[0.9], [0.9], [0.5], [0.5], [0.5], [0.5], [0.5], [0.5]]
    segment = [0, 0, -1, -1, -1, -1, -1, 0]
    weight = [1.0] * 8
    logits = [[0.0, -1.0, -3.0, -2.0]] * 8
    histogram = oracle.load_histogram(ids, gates, weight, segment, num_experts=4, importance="gate", **ROWS)
    assert histogram[-4:] == [8, 3, 3 * 256, 8 * 256]
    shift, cut = oracle.clip_threshold(
        histogram, histogram, [0] * 4, gamma=0.75, rho=0.0, alpha=0.0, c_min=0.0, reroute="global", **ORDER, **ROWS
    )
    bucket = oracle.bucket_of(0.9, 32)
    assert (shift, cut) == ([0] * 4, [[32 + 30, 3, 0, 3], [-1, 0, 1, 3]])
    assert bucket == 31
    new_ids, new_gates, counts = oracle.clip_apply(
        ids, gates, weight, segment, logits, shift, cut, importance="gate", reroute="global", reroute_rounds=2,
        scoring="softmax", **ORDER, **ROWS,
    )  # fmt: skip
    assert new_ids == [[3], [-1], [0], [1], [0], [-1], [2], [2]]
    assert new_gates[0] == [pytest.approx(0.9 * math.exp(-2.0))]
    assert new_gates[1] == new_gates[5] == [0.0]
    assert counts == [
        [[0, 2], [0, 1], [1, 1], [0, 0]],
        [[1, 0], [1, 1], [0, 0], [0, 0]],
        [[0, 0], [0, 0], [0, 0], [1, 0]],
    ]


def test_own_share_of_quota_and_room_is_floored() -> None:
    """Two equal ranks share a remainder of 3 and a room of 7."""
    own = [0] * (2 * 2 * 32 + 4)
    own[5], own[32 + 7], own[2 * 32 + 5], own[-4] = 4, 3, 1, 8
    group = [2 * cell for cell in own]
    _, cut = oracle.clip_threshold(
        own, group, [0, 0], gamma=9 / 8, rho=0.0, alpha=0.0, c_min=0.0, reroute="global", **ORDER, **ROWS
    )
    assert cut == [[5, 1, 0, 9], [-1, 0, 3, 9]]
