"""The oracle of plans with replicas: numbers worked out by hand, and what the method promises of any group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from reference import cases, oracle, replica_cases, replica_oracle
from reference.replica_cases import ReplicaGroup
from reference.replica_oracle import Placement, ReplicaOutput
from sglang_macs.config import MacsConfig


def run(group: ReplicaGroup, config: MacsConfig) -> tuple[Placement, list[oracle.RankInput], list[ReplicaOutput]]:
    """The plan of every rank of the group; weights follow the tokens alone."""
    gen = cases.generator(1)
    weights = [torch.rand(len(b.segment), generator=gen) for b in group.group.batches]
    inputs, placement = group.oracle_inputs(weights), Placement(*group.placed)
    modality = group.group.modality.tolist()
    return placement, inputs, replica_oracle.plan(inputs, config, placement, modality, group.group.scoring)


def rows_on_ranks(ids: list[list[list[int]]], placement: Placement) -> list[int]:
    """Rows [R] of the group's physical ids."""
    rows = [0] * placement.num_ranks
    for of_rank in ids:
        for p in (p for row in of_rank for p in row if p >= 0):
            rows[p // placement.width] += 1
    return rows


def test_a_pour_fills_the_lowest_first_and_the_rest_goes_to_the_first_places() -> None:
    assert replica_oracle.pour(5, [10, 3, 4]) == [0, 3, 2]
    assert replica_oracle.pour(0, [2, 1]) == [0, 0]
    assert replica_oracle.pour(12, [10, 3, 4]) == [0, 7, 5]
    assert replica_oracle.pour(14, [10, 3, 4]) == [1, 7, 6]


def test_places_are_the_first_copies_on_each_rank() -> None:
    """Expert 0 twice on rank 0 and once on rank 1; expert 2 on ranks 0 and 1."""
    placement = Placement([0, 0, 2, 1, 2, 0], 3, 2)
    assert (placement.ranks, placement.physical) == ([[0, 1], [1], [0, 1]], [[0, 5], [3], [2, 4]])
    assert (placement.replicated, placement.steps) == ([0, 2], [[0], [2]])


def test_a_second_copy_takes_the_overflow_and_nothing_is_clipped() -> None:
    """Rank 0 holds experts 0 and 1, rank 1 experts 2 and 0: of expert 0's 6 rows 2 stay on rank 0."""
    ids = [[0], [0], [0], [0], [0], [0], [1], [1], [2]]
    one = oracle.RankInput(ids, [[0.5]] * 9, [1.0] * 9, [-1] * 9, None)
    config = MacsConfig.from_preset("rank", gamma=1.2, buckets=32)
    idle = oracle.RankInput([], [], [], [], None)
    first, second = replica_oracle.plan([one, idle], config, Placement([0, 1, 2, 0], 3, 2), [0] * 3)
    assert first.balance.quota == [[3, 3], [2], [1]] and first.balance.load == [5, 4]
    assert [p for (p,) in first.topk_ids] == [3, 0, 3, 0, 3, 0, 1, 1, 2]
    assert first.cut == [[-1, 0, 0, 5], [-1, 0, 0, 5]] and second.topk_ids == []
    assert first.counts[1] == [[0, 0]] * 3 and first.counts[3] == [[0, 3], [0, 0], [0, 0]]


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_the_choice_meets_every_quota(group: ReplicaGroup, config: MacsConfig) -> None:
    placement, inputs, outputs = run(group, config)
    balance = outputs[0].balance
    assert all(o.balance.quota == balance.quota and o.balance.load == balance.load for o in outputs)
    sent = [p for o in outputs for row in o.chosen for p in row if p >= 0]
    routed = [placement.logical[p] for one in inputs for row in one.topk_ids for p in row if p >= 0]
    assert [placement.logical[p] for p in sent] == routed
    for e, (places, quota) in enumerate(zip(placement.physical, balance.quota, strict=True)):
        assert [sent.count(p) for p in places] == quota and sum(quota) == routed.count(e)
    assert rows_on_ranks([o.chosen for o in outputs], placement) == balance.load


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_one_rank_with_all_tokens_chooses_as_the_group_does(group: ReplicaGroup, config: MacsConfig) -> None:
    placement, inputs, outputs = run(group, config)
    joined = oracle.RankInput(
        *([row for one in inputs for row in getattr(one, name)] for name in
          ("topk_ids", "topk_weights", "weight", "segment", "router_logits"))
    )  # fmt: skip
    idle = [oracle.RankInput([], [], [], [], [])] * (placement.num_ranks - 1)
    alone = replica_oracle.plan([joined, *idle], config, placement, group.group.modality.tolist())[0]
    assert alone.balance.quota == outputs[0].balance.quota
    assert alone.chosen == [row for o in outputs for row in o.chosen]


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_balance_is_never_worse_than_an_even_split(group: ReplicaGroup, config: MacsConfig) -> None:
    """Whatever the bound: rows over it."""
    placement, _, outputs = run(group, config)
    balance = outputs[0].balance
    even = [0] * placement.num_ranks
    for ranks, quota in zip(placement.ranks, balance.quota, strict=True):
        for r, part in zip(ranks, replica_oracle.even_split(sum(quota), len(ranks)), strict=True):
            even[r] += part
    for bound in range(max(even) + 1):
        over, over_even = (sum(max(0, n - bound) for n in load) for load in (balance.load, even))
        assert over <= over_even


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_bounds_hold_and_only_the_overflow_is_clipped(group: ReplicaGroup, config: MacsConfig) -> None:
    """To R - 1 rows for each exceeded rank, as without replicas."""
    placement, _, outputs = run(group, config)
    load, bound = outputs[0].balance.load, outputs[0].cut[0][3]
    assert max(rows_on_ranks([o.topk_ids for o in outputs], placement)) <= bound
    over = sum(max(0, n - bound) for n in load)
    clipped = sum(n for o in outputs for pair in o.counts[1] for n in pair)
    assert over <= clipped <= over + (placement.num_ranks - 1) * sum(n > bound for n in load)


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs(protect_text=True))
def test_text_is_last_on_every_rank_of_the_group(group: ReplicaGroup, config: MacsConfig) -> None:
    placement, inputs, outputs = run(group, config)
    clipped_text, kept_visual = set(), set()
    for one, o in zip(inputs, outputs, strict=True):
        logical = placement.unmap(one.topk_ids)
        for t, segment in enumerate(one.segment):
            for chosen, sent, e in zip(o.chosen[t], o.topk_ids[t], logical[t], strict=True):
                kept = sent >= 0 and placement.logical[sent] == e
                if e >= 0 and segment < 0 and not kept:
                    clipped_text.add(chosen // placement.width)
                if e >= 0 and segment >= 0 and kept:
                    kept_visual.add(chosen // placement.width)
    assert not clipped_text & kept_visual


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_no_expert_twice_for_a_token(group: ReplicaGroup, config: MacsConfig) -> None:
    placement, _, outputs = run(group, config)
    for row in (row for o in outputs for row in placement.unmap(o.topk_ids)):
        chosen = [e for e in row if e >= 0]
        assert len(chosen) == len(set(chosen))


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs(gamma=math.inf))
def test_at_infinite_gamma_only_replicas_change(group: ReplicaGroup, config: MacsConfig) -> None:
    placement, inputs, outputs = run(group, config)
    for one, o in zip(inputs, outputs, strict=True):
        assert placement.unmap(o.topk_ids) == placement.unmap(one.topk_ids)
        assert o.topk_weights == one.topk_weights and not any(map(any, o.counts[1] + o.counts[2]))


@cases.PROPERTY
@given(replica_cases.groups(redundant=False), replica_cases.configs())
def test_without_replicas_it_is_the_plan_without(group: ReplicaGroup, config: MacsConfig) -> None:
    group = replace(group, physical_to_logical=list(range(group.group.num_experts)))
    _, inputs, outputs = run(group, config)
    sizes = {"num_experts": group.group.num_experts, "num_ranks": group.group.num_ranks}
    wanted = oracle.plan(
        inputs, config, modality=group.group.modality.tolist(), scoring=group.group.scoring, **sizes
    )  # fmt: skip
    for o, want in zip(outputs, wanted, strict=True):
        assert (o.topk_ids, o.topk_weights, o.shift) == (want.topk_ids, want.topk_weights, want.shift)
        assert o.counts[:3] == want.counts and [c[2:] for c in o.cut] == [c[2:] for c in want.cut]


@pytest.mark.parametrize("which", [0, 1, -1])
def test_whichever_replica_was_routed_to_the_same_is_chosen(which: int) -> None:
    placement = Placement([0, 1, 2, 0, 1, 0], 3, 2)
    copies = [[0, 3, 5], [1, 4], [2]]
    ids = [[copies[e][which % len(copies[e])] for e in row] for row in ([0, 1], [0, 2], [1, 0])]
    one = oracle.RankInput(ids, [[0.6, 0.4]] * 3, [1.0] * 3, [-1, 0, 0], [[0.0] * 3] * 3)
    config = MacsConfig.from_preset("rank", gamma=1.0)
    idle = oracle.RankInput([], [], [], [], [])
    first = replica_oracle.plan([one, idle], config, placement, [0] * 3)[0]
    assert first.chosen == [[3, 4], [3, 2], [1, 0]]
