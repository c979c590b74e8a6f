"""Replicas between real processes: rows arrive at the copy that the plan chose, also after experts have moved."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.acting import Acting
from sglang_macs.dispatch.cpu import MacsDispatcher
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import replicas, scheduler, worker
from sglang_macs.errors import MacsError
from sglang_macs.observe import report, trace
from sglang_macs.observe.recorder import Place, Recorder
from sglang_macs.observe.stats import CLIPPED_TEXT, KEPT_VISUAL, Recount, Stats, recount, rows_of
from sglang_macs.plan import batch
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.experts import EXPERTS, dense, expert_output, tokens
from tests.support.ranks import run_ranks

COUNTS = [60, 0, 40, 25]  # one rank is idle
FIRST = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 0]
LATER = [0, 8, 3, 10, 1, 9, 4, 11, 2, 6, 5, 0, 7, 1, 2, 0]
CASES = {"balance": {"gamma": float("inf")}, "clip": {"gamma": 0.9}, "keep": {"gamma": 0.9, "reroute": "none"}}


def routed(rank: int, seed: int, placement: list[int]) -> tuple[torch.Tensor, ...]:
    """Tokens of this rank, to the first copy of every expert, and their logical ids."""
    hidden, logical, weights, logits = tokens(rank, COUNTS[rank], seed)
    first = torch.tensor([placement.index(expert) for expert in range(EXPERTS)])
    return hidden, torch.where(logical < 0, -1, first[logical.clamp(min=0)]), weights, logits, logical


def dispatched(planner: LayerPlanner, rank: int, seed: int, placement: list[int]) -> dict[str, Any]:
    with planner.recorder.forward_pass([], 0):
        return in_pass(planner, rank, seed, placement)


def in_pass(planner: LayerPlanner, rank: int, seed: int, placement: list[int]) -> dict[str, Any]:
    hidden, ids, weights, logits, logical = routed(rank, seed, placement)
    segment = torch.where(torch.arange(COUNTS[rank]) % 4 < 3, 0, -1).int()
    dispatcher = MacsDispatcher(planner)
    now = planner.acting.decide(batch.Batch(segment, 1, "", group_tokens=sum(COUNTS), measured=True))
    with batch.forward(now):
        received, local = dispatcher.dispatch(hidden, ids, weights, logits)
    planner.acting.end_pass()
    local_experts = torch.tensor(placement)[rank * 4 : (rank + 1) * 4]
    out = dispatcher.combine(expert_output(received, local_experts[local]))
    return {"out": out, "dense": dense(hidden, logical, weights), "rows": len(received), "gain": now.gain}


def _serve(rank: int, world: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, options in CASES.items():
        config = MacsConfig.from_preset("rank", **options, verify=True, trace=f"{folder}/{name}")
        counters, record = Stats(), Recorder(config, Place(rank), "run")
        places = None if name == "keep" else Places(EXPERTS, len(FIRST), world, rank, FIRST)
        plan = Plan(config, len(FIRST) if places is None else EXPERTS, world, places=places)
        planner = LayerPlanner(0, plan, dist.group.WORLD, counters, recorder=record, acting=Acting())
        planner.acting.rows_that_pay = 1
        before = [dispatched(planner, rank, seed, FIRST) for seed in range(3)]
        if places is not None:
            places.refresh(LATER)
        after = [dispatched(planner, rank, seed, LATER) for seed in range(3)]
        assignments = sum(int((routed(rank, seed, FIRST)[1] >= 0).sum()) for seed in range(3))
        results[name] = {"dispatches": before + after, "stats": counters.snapshot(), "assignments": assignments}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the ranks record."""
    return str(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def served(folder: str) -> list[dict[str, Any]]:
    return run_ranks(4, _serve, folder)


def test_balanced_rows_give_what_unmoved_ones_do(served):
    """Nothing is clipped, and the fullest rank is nearly the mean, before and after experts have moved."""
    for rank in served:
        for one in rank["balance"]["dispatches"]:
            torch.testing.assert_close(one["out"], one["dense"], rtol=1e-6, atol=1e-5)
    for i in range(6):
        rows = [rank["balance"]["dispatches"][i]["rows"] for rank in served]
        if i < 3:  # experts 0 to 3 lie on ranks 0 and 3 alone
            assert abs(rows[0] - rows[3]) <= 1, rows
        else:
            assert max(rows) <= 1.05 * sum(rows) / 4, rows
    for rank in served:
        stats = rank["balance"]["stats"]
        assert stats["own"]["clipped_visual"] == stats["own"]["clipped_text"] == 0
        layer = stats["layers"]["0"]
        assert layer["max_over_mean_before"] > 1.3 * layer["max_over_mean_after"]
    assert sum(rank["balance"]["stats"]["own"]["moved_visual"] for rank in served) > 0


@pytest.mark.parametrize("name", ["clip", "keep"])
def test_bounds_hold_and_text_is_last_where_rows_arrive(served, name):
    stats = [rank[name]["stats"] for rank in served]
    total = sum(rank[name]["assignments"] for rank in served)
    for one in stats:
        assert one["checks"] == {"bound": 6, "text_last": 6} and not sum(one["violations"].values())
    for i in range(6):
        rows = [rank[name]["dispatches"][i]["rows"] for rank in served]
        assert 0 < max(rows) <= 0.9 * total / 3 / 4 + 1
    assert sum(one["own"]["clipped_visual"] for one in stats) > 0


def test_replicas_clip_less_than_keeping_what_was_routed(served):
    clipped = {
        name: sum(rank[name]["stats"]["own"][f"clipped_{m}"] for rank in served for m in ("visual", "text"))
        for name in ("clip", "keep")
    }
    assert clipped["clip"] < 0.6 * clipped["keep"]


def test_all_ranks_expect_the_same_gain_of_replicas(served):
    """Rows off the most loaded rank, of which no rank has all."""
    for i in range(6):
        gains = [rank["clip"]["dispatches"][i]["gain"] for rank in served]
        assert all(gain == gains[0] for gain in gains)
    assert served[1]["clip"]["dispatches"][-1]["gain"][0] > 20


@pytest.mark.parametrize("name", CASES)
def test_a_trace_has_the_counters_rows_and_outcomes(served, folder, name):
    read = trace.load(f"{folder}/{name}")
    layer = served[0][name]["stats"]["layers"]["0"]
    for rows, stage in zip(read.rank_rows(), ("before", "after"), strict=True):
        assert rows[:, 0].sum(axis=0).tolist() == layer[f"rows_{stage}"]
    outcomes = sum(step.outcomes for step in read.steps)[0]
    for i, modality in enumerate(("visual", "text")):
        own = [rank[name]["stats"]["own"] for rank in served]
        assert outcomes[trace.CLIPPED, i] == sum(one[f"clipped_{modality}"] for one in own)
        assert outcomes[:2, i].sum() == sum(one[f"assignments_{modality}"] for one in own)
    assert len(read.steps) == 6 and not read.pictures
    assert report.page(read)


def test_a_trace_whose_rows_are_not_those_of_its_counts_is_none(served, folder, tmp_path):
    for path in Path(folder, "balance").iterdir():
        lines = path.read_text().splitlines()
        spoilt = json.loads(lines[1])
        if spoilt["counts"]:
            spoilt["rows"] = json.loads(lines[2])["rows"]
        (tmp_path / path.name).write_text("\n".join([lines[0], json.dumps(spoilt)]) + "\n")
    with pytest.raises(MacsError, match="rows of ranks that are not those of experts"):
        trace.load(str(tmp_path))


def test_a_text_row_may_go_where_one_of_its_ranks_keeps_no_visual_row():
    """Expert 0 is on both ranks, expert 1 on rank 0 alone; visual rows stay on rank 0."""
    places = Places(2, 4, 2, 0, [0, 1, 0, 0])
    segment, ids = torch.tensor([-1, 0], dtype=torch.int32), torch.tensor([[0], [1]])
    config = MacsConfig.from_preset("rank", gamma=1.0, verify=True)
    cut = torch.tensor([[3, 1, 0, 9]] * 2, dtype=torch.int32)
    for text_expert, violated in ((0, 0), (1, 1)):
        counters, routed_ids = Stats(), ids.clone()
        routed_ids[0, 0] = text_expert
        sent = torch.tensor([[-1], [1]])
        own = recount(4, routed_ids, sent, None, segment, None, places.logical)
        assert own[CLIPPED_TEXT, text_expert] == 1 and own[KEPT_VISUAL, 1] == 1
        counters.add_recount(Recount(config, 0, 2, own, own, cut, False, places.on_ranks))
        assert counters.snapshot()["violations"] == {"bound": 0, "text_last": violated}


def test_a_row_at_another_replica_is_not_clipped():
    places = Places(2, 4, 2, 0, [0, 1, 0, 0])
    segment, ids = torch.tensor([-1, 0], dtype=torch.int32), torch.tensor([[0], [0]])
    own = recount(4, ids, torch.tensor([[2], [2]]), None, segment, None, places.logical)
    assert own.tolist() == [[2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 512, 0]]


def test_an_update_of_expert_locations_refreshes_the_layers_that_it_names(monkeypatch):
    """Of those that are planned with replicas."""
    planners = {
        i: SimpleNamespace(plan=Plan(MacsConfig(), 2, 2, places=Places(2, 4, 2, 0, [0, 1, 0, 1]))) for i in range(3)
    }
    planners[2] = SimpleNamespace(plan=Plan(MacsConfig(), 4, 2))
    monkeypatch.setattr(replicas.worker, "current", lambda: SimpleNamespace(planners=planners))
    metadata = SimpleNamespace(physical_to_logical_map_cpu=torch.tensor([[0, 0, 1, 1]] * 4))
    replicas._expert_location_update(None, metadata, None, [1, 2, 3])
    assert [planners[i].plan.places.logical.tolist() for i in (0, 1)] == [[0, 1, 0, 1, -1], [0, 0, 1, 1, -1]]


@pytest.mark.parametrize("placement", [None, FIRST, LATER], ids=["linear", "first", "later"])
def test_a_recorder_behind_the_dispatch_counts_what_was_routed(monkeypatch, placement):
    """Arrived rows of each copy, and what every rank's tokens have lost: together what the router asked for."""
    config, world = MacsConfig.from_preset("rank", gamma=0.5), 4
    mapped = list(range(EXPERTS)) if placement is None else placement
    plans = [
        Plan(config, EXPERTS, world, places=placement and Places(EXPERTS, len(mapped), world, rank, mapped))
        for rank in range(world)
    ]
    batches, exchanged = [], []
    for rank, plan in enumerate(plans):
        hidden, ids, weights, logits, _ = routed(rank, 5, mapped)
        segment = torch.where(torch.arange(COUNTS[rank]) % 4 < 3, 0, -1).int()
        batches.append(RoutedTokens(hidden, ids, weights, logits, segment, 1))
        plan(batches[-1], lambda own: exchanged.append(own.clone()))
    group = torch.stack(exchanged).sum(0, dtype=torch.int32)
    results = [plan(tokens, lambda own: own.copy_(group)) for plan, tokens in zip(plans, batches, strict=True)]
    arrived = sum(rows_of(result.topk_ids, len(mapped)) for result in results)
    asked_for = sum(rows_of(tokens.topk_ids, len(mapped)) for tokens in batches)
    assert arrived.sum() < 0.7 * asked_for.sum()

    recorded = torch.zeros(3, len(mapped), dtype=torch.int32)
    for rank, (plan, result) in enumerate(zip(plans, results, strict=True)):
        process = worker.Worker(config)
        process.planners[1] = SimpleNamespace(plan=plan)
        process.given_up.add(1, result)
        monkeypatch.setattr(replicas.worker, "current", lambda process=process: process)
        own = torch.zeros_like(recorded)
        local = slice(rank * len(mapped) // world, (rank + 1) * len(mapped) // world)
        own[1, local] = arrived[local].int()
        recorded += replicas._collect(lambda self, own=own: {"global_physical_count": own}, None)[
            "global_physical_count"
        ]
        assert not process.given_up.take(), "of one pass alone"
    of_logical = torch.tensor(mapped)
    for counts, want in ((recorded[1], asked_for), (recorded[0], torch.zeros_like(asked_for))):
        logical = [torch.zeros(EXPERTS, dtype=torch.int64).index_add_(0, of_logical, x.long()) for x in (counts, want)]
        assert torch.equal(*logical)


@pytest.mark.parametrize(("act", "replicas", "rows"), [("auto", True, 8), ("always", True, 0), ("auto", False, 0)])
def test_a_lossless_balancer_acts_where_it_pays(act, replicas, rows):
    """Infinite gamma alone is asked for its counts."""
    process = worker.Worker(MacsConfig.from_preset("rank", gamma=float("inf"), act=act).on("cpu"))
    places = Places(2, 4, 2, 0, [0, 1, 0, 1]) if replicas else None
    process.planners[0] = SimpleNamespace(plan=Plan(process.config, 2, 2, places=places))
    process.rows_that_pay = scheduler._rows_that_pay(process, SimpleNamespace(moe_ep_rank=1), None)
    assert process.rows_to_act_on == rows


def test_ranks_must_agree_where_experts_lie():
    """A file of --init-expert-location may differ from node to node."""

    def options(placement: list[int]) -> str:
        process = worker.Worker(MacsConfig())
        process.planners[0] = SimpleNamespace(plan=Plan(MacsConfig(), 2, 2, places=Places(2, 4, 2, 0, placement)))
        assert process.has_replicas
        return process.options_of_the_group()

    assert options([0, 1, 0, 1]) == options([0, 1, 0, 1]) != options([0, 1, 1, 0])
