"""Times where ranks share a GPU.

DeepEP and the composed path (plan, then DeepEP) run in phases, with a host barrier in between.

DeepEP's receiving kernels spin until every peer has sent, and on a shared GPU a peer's sending kernel may wait for the
SMs that they hold. So all ranks send, meet on the host, and receive; times are those of the kernels alone,
sending plus receiving, without any waiting for each other. The plan's exchange is left out: the composed path can only
be slower than what is said here. The fused kernels, which wait for each other as they run, are timed in short graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu.time_fused import CLIPPED, SCORED, DeepEP, Layer, Table
from benchmarks.gpu.time_kernels import capture
from reference.kernel_case import Run

SETS, ROUNDS = 4, 200  # of inputs; timed in all
PASSES = 8  # in a graph of fused kernels: one rank of eight came too late for its 33rd of 48 (and for its 7th of 8)
IDLE_CYCLES = 100_000  # that the device sleeps before a graph: the host's launching is not timed
PHASES = ("send", "receive", "combine_send", "combine_receive")


def together_us(passes: list[Callable[[], None]], meet: Callable[[], None]) -> tuple[float, float]:
    """(median, p99) microseconds of a pass of kernels in which all ranks wait for one another. Ranks meet before every
    graph, and the first pass, to which they come at different times, is not timed. Collective.
    """
    stream, first, graphs = torch.cuda.Stream(), passes[:1], []
    for some in (first, passes[1 : PASSES + 1]):
        with torch.cuda.stream(stream):
            for one in some:
                one()
        meet()
        graphs.append(capture(some, stream))
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        meet()
        graphs[0].replay()
        start.record()
        graphs[1].replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(passes[1 : PASSES + 1]))
    return float(np.median(times)), float(np.percentile(times, 99))


class Phases:
    """The four phases of one set of inputs, as a graph each."""

    def __init__(self, deepep: DeepEP, inputs: dict, plan: Run | None, meet: Callable[[], None]) -> None:
        self.deepep, self.inputs, self.plan, self.kept = deepep, inputs, plan, []
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for phase in PHASES:
                getattr(self, "_" + phase)()
                meet()
        self.kept.clear()
        self.graphs = {}
        for phase in PHASES:  # two buffers take turns: one round uses both, and its graphs find them as they are here
            self.graphs[phase] = capture([getattr(self, "_" + phase)], stream)
        meet()

    def _send(self) -> None:
        ids, f = self.inputs["topk_ids"], self.deepep.plan
        if self.plan is not None:
            self.plan.fused()
            ids = self.plan.out["ids"]
        received, counts, self.handle, _, self.hook = self.deepep.buffer.low_latency_dispatch(
            self.inputs["hidden_states"], ids, f.T, f.E, use_fp8=self.deepep.fp8, return_recv_hook=True
        )
        self.kept.append((received, counts, self.handle))  # graphs write there

    def _receive(self) -> None:
        self.hook()

    def _combine_send(self) -> None:
        ids = self.inputs["topk_ids"] if self.plan is None else self.plan.out["ids"]
        combined, _, self.hook = self.deepep.buffer.low_latency_combine(
            self.deepep.outputs, ids, self.inputs["topk_weights"], self.handle, return_recv_hook=True
        )
        self.kept.append(combined)

    def _combine_receive(self) -> None:
        self.hook()

    def round(self, meet: Callable[[], None]) -> dict[str, float]:
        """Microseconds of each phase."""
        times = {}
        for phase in PHASES:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(IDLE_CYCLES)
            start.record()
            self.graphs[phase].replay()
            end.record()
            meet()
            times[phase] = start.elapsed_time(end) * 1e3
        return times


def measure(phased: list[Phases], meet: Callable[[], None]) -> dict[str, tuple[float, float]]:
    """(median, p99) of dispatch and of combine."""
    for one in phased:
        one.round(meet)
    rounds = [phased[i % len(phased)].round(meet) for i in range(ROUNDS)]
    dispatch = [r["send"] + r["receive"] for r in rounds]
    combine = [r["combine_send"] + r["combine_receive"] for r in rounds]
    return {
        name: (float(np.median(times)), float(np.percentile(times, 99)))
        for name, times in {"dispatch": dispatch, "combine": combine}.items()
    }


def time_composed(table: Table, layer: Layer, meet: Callable[[], None]) -> None:
    """Rows of DeepEP alone and of the composed path. meet: every rank is here and its device at rest. Collective."""
    deepep = DeepEP(layer)
    sets = list(zip(layer.inputs[:SETS], deepep.sets[:SETS], strict=True))
    alone = measure([Phases(deepep, x, None, meet) for _, x in sets], meet)
    for name, times in alone.items():
        table.add(f"phased_deepep_{name}", layer.config, times, layer.bytes(), clipped=0.0)
    for clipped in (0.0, CLIPPED):
        config = replace(deepep.plan, gamma=layer.gamma(clipped))
        plans = [Run(layer.kernels, config, ranks[deepep.rank]) for ranks, _ in sets]
        phased = [Phases(deepep, x, plan, meet) for plan, (_, x) in zip(plans, sets, strict=True)]
        times = measure(phased, meet)["dispatch"]
        case = {"clipped": clipped, "importance": SCORED}
        table.add("phased_plan_deepep_dispatch", layer.config, times, layer.bytes(), **case)
    deepep.buffer.destroy()
