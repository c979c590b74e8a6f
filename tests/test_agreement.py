"""Ranks that would not decide alike are found in the first pass, on every one of them, instead of waiting for ever."""

import torch.distributed as dist

from sglang_macs.engine.agreement import PASSES, Agreement
from sglang_macs.errors import MacsNotActive
from sglang_macs.plan.batch import Batch
from tests.support.ranks import run_ranks

FLAGS = "--moe-dense-tp-size=1 --enable-dp-lm-head=True"


def _decide(
    rank: int, world: int, decided: list[Batch], tokens: list[int], prefills: tuple[bool, ...] = (True, True)
) -> str:
    try:
        Agreement(dist.group.WORLD, FLAGS).check(decided[rank], tokens[rank], prefills[rank])
    except MacsNotActive as error:
        return str(error)
    return ""


def test_each_rank_says_who_decided_what_and_names_the_flags():
    said = run_ranks(2, _decide, [Batch(skip="", group_tokens=180), Batch(skip="small")], [180, 0])
    for line in said:
        assert (
            "rank 0 plans 180 tokens (180 its own), with a prefill, rank 1 skips as small 0 tokens (0 its own)" in line
            and FLAGS in line
        )


def test_ranks_in_different_modes_of_deepep_are_found():
    """One would send in normal mode, the other in low latency: both would wait for ever."""
    said = run_ranks(2, _decide, [Batch(skip="decode")] * 2, [64, 1], (True, False))
    assert all("rank 0 skips as decode 0 tokens (64 its own), with a prefill" in line for line in said)
    assert all("rank 1 skips as decode 0 tokens (1 its own), without a prefill" in line for line in said)
    assert run_ranks(2, _decide, [Batch(skip="decode")] * 2, [64, 1]) == ["", ""]


def test_ranks_that_count_differently_are_found_though_both_plan():
    assert all(run_ranks(2, _decide, [Batch(skip="", group_tokens=n) for n in (180, 200)], [180, 200]))


def _options(rank: int, world: int) -> str:
    try:
        Agreement(dist.group.WORLD, FLAGS, f"gamma {1.0 + 0.1 * (rank == 2)}").check(Batch(skip=""), 5)
    except MacsNotActive as error:
        return str(error)
    return ""


def test_a_node_with_other_options_ends_all():
    said = run_ranks(3, _options)
    assert said == ["rank 2 has other --macs options, profile or expert locations than rank 0; pass the same"] * 3


def _passes(rank: int, world: int, tokens: list[list[int]]) -> int:
    """How many of the passes were compared."""
    agreement, compared = Agreement(dist.group.WORLD, FLAGS), 0
    for counts in tokens:
        before = agreement._left
        agreement.check(Batch(skip="", group_tokens=sum(counts)), counts[rank])
        compared += before > 0
    return compared


def test_all_ranks_stop_comparing_after_the_same_pass():
    assert run_ranks(3, _passes, [[5, 5, 5], [5, 5, 5], [5, 0, 9], [5, 5, 5]]) == [3] * 3
    assert run_ranks(2, _passes, [[4, 4]] * (PASSES + 3)) == [PASSES] * 2
