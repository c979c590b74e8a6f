"""Plans with replicas, through the product: every number is the oracle's, in one call, in two and by operators."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

from reference import cases, replica_cases
from reference.replica_cases import ReplicaGroup
from reference.replica_oracle import Placement
from reference.replica_oracle import plan as oracle_plan
from sglang_macs.config import MacsConfig
from sglang_macs.errors import MacsError
from sglang_macs.ops import replica_balance
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan, PlanResult
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.replicas import exchanged, plans


def run(group: ReplicaGroup, config: MacsConfig, call: str = "__call__") -> list[PlanResult]:
    """Every rank's plan, the sum of the exchange given."""
    of_rank = plans(group, config)
    _, total = exchanged(group, of_rank)
    pairs = zip(of_rank, group.group.batches, strict=True)
    return [getattr(plan, call)(b.routed, lambda tensor: tensor.copy_(total)) for plan, b in pairs]


def assert_same(got: PlanResult, want: PlanResult) -> None:
    for name, mine, theirs in zip(got._fields, got, want, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_the_group_s_plan_is_the_oracle_s(group: ReplicaGroup, config: MacsConfig) -> None:
    of_rank = plans(group, config)
    weights, _ = exchanged(group, of_rank)
    placement = Placement(*group.placed)
    ranks = group.oracle_inputs(weights)
    wanted = oracle_plan(ranks, config, placement, group.group.modality.tolist(), group.group.scoring)
    for rank, (got, want) in enumerate(zip(run(group, config), wanted, strict=True)):
        assert got.rank_rows[1].tolist() == want.balance.load
        assert got.cut.tolist() == want.cut
        assert got.topk_ids.tolist() == want.topk_ids
        assert got.counts.tolist() == want.counts
        expected = torch.tensor(want.topk_weights, dtype=torch.float32).view(got.topk_weights.shape)
        torch.testing.assert_close(got.topk_weights, expected, rtol=1e-5, atol=0)
        logical = group.logical(group.group.batches[rank].topk_ids), group.logical(got.topk_ids)
        kept = (logical[0] == logical[1]) & (logical[0] >= 0)
        assert torch.equal(got.topk_weights[kept], group.group.batches[rank].topk_weights[kept])


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_quotas_and_limits_are_the_oracle_s(group: ReplicaGroup, config: MacsConfig) -> None:
    of_rank = plans(group, config)
    weights, total = exchanged(group, of_rank)
    placement, modality = Placement(*group.placed), group.group.modality
    ranks = group.oracle_inputs(weights)
    wanted = oracle_plan(ranks, config, placement, modality.tolist(), group.group.scoring)
    for plan, b, w, want in zip(of_rank, group.group.batches, weights, wanted, strict=True):
        own = plan.histogram(b.topk_ids, b.topk_weights, w, b.segment)
        got = replica_balance(own, total, modality, plan.policy, plan.places.table(own.device))
        shift, quota, load, limits = (part.tolist() for part in got)
        balance, places = want.balance, [part for of_expert in want.balance.quota for part in of_expert]
        assert (shift, load, limits) == (balance.shift, balance.load, balance.limits)
        assert quota == places + [0] * (len(quota) - len(places))


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_whole_plans_give_the_operators_bits(group: ReplicaGroup, config: MacsConfig) -> None:
    for whole, apart in zip(run(group, config), run(group, config, "_by_operators"), strict=True):
        assert_same(whole, apart)
    alone = plans(group, config)[0]
    tokens = group.group.batches[0].routed
    assert_same(alone(tokens), alone._by_operators(tokens, None))


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs())
def test_nothing_depends_on_the_replica_that_was_routed_to(group: ReplicaGroup, config: MacsConfig) -> None:
    gen = cases.generator(2)
    batches = [
        replica_cases.with_copies(replace(b, topk_ids=group.logical(b.topk_ids)), group.physical_to_logical, gen)
        for b in group.group.batches
    ]
    other = replace(group, group=replace(group.group, batches=batches))
    for one, two in zip(run(group, config), run(other, config), strict=True):
        assert torch.equal(one.topk_ids, two.topk_ids) and torch.equal(one.topk_weights, two.topk_weights)
        assert torch.equal(one.counts[:3], two.counts[:3]) and torch.equal(one.rank_rows[1], two.rank_rows[1])


