"""Plans with replicas on a GPU: the CPU's bits, again after experts have moved, and in a graph captured before.

As in test_gpu.py, they test what CUDA tensors get; MACS_CUDA_BACKEND=triton asks for Triton's operators.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reference import cases, replica_cases
from sglang_macs import ops
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.bounded import Room, Sizes
from sglang_macs.dispatch.layer_graph import LayerGraph, LayerGraphs
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe.stats import Stats
from sglang_macs.plan.batch import Batch, forward
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.gpu_batches import EXPERTS, RANKS, batch, to_gpu
from tests.support.replicas import PLACED, assert_alike, exchanged, placed, plans

pytestmark = pytest.mark.gpu
REDUNDANT = 32


def placement(seed: int) -> list[int]:
    return replica_cases.placement(cases.generator(seed), EXPERTS, EXPERTS + REDUNDANT)


def plan_of(config: MacsConfig, mapped: list[int], rank: int = 3) -> Plan:
    return Plan(config, EXPERTS, RANKS, places=Places(EXPERTS, len(mapped), RANKS, rank, mapped))


def routed(tokens: int, mapped: list[int], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, ...]:
    """hidden_states, physical ids, weights, logits, segment on the CPU."""
    hidden, ids, weights, logits, segment = batch(tokens, 8, seed=tokens)
    first = torch.tensor([mapped.index(expert) for expert in range(EXPERTS)])
    return hidden, torch.where(ids < 0, -1, first[ids.clamp(min=0)]).to(dtype), weights, logits, segment


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("gamma", [1.0, 0.6, float("inf")])
@pytest.mark.parametrize("tokens", [0, 1, 130, 8192])
def test_integers_equal_the_cpu_s(tokens: int, gamma: float, dtype: torch.dtype) -> None:
    config, mapped = MacsConfig.from_preset("rank", gamma=gamma), placement(1)
    on_gpu, on_cpu = plan_of(config, mapped), plan_of(config, mapped)
    for mapping in (mapped, placement(2)):
        for plan in (on_gpu, on_cpu):
            plan.places.refresh(mapping)
        host = routed(tokens, mapping, dtype)
        want = on_cpu(RoutedTokens(*host, 1))
        first = on_gpu(RoutedTokens(*to_gpu(*host), 1))
        assert_alike(first, want)
        for _ in range(20 if tokens == 130 else 1):
            again = on_gpu(RoutedTokens(*to_gpu(*host), 1))
            for mine, theirs in zip(again, first, strict=True):
                assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", PLACED)
def test_a_group_s_plans_are_the_cpu_s(name: str, dtype: torch.dtype) -> None:
    group, config = placed(name, dtype)
    on_cpu, on_gpu = plans(group, config), plans(group, config)
    _, total = exchanged(group, on_cpu)
    for cpu, gpu, b in zip(on_cpu, on_gpu, group.group.batches, strict=True):
        want = cpu(b.routed, lambda tensor: tensor.copy_(total))
        tokens = RoutedTokens(*to_gpu(*b.routed[:5]), b.num_segments)
        assert_alike(gpu(tokens, lambda tensor: tensor.copy_(total)), want)


def test_a_plan_never_makes_the_host_wait() -> None:
    mapped = placement(1)
    plan, given = plan_of(MacsConfig.from_preset("rank", gamma=1.0), mapped), to_gpu(*routed(256, mapped))
    first = plan(RoutedTokens(*given, 1))  # loads the modules
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = plan(RoutedTokens(*given, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again.topk_ids, first.topk_ids) and torch.equal(again.counts, first.counts)


def test_a_captured_plan_sees_experts_move() -> None:
    config, before, after = MacsConfig.from_preset("rank", gamma=1.0), placement(1), placement(2)
    plan, host = plan_of(config, before), routed(256, before)
    given = to_gpu(*host)
    plan(RoutedTokens(*given, 1))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = plan(RoutedTokens(*given, 1))
    plan.places.refresh(after)
    moved = routed(256, after)
    given[1].copy_(moved[1])
    graph.replay()
    torch.cuda.synchronize()
    assert_alike(result, plan_of(config, after)(RoutedTokens(*moved, 1)))


class AloneInGroup(LayerPlanner):
    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass


class Layer:
    """One whose output tells to which copies its rows went. `graphs`: it is a CUDA graph where it can be one."""

    def __init__(self, mapped: list[int], graphs: bool) -> None:
        plan = plan_of(MacsConfig.from_preset("rank", gamma=1.0), mapped)
        self.planner = AloneInGroup(0, plan, group=None, counters=Stats())
        normal = SimpleNamespace(
            planner=self.planner,
            sizes=Sizes.of(plan, 8, 64),
            room=lambda: Room(1 << 12, 1 << 15),
            shared=SimpleNamespace(sent=lambda: None),
            in_use=lambda: None,
        )
        self.call = LayerGraph(LayerGraphs(print), normal, lambda: True) if graphs else lambda forward, *x: forward(*x)

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        planned = self.planner(hidden, *routing)
        kept = planned.topk_weights.masked_fill(planned.topk_ids < 0, 0)
        return hidden * (kept * (planned.topk_ids + 1)).sum(1, keepdim=True)

    def run(self, now: Batch, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with forward(now):
            return self.call(self.forward, *given)


@pytest.mark.skipif(ops.cuda_backend() != "cuda", reason="graphs are the bounded dispatch's, which is CUDA's only")
def test_a_layer_that_is_a_graph_sees_experts_move() -> None:
    """It gives what its launches give, and is captured once."""
    placements = [placement(1)] * 3 + [placement(2)] * 2
    layers = [Layer(placements[0], graphs) for graphs in (True, False)]
    for step, mapped in enumerate(placements):
        hidden, ids, weights, logits, segment = to_gpu(*routed(290 + step, mapped))
        now = Batch(segment, 1, "", group_tokens=len(ids), most_tokens=len(ids))
        for layer in layers:
            layer.planner.plan.places.refresh(mapped)
        graph, launches = (layer.run(now, (hidden, ids, weights, logits)) for layer in layers)
        assert torch.equal(graph, launches), f"pass {step}"
    assert layers[0].planner.counters.graphs == len(placements) - 1
