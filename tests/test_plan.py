"""What a plan promises, through the product: properties over any group of ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import cases, oracle
from reference.replica_cases import oracle_input
from sglang_macs.config import MacsConfig
from tests.support.plans import PRESETS, Outcome, configs, is_identity, make_plan, run, same_bits


def bound_of(ids: torch.Tensor, cut: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Number of the bound that each expert counts towards; -1 for an empty slot."""
    return torch.where(ids >= 0, ids * len(cut) // num_experts, -1)


def units_of(o: Outcome, config: MacsConfig) -> torch.Tensor:
    """Units [T, K] that an assignment of each token counts."""
    per_token = [oracle.fixed(w) if config.load == "effective" else 1 for w in o.weight.tolist()]
    return torch.tensor(per_token, dtype=torch.int64)[:, None].expand_as(o.ids)


def units_per_bound(outcomes: list[Outcome], config: MacsConfig, num_experts: int) -> list[int]:
    """What every bound receives from the whole group after the plan."""
    units = torch.zeros(len(outcomes[0].cut), dtype=torch.int64)
    for o in outcomes:
        there = o.ids >= 0
        units.index_add_(0, bound_of(o.ids, o.cut, num_experts)[there], units_of(o, config)[there])
    return units.tolist()


def test_the_properties_below_are_not_vacuous() -> None:
    """Of the groups and settings drawn, a fair part cuts, moves, drops, and gives up text."""
    seen = {"cut": 0, "moved": 0, "dropped": 0, "text": 0, "pressed": 0, "several ranks": 0}

    @cases.PROPERTY
    @given(cases.groups(), configs())
    def look(group: cases.Group, config: MacsConfig) -> None:
        outcomes = run(group, config)
        seen["several ranks"] += len(outcomes) > 1
        seen["cut"] += any((o.cut[:, 0] >= 0).any() for o in outcomes)
        seen["moved"] += any(o.moved.any() for o in outcomes)
        seen["dropped"] += any((o.assigned & (o.ids < 0)).any() for o in outcomes)
        seen["text"] += any((o.assigned & ~o.visual & ~o.kept).any() for o in outcomes)
        seen["pressed"] += any((o.shift > 0).any() for o in outcomes)

    look()
    assert min(seen.values()) >= 6, seen


@cases.PROPERTY
@given(cases.groups(), configs())
def test_no_bound_is_exceeded_over_the_group(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    bounds = outcomes[0].cut[:, 3].tolist()
    rows = sum(int(o.assigned.sum()) for o in outcomes)
    if config.scope == "rank":
        unit = 256 if config.load == "effective" else 1
        assert bounds == [math.floor(config.gamma * rows / group.num_ranks * unit)] * group.num_ranks
    for units, bound in zip(units_per_bound(outcomes, config, group.num_experts), bounds, strict=True):
        assert units <= bound


@cases.PROPERTY
@given(cases.groups(), configs(exchange="local"))
def test_local_shares_keep_the_group_s_bound(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    shares = torch.stack([o.cut[:, 3] for o in outcomes]).sum(0).tolist()
    rows = sum(int(o.assigned.sum()) for o in outcomes)
    unit = 256 if config.load == "effective" else 1
    units = units_per_bound(outcomes, config, group.num_experts)
    assert all(u <= share for u, share in zip(units, shares, strict=True))
    linear = config.scope == "rank" or (config.rho == 0 and config.c_min == 0)
    if linear:  # otherwise each rank's own modality mix and floor make the shares, and their sum is the bound
        assert max(units) <= config.gamma * rows / len(units) * unit * (1 + 1e-12)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_every_slot_is_kept_moved_or_dropped(group: cases.Group, config: MacsConfig) -> None:
    for o in run(group, config):
        assert same_bits(o.weights[o.kept], o.batch.topk_weights[o.kept])
        lost = o.assigned & ~o.kept & ~o.moved
        assert (o.ids[lost] == -1).all()
        assert (o.weights[lost].view(torch.int32) == 0).all()
        assert (o.ids[~o.assigned] == -1).all()
        assert ((o.ids >= -1) & (o.ids < group.num_experts)).all()
        for token in o.ids.tolist():
            chosen = [j for j in token if j >= 0]
            assert len(chosen) == len(set(chosen))


@cases.PROPERTY
@given(cases.groups(), configs())
def test_counts_say_what_happened(group: cases.Group, config: MacsConfig) -> None:
    for o in run(group, config):
        want = torch.zeros_like(o.counts)
        for row, where, ids in (
            (0, o.kept, o.batch.topk_ids),
            (1, o.assigned & ~o.kept, o.batch.topk_ids),
            (2, o.moved, o.ids),
        ):
            for expert, visual in zip(ids[where].tolist(), o.visual[where].tolist(), strict=True):
                want[row, expert, 1 - int(visual)] += 1
        assert torch.equal(o.counts, want)


@cases.PROPERTY
@given(cases.groups(), configs(protect_text=True))
def test_text_stays_while_a_visual_original_does(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    for n in range(len(outcomes[0].cut)):
        on_bound = [bound_of(o.batch.topk_ids, o.cut, group.num_experts) == n for o in outcomes]
        pairs = list(zip(outcomes, on_bound, strict=True))
        if any((on & ~o.visual & ~o.kept).any() for o, on in pairs):
            assert not any((on & o.visual & o.kept).any() for o, on in pairs)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_reroutes_go_where_room_was(group: cases.Group, config: MacsConfig) -> None:
    per_rank = group.num_experts // group.num_ranks
    for o in run(group, config):
        target = bound_of(o.ids, o.cut, group.num_experts)[o.moved]
        assert (o.cut[target, 0] == -1).all()
        received = torch.zeros(len(o.cut), dtype=torch.int64).index_add_(0, target, units_of(o, config)[o.moved])
        assert (received <= o.cut[:, 2]).all()
        assert config.reroute != "none" or not o.moved.any()
        if config.reroute == "local":
            assert torch.equal(o.ids[o.moved] // per_rank, o.batch.topk_ids[o.moved] // per_rank)


@cases.PROPERTY
@given(cases.groups(), configs(reroute="global"))
def test_a_rerouted_weight_is_the_expert_s_own_probability(group: cases.Group, config: MacsConfig) -> None:
    """Scaled as the token's top-k weights were: renormalised or not, any scoring, without the bias of the choice."""
    for o in run(group, config):
        scores = cases.scores(o.batch.router_logits, group.scoring)
        chosen = scores.gather(1, o.batch.topk_ids.clamp(min=0)) * o.assigned
        scale = o.batch.topk_weights.double().sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True)
        want = (scores * scale).gather(1, o.ids.clamp(min=0))
        torch.testing.assert_close(o.weights[o.moved].double(), want[o.moved], rtol=1e-5, atol=0)


@cases.PROPERTY
@given(cases.groups(), st.sampled_from(["expert", "rank"]), st.sampled_from([*PRESETS, "off"]))
def test_infinite_gamma_is_the_identity(group: cases.Group, scope: str, preset: str) -> None:
    for o in run(group, MacsConfig.from_preset(preset, gamma=math.inf, scope=scope)):
        assert is_identity(o)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_where_nothing_is_cut_the_output_is_the_input(group: cases.Group, config: MacsConfig) -> None:
    for o in run(group, replace(config, gamma=float(group.num_experts), rho=0.0)):
        assert (o.cut[:, 0] == -1).all()
        assert is_identity(o)


@cases.PROPERTY
@given(cases.groups(), configs())
def test_the_group_s_plan_is_the_oracle_s(group: cases.Group, config: MacsConfig) -> None:
    outcomes = run(group, config)
    ranks = [oracle_input(group, b, o.weight) for b, o in zip(group.batches, outcomes, strict=True)]
    sizes = {"num_experts": group.num_experts, "num_ranks": group.num_ranks, "modality": group.modality.tolist()}
    wanted = oracle.plan(ranks, config, scoring=group.scoring, **sizes)
    for o, want in zip(outcomes, wanted, strict=True):
        assert o.shift.tolist() == want.shift
        assert o.cut.tolist() == want.cut
        assert o.ids.tolist() == want.topk_ids
        assert o.counts.tolist() == want.counts
        expected = torch.tensor(want.topk_weights, dtype=torch.float32).view(o.weights.shape)
        torch.testing.assert_close(o.weights, expected, rtol=1e-5, atol=0)


@cases.PROPERTY
@given(cases.groups(st.sampled_from([2, 8])), configs())
def test_ranks_with_the_exchange_keep_what_one_rank_would(group: cases.Group, config: MacsConfig) -> None:
    """The same originals above the cut and none below it; at the cut, in rows, at most R - 1 fewer per bound.

    Where assignments weigh up to 256 units, each rank may also stop short of its quota by a part of one.
    """
    outcomes = run(group, config)
    joined = cases.concat(group.batches)
    alone = run(replace(group, batches=[joined]), config, [torch.cat([o.weight for o in outcomes])])[0]
    assert torch.equal(alone.shift, outcomes[0].shift)
    assert torch.equal(alone.cut[:, [0, 3]], outcomes[0].cut[:, [0, 3]])
    kept = torch.cat([o.kept for o in outcomes])
    units, slack = units_of(alone, config), 255 if config.load == "effective" else 0
    level, bound = levels_of(alone, config), bound_of(joined.topk_ids, alone.cut, group.num_experts)
    for n, at in enumerate(alone.cut[:, 0].tolist()):
        there = bound == n
        assert torch.equal(kept[there & (level != at)], alone.kept[there & (level != at)])
        at_cut = there & (level == at)
        fewer = int(units[at_cut & alone.kept].sum() - units[at_cut & kept].sum())
        assert -slack <= fewer <= group.num_ranks - 1 + group.num_ranks * slack


def levels_of(o: Outcome, config: MacsConfig) -> torch.Tensor:
    """Level [T, K] of every assignment, by the oracle; -1 for an empty slot."""
    level = torch.full_like(o.ids, -1)
    inputs = (t.tolist() for t in (o.batch.topk_ids, o.batch.topk_weights, o.weight, o.batch.segment))
    for a in oracle.assignments(*inputs, config.buckets, config.load, config.importance):
        shift = int(o.shift[a.expert])
        level[a.token, a.slot] = oracle.level_of(a.bucket, a.text, shift, config.buckets, config.protect_text)
    return level


@cases.PROPERTY
@given(cases.groups(st.sampled_from([2, 8])), st.sampled_from(["paper", "rank"]))
def test_whole_segments_weigh_the_same_on_any_rank(group: cases.Group, preset: str) -> None:
    """Bit for bit, or R ranks could not agree with one."""
    plan = make_plan(group, MacsConfig.from_preset(preset))
    joined = cases.concat(group.batches)
    alone = plan.weight(joined.hidden_states, joined.segment, joined.num_segments)
    apart = [plan.weight(b.hidden_states, b.segment, b.num_segments) for b in group.batches]
    assert same_bits(alone, torch.cat(apart))