@cases.PROPERTY
@given(replica_cases.groups(redundant=False), replica_cases.configs())
def test_linear_tables_give_the_bits_of_none(group: ReplicaGroup, config: MacsConfig) -> None:
    linear = list(range(group.group.num_experts))
    batches = [replace(b, topk_ids=group.logical(b.topk_ids)) for b in group.group.batches]
    group = replace(group, group=replace(group.group, batches=batches), physical_to_logical=linear)
    none = Plan(config, group.group.num_experts, group.group.num_ranks, group.group.modality, group.group.routing)
    _, total = exchanged(group, plans(group, config))
    for got, b in zip(run(group, config), batches, strict=True):
        want = none(b.routed, lambda tensor: tensor.copy_(total[: none.histogram_size]))
        assert torch.equal(got.topk_ids, want.topk_ids) and torch.equal(got.counts[:3], want.counts)
        assert torch.equal(got.topk_weights, want.topk_weights) and torch.equal(got.group, want.group)
        assert torch.equal(got.cut[:, 3], want.cut[:, 3]) and not got.counts[3].any()


@cases.PROPERTY
@given(replica_cases.groups(), replica_cases.configs(gamma=math.inf))
def test_at_infinite_gamma_a_plan_balances_and_loses_nothing(group: ReplicaGroup, config: MacsConfig) -> None:
    results = run(group, config)
    routed, balanced = results[0].rank_rows
    assert int(routed.sum()) == int(balanced.sum())
    sent = torch.zeros_like(balanced)
    for got, b in zip(results, group.group.batches, strict=True):
        assert torch.equal(group.logical(got.topk_ids), group.logical(b.topk_ids))
        assert torch.equal(got.topk_weights, b.topk_weights) and not got.counts[1:3].any()
        moved = (got.topk_ids != b.topk_ids).sum()
        assert got.counts[3].sum() == moved and got.counts[0].sum() == (b.topk_ids >= 0).sum()
        ranks = got.topk_ids[got.topk_ids >= 0] // (len(group.physical_to_logical) // len(balanced))
        sent += torch.bincount(ranks, minlength=len(balanced)).int()
    assert torch.equal(sent, balanced)


def test_a_candidate_s_place_is_on_the_lowest_rank_among_equals() -> None:
    """Expert 0 is on rank 0, which is over its bound; expert 1, the second choice, on ranks 1 and 2, both idle."""
    mapped = [0, 2, 1, 3, 1, 4]
    logits = torch.tensor([[3.0, 2.0, -9.0, -9.0, -9.0]]).repeat(6, 1)
    batch = torch.zeros(6, 4), torch.zeros((6, 1), dtype=torch.int64), torch.ones(6, 1), logits
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.5), 5, 3, places=Places(5, 6, 3, 0, mapped))
    result = plan(RoutedTokens(*batch, torch.zeros(6, dtype=torch.int32), 1))
    assert result.cut[:, 2:].tolist() == [[0, 3], [3, 3], [3, 3]]
    assert result.topk_ids.flatten().tolist() == [0, 0, 0, 2, 2, 2] and result.counts[2, 1, 0] == 3


