"""Replicas under the bounded dispatch, between real processes: rows have room where the plan sends them, and a layer
that is a graph follows experts that move. DeepEP and the graph are stand-ins; the ranks are unequal, one is idle.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import bounded
from sglang_macs.dispatch.bounded import BoundedDispatch, BoundedNormal, Sizes
from sglang_macs.dispatch.layer_graph import LayerGraph, LayerGraphs
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from tests.support.experts import EXPERTS, HIDDEN, TOP_K, dense, expert_output, tokens
from tests.support.ranks import run_ranks

COUNTS = [60, 0, 40, 25]
FIRST = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 0]
LATER = [0, 8, 3, 10, 1, 9, 4, 11, 2, 6, 5, 0, 7, 1, 2, 0]
PLACEMENTS = [FIRST] * 4 + [LATER] * 3 + [FIRST]
GAMMAS = [math.inf, 1.0]


class DeepEP:
    """SGLang's normal-mode implementation over gloo: a rank gets the tokens that name one of its experts."""

    use_fp8 = use_nvfp4 = use_mxfp4 = use_mxfp8 = False
    async_finish = True

    def __init__(self, rank: int, world: int, local: int) -> None:
        self.rank, self.world, self.local = rank, world, local

    def _get_buffer(self) -> Any:
        runtime = SimpleNamespace(get_num_rdma_ranks=lambda: 1)
        return SimpleNamespace(dispatch=self.dispatch, get_dispatch_layout=None, runtime=runtime)

    def dispatch(self, x, *, topk_idx, topk_weights, num_worst_tokens=0):
        given: list[Any] = [None] * self.world
        dist.all_gather_object(given, (x, topk_idx, topk_weights))
        rows, ids, weights = (torch.cat(parts) for parts in zip(*given, strict=True))
        ids = ids - self.rank * self.local
        ids = ids.masked_fill((ids < 0) | (ids >= self.local), -1)
        (self.sources,) = torch.nonzero((ids >= 0).any(1), as_tuple=True)
        self.ends = torch.tensor([len(one[0]) for one in given]).cumsum(0).tolist()
        spare = num_worst_tokens - len(self.sources)
        assert spare >= 0, "more tokens than were announced"
        rows, ids, weights = (t[self.sources] for t in (rows, ids, weights))
        padded = rows.new_full((spare, rows.shape[1]), math.nan), ids.new_full((spare, TOP_K), -1)
        return (
            torch.cat([rows, padded[0]]),
            None,
            torch.cat([ids, padded[1]]),
            torch.cat([weights, weights.new_zeros(spare, TOP_K)]),
        )

    def dispatch_b(self, x, ids, weights):
        return (*self._get_buffer().dispatch(x, topk_idx=ids, topk_weights=weights), [])

    def combine(self, outputs: torch.Tensor) -> torch.Tensor:
        summed = torch.zeros(self.ends[-1], HIDDEN)
        summed[self.sources] = outputs[: len(self.sources)].float()
        dist.all_reduce(summed)
        return summed[([0, *self.ends])[self.rank] : self.ends[self.rank]]


class Rerun:
    """A graph that runs again what was captured, in the batch of the capture. A capture runs nothing."""

    def __init__(self, forward, planner) -> None:
        self.graph, self.forward, self.planner, self.now = self, forward, planner, batch.current()

    def replay(self) -> None:
        with batch.forward(self.now), self.planner.uncounted() as results:
            self.output = self.forward()
        (self.result,) = results


class Graphs(LayerGraphs):
    planner: LayerPlanner

    def capture(self, forward, results):
        return Rerun(forward, self.planner)


