"""The CPU dispatcher between real processes: every row arrives where its expert is, and bounds hold where rows
arrive.
"""

import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.cpu import AllToAll, MacsDispatcher
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe.stats import Stats, rows_of
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from tests.support.experts import EXPERTS, dense, expert_output, tokens
from tests.support.ranks import run_ranks


def _round_trip(rank: int, world: int, cases: list[list[int]]):
    comm = AllToAll(dist.group.WORLD, EXPERTS)
    seen = []
    for seed, counts in enumerate(cases):
        hidden, ids, weights, _ = tokens(rank, counts[rank], seed)
        rows = comm.gather_counts(rows_of(ids, EXPERTS).unsqueeze(0))[:, 0]
        received, local = comm.dispatch(hidden, ids, weights, rows)
        remote = comm.remote_rows()
        out = comm.combine(expert_output(received, local + rank * comm.num_local))
        torch.testing.assert_close(out, dense(hidden, ids, weights), rtol=1e-6, atol=1e-6)
        mine = rows[:, rank * comm.num_local : (rank + 1) * comm.num_local]
        seen.append((torch.bincount(received[:, 0].long(), minlength=world), mine.sum(dim=1), remote))
    return seen


@pytest.mark.parametrize(
    "cases", [[[5, 9], [7, 0], [0, 0]], [[1, 30, 0, 8], [4, 4, 4, 4], [0, 0, 0, 1]]], ids=["R=2", "R=4"]
)
def test_every_row_reaches_its_expert_and_comes_back(cases):
    by_rank = run_ranks(len(cases[0]), _round_trip, cases)
    for seen in by_rank:
        for named_sources, sent, _ in seen:
            assert torch.equal(named_sources, sent)
    for case in range(len(cases)):  # what came from other ranks is what others say they sent away
        foreign = sum(int(seen[case][0].sum() - seen[case][0][rank]) for rank, seen in enumerate(by_rank))
        assert sum(seen[case][2] for seen in by_rank) == foreign


COUNTS = [60, 0, 40, 25]  # one rank is idle
CASES = {
    "rank": {"preset": "rank", "gamma": 1.0},
    "local exchange": {"preset": "rank", "gamma": 1.0, "exchange": "local"},
    "expert rows": {"preset": "cai", "gamma": 1.0, "protect_text": True, "reroute": "local"},
    "paper": {"preset": "paper", "gamma": 0.8},
    "infinite gamma": {"preset": "rank", "gamma": float("inf")},
    "off": {"preset": "off"},
    "decode": {"preset": "rank", "gamma": 0.5},
}


def _serve_all(rank: int, world: int) -> dict[str, dict]:
    results = {}
    for name, options in CASES.items():
        config = MacsConfig.from_preset(**options, verify=True)
        counters = Stats()
        dispatcher = MacsDispatcher(LayerPlanner(0, Plan(config, EXPERTS, world), dist.group.WORLD, counters))
        hidden, ids, weights, logits = tokens(rank, COUNTS[rank])
        segment = torch.where(torch.arange(COUNTS[rank]) % 4 < 3, 0, -1).int()
        skip = name if name in ("off", "decode") else ""
        with batch.forward(batch.Batch(segment, 1, skip, measured=skip != "decode")):
            received, local = dispatcher.dispatch(hidden, ids, weights, logits)
        out = dispatcher.combine(expert_output(received, local + rank * EXPERTS // world))
        rows = torch.bincount(local, minlength=EXPERTS // world)
        results[name] = {
            "rows": rows,
            "out": out,
            "dense": dense(hidden, ids, weights),
            "stats": counters.snapshot(),
            "total": int((ids >= 0).sum()),
        }
    return results


@pytest.fixture(scope="module")
def served() -> list[dict[str, dict]]:
    """Every case of CASES on four ranks, of which one has no tokens."""
    return run_ranks(4, _serve_all)


@pytest.mark.parametrize("name", ["rank", "local exchange", "expert rows", "paper"])
def test_bounds_hold_where_the_rows_arrive(served, name):
    results = [rank[name] for rank in served]
    stats = [r["stats"] for r in results]
    assert all(s["checks"]["bound"] == 1 and s["violations"].get("bound", 0) == 0 for s in stats)
    assert sum(s["own"]["clipped_visual"] for s in stats) > 0, "a case that clips nothing proves nothing"
    total = sum(r["total"] for r in results)
    dropped = sum(s["own"]["dropped_visual"] + s["own"]["dropped_text"] for s in stats)
    received = [int(r["rows"].sum()) for r in results]
    assert sum(received) == total - dropped
    assert stats[0]["layers"]["0"]["rows_after"] == received  # what the counters call "after" is what arrived
    if name in ("rank", "local exchange"):
        assert max(received) <= total // 4
    if name == "expert rows":
        assert max(int(r["rows"].max()) for r in results) <= total // EXPERTS


@pytest.mark.parametrize("name", ["rank", "expert rows", "paper"])
def test_text_goes_last_was_checked_and_held(served, name):
    for rank in served:
        assert rank[name]["stats"]["checks"]["text_last"] == 1
        assert rank[name]["stats"]["violations"].get("text_last", 0) == 0


@pytest.mark.parametrize(("name", "planned"), [("infinite gamma", 1), ("off", 0), ("decode", 0)])
def test_nothing_to_clip_changes_nothing(served, name, planned):
    for rank in served:
        result = rank[name]
        torch.testing.assert_close(result["out"], result["dense"], rtol=1e-6, atol=1e-6)
        assert result["stats"]["planned"] == planned
        assert result["stats"]["skipped"] == ({} if planned else {name: 1})
        for layer in result["stats"]["layers"].values():
            assert layer["rows_before"] == layer["rows_after"]