def test_twenty_plans_have_the_same_bits() -> None:
    mapped = [0, 1, 2, 3, 4, 5, 0, 0, 3, 1, 1, 2]
    gen = cases.generator(3)
    shape = {"num_tokens": 64, "num_experts": 6, "top_k": 3, "num_ranks": 2, "imbalance": 1.3}
    batches = [replica_cases.with_copies(cases.batch(gen, **shape), mapped, gen) for _ in range(4)]
    group = ReplicaGroup(cases.Group(batches, 6, 4, torch.zeros(6, dtype=torch.int8)), mapped)
    config = MacsConfig.from_preset("rank", gamma=1.0)
    first = run(group, config)
    for _ in range(20):
        for got, want in zip(run(group, config), first, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("tokens", [24, 0])
def test_opcheck(tokens: int) -> None:
    """And so that Meta kernels have the real shapes."""
    plan = Plan(MacsConfig(), 3, 2, places=Places(3, 4, 2, 1, [0, 1, 2, 0]))
    table, g = plan.places.table(torch.device("cpu")), cases.generator(4)
    ids = torch.rand(tokens, 4, generator=g).topk(2).indices
    routed = ids, torch.rand(tokens, 2, generator=g), torch.rand(tokens, generator=g), torch.zeros(tokens).int()
    check, ops = torch.library.opcheck, torch.ops.sglang_macs
    own, modality = plan.histogram(*routed), torch.zeros(3, dtype=torch.int8)
    check(ops.load_histogram, (*routed, plan.policy, table))
    check(ops.replica_balance, (own, own, modality, plan.policy, table))
    shift, quota, _, limits = replica_balance(own, own, modality, plan.policy, table)
    check(ops.replica_choose, (*routed, own, shift, quota, limits, plan.policy, table))
    chosen, cut = ops.replica_choose(*routed, own, shift, quota, limits, plan.policy, table)
    check(ops.clip_apply, (*routed, torch.rand(tokens, 3), shift, cut, plan.policy, table, chosen))


def test_tables_are_refreshed_in_place() -> None:
    places = Places(3, 6, 2, 1, [0, 1, 2, 0, 1, 2])
    table, before, ranks = places.table(torch.device("cpu")), places.logical, places.on_ranks
    assert ranks.all()
    places.refresh(torch.tensor([0, 0, 2, 1, 1, 1]))
    fresh = Places(3, 6, 2, 1, [0, 0, 2, 1, 1, 1]).table(torch.device("cpu"))
    assert places.table(torch.device("cpu")) is table and torch.equal(table, fresh)
    assert before.tolist() == [0, 1, 2, 0, 1, 2, -1] and ranks.all(), "what counts late has kept these"
    assert places.on_ranks.tolist() == [[True, False], [False, True], [True, False]]


def test_places_are_on_the_host_whatever_the_default_device_is() -> None:
    """SGLang builds models with their GPU as the default, and moves experts without one."""
    with torch.device("meta"):
        places = Places(4, 6, 2, 0, [0, 1, 2, 3, 0, 1])
        for given in ([0, 1, 2, 3, 0, 1], [2, 3, 1, 0, 2, 3]):
            places.refresh(given)
            kept = (places.logical, places.first, places.on_ranks, places.table(torch.device("cpu")))
            assert {x.device.type for x in kept} == {"cpu"}


def test_tables_of_a_placement_worked_out_by_hand() -> None:
    """Expert 0 on all ranks, twice on rank 0; expert 1 on ranks 0 and 2; expert 3 on 1 and 2; expert 2 on rank 1."""
    table = Places(4, 9, 3, 2, [0, 1, 0, 3, 0, 2, 0, 1, 3]).table(torch.device("cpu")).tolist()
    assert table == [
        *(2, 3, 3),
        *(0, 1, 0, 3, 0, 2, 0, 1, 3),
        *(0, 3, 5, 6, 8),
        *(0, 1, 2, 0, 2, 1, 1, 2, 0),
        *(0, 4, 6, 1, 7, 5, 3, 8, 0),
        *(0, 1, -1, 2),
        *(1, 2, 3, 0, 0),
        *(0, 1, 3, 0, 0),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((3, 7, 2, 0, [0] * 7), "7 copies of 3 experts on 2 ranks"),
        ((4, 2, 2, 0, [0, 1]), "2 copies of 4 experts"),
        ((3, 4, 2, 0, [0, 1, 1, 0]), "none of expert 2"),
        ((3, 4, 2, 0, [0, 1, 2]), r"numbers of shape \(3,\)"),
        ((3, 4, 2, 0, [0, 1, 2, 3]), "got expert 3"),
        ((3, 4, 2, 0, [0, 1, 2, -1]), "got expert -1"),
    ],
)
def test_a_placement_that_is_none_is_refused(given: tuple[Any, ...], words: str) -> None:
    with pytest.raises(MacsError, match=words):
        Places(*given)


@pytest.mark.parametrize("option", [{"scope": "expert"}, {"load": "effective"}, {"exchange": "local"},
                                    {"reroute": "local"}])  # fmt: skip
def test_options_that_replicas_do_not_go_with_are_refused(option: dict[str, str]) -> None:
    config = MacsConfig.from_preset("rank", **option)
    with pytest.raises(MacsError, match=f"replicas: got --macs-{next(iter(option))}"):
        Plan(config, 3, 2, places=Places(3, 4, 2, 0, [0, 1, 2, 0]))


def test_tables_that_do_not_fit_the_layer_are_refused() -> None:
    places = Places(3, 4, 2, 0, [0, 1, 2, 0])
    plan = Plan(MacsConfig(), 3, 2, places=places)
    routing = torch.zeros((2, 1), dtype=torch.int64), torch.ones(2, 1), torch.ones(2)
    batch = (*routing, torch.zeros(2, dtype=torch.int32))
    for table, words in ((torch.zeros(23, dtype=torch.int32), "places: got 23"),
                         (torch.zeros(14, dtype=torch.int32), "places: got 2 physical"),
                         (places.table(torch.device("cpu")).long(), "places: got dtype")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            torch.ops.sglang_macs.load_histogram(*batch, plan.policy, table)


def test_an_id_behind_the_last_copy_is_refused_on_a_cpu() -> None:
    plan = Plan(MacsConfig(), 3, 2, places=Places(3, 4, 2, 0, [0, 1, 2, 0]))
    ids, ones = torch.full((2, 1), 4), torch.ones(2, 1)
    with pytest.raises(ValueError, match="topk_ids: got expert 4"):
        plan.histogram(ids, ones, ones[:, 0], torch.zeros(2, dtype=torch.int32))