class Layer:
    """One layer of a server on this rank. `placement` is where its weights lie: it changes when experts move."""

    def __init__(self, rank: int, world: int, gamma: float, graphs: bool) -> None:
        self.placement, local = FIRST, len(FIRST) // world
        config = MacsConfig.from_preset("rank", gamma=gamma)
        self.places = Places(EXPERTS, len(FIRST), world, rank, FIRST)
        plan = Plan(config, EXPERTS, world, places=self.places)
        self.planner = LayerPlanner(0, plan, dist.group.WORLD, Stats())
        self.shared = BoundedDispatch(config, lambda line: None, stream=SimpleNamespace)
        self.deepep = DeepEP(rank, world, local)
        sizes = Sizes.of(plan, TOP_K, HIDDEN)
        normal = BoundedNormal(self.deepep, self.shared, self.planner, sizes, lambda output, received: received)
        self.own = slice(rank * local, (rank + 1) * local)
        made = Graphs(print)
        made.planner = self.planner
        self.graph = LayerGraph(made, normal, lambda: True) if graphs else None

    def move(self, placement: list[int]) -> None:
        self.placement = placement
        self.places.refresh(placement)

    def forward(self, hidden, ids, weights, logits):
        planned = self.planner(hidden, ids, weights, logits)
        received = self.deepep.dispatch_b(hidden.bfloat16(), planned.topk_ids, planned.topk_weights)
        rows, _, index = received.permute()
        begin, self.rows = 0, 0
        for expert, end in zip(self.placement[self.own], index.expert_end.tolist(), strict=True):
            rows[begin:end] = expert_output(rows[begin:end].float(), torch.full((end - begin,), expert)).bfloat16()
            self.rows += end - begin
            begin = -(-end // bounded.TILE) * bounded.TILE
        return self.deepep.combine(received.gather(rows, index.place))

    def run(self, now: batch.Batch, given: tuple) -> torch.Tensor:
        with batch.forward(now):
            return self.graph(self.forward, *given) if self.graph else self.forward(*given)


def _serve_all(rank: int, world: int) -> list[dict[str, Any]]:
    return [_serve(rank, world, gamma) for gamma in GAMMAS]


def _serve(rank: int, world: int, gamma: float) -> dict[str, Any]:
    layers = [Layer(rank, world, gamma, graphs) for graphs in (True, False)]
    segment = torch.where(torch.arange(COUNTS[rank]) % 4 < 3, 0, -1).int()
    now = batch.Batch(segment, 1, "", group_tokens=sum(COUNTS), most_tokens=max(COUNTS))
    passes = []
    for seed, placement in enumerate(PLACEMENTS):
        hidden, logical, weights, logits = tokens(rank, COUNTS[rank], seed)
        first = torch.tensor([*(placement.index(expert) for expert in range(EXPERTS)), -1])
        outputs = []
        for layer in layers:
            if layer.placement is not placement:
                layer.move(placement)
            outputs.append(layer.run(now, (hidden, first[logical], weights, logits)))
        assignments = int((logical >= 0).sum())
        passes.append((*outputs, dense(hidden, logical, weights), layers[0].rows, assignments))
    counted = [layer.planner.counters.snapshot() for layer in layers]
    lost = [int(layer.shared.workspace(torch.device("cpu")).lost) for layer in layers]
    return {"passes": passes, "counted": counted, "lost": lost}


@pytest.fixture(scope="module")
def all_served() -> list[list[dict[str, Any]]]:
    return run_ranks(4, _serve_all)


@pytest.fixture(params=range(len(GAMMAS)), ids=lambda i: str(GAMMAS[i]))
def served(request, all_served) -> tuple[float, list[dict[str, Any]]]:
    """gamma, and what each rank has found."""
    return GAMMAS[request.param], [rank[request.param] for rank in all_served]


def test_graphs_follow_experts_that_move(served):
    """They give what the launches give, on ranks of which one launches while the others replay."""
    _, ranks = served
    for count, rank in zip(COUNTS, ranks, strict=True):
        assert all(torch.equal(graph, launches) for graph, launches, *_ in rank["passes"])
        graphs, launches = rank["counted"]
        assert graphs.pop("graphs") == (len(PLACEMENTS) - 1 if count else 0) and launches.pop("graphs") == 0
        del graphs["plan_seconds"], launches["plan_seconds"]
        assert graphs == launches and graphs["bounded"] == len(PLACEMENTS)


def test_every_row_has_room_and_no_rank_more_than_its_bound(served):
    gamma, ranks = served
    assert all(rank["lost"] == [0, 0] for rank in ranks)
    for i in range(len(PLACEMENTS)):
        rows, total = ([rank["passes"][i][part] for rank in ranks] for part in (3, 4))
        mean = sum(total) / len(ranks)
        assert max(rows) <= (gamma * mean if gamma < math.inf else 1.05 * mean if i in (4, 5, 6) else 2 * mean), rows


def test_at_infinite_gamma_the_choice_of_replicas_changes_no_answer(served):
    gamma, ranks = served
    moved = sum(rank["counted"][0]["own"]["moved_visual"] for rank in ranks)
    clipped = sum(rank["counted"][0]["own"]["clipped_visual"] for rank in ranks)
    assert moved > 0 and (clipped > 0) == (gamma < math.inf)
    if gamma < math.inf:
        return
    for rank in ranks:
        for output, _, expected, *_ in rank["passes"]:
            torch.testing.assert_close(output, expected, rtol=0.05, atol=0.3)
