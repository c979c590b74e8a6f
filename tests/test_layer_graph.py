"""A MoE layer as one CUDA graph: which batches, with what inputs, and what is counted. The graph itself is a stand-in
that runs what was captured again, on the same memory; tests/test_gpu.py has real ones.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch import layer_graph
from sglang_macs.dispatch.bounded import Room, Sizes, size_class
from sglang_macs.dispatch.layer_graph import LayerGraph, LayerGraphs
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe.beside import Observed
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan

EXPERTS, RANKS, TOP_K, HIDDEN = 8, 2, 2, 16
ROOM = Room(4096, 8192)


class AloneInGroup(LayerPlanner):
    def all_reduce(self, tensor):
        pass


class Rerun:
    """Of a captured layer, in the batch that it was captured in: writes to the memory of the capture."""

    def __init__(self, forward, results, planner) -> None:
        self.forward, self.planner, self.now = forward, planner, batch.current()
        self.output = forward().fill_(math.nan)  # a capture runs nothing
        self.result = results[0] if results else None

    def replay(self) -> None:
        with batch.forward(self.now), self.planner.uncounted() as results:
            self.output.copy_(self.forward())
        for memory, made in zip(self.result or (), results[0] if results else (), strict=True):
            if memory is not None:
                memory.copy_(made)


class StandIn(LayerGraphs):
    def __init__(self, planner, say) -> None:
        super().__init__(say)
        self.planner, self.error = planner, None

    def capture(self, forward, results):
        if self.error:
            raise self.error
        rerun = Rerun(forward, results, self.planner)
        return layer_graph._Replay(rerun, rerun.output, rerun.result)


class Layer:
    """One layer of a server: `run` is its forward in a pass."""

    def __init__(self, graphs: bool, gamma: float = 1.0, room: Room | None = ROOM) -> None:
        plan = Plan(MacsConfig.from_preset("rank", gamma=gamma), EXPERTS, RANKS)
        self.planner = AloneInGroup(3, plan, group=None, counters=Stats())
        self.said, self.launched, self.rooms = [], [], []
        self.normal_mode = True
        self.graphs = StandIn(self.planner, self.said.append)
        shared, self.sent = SimpleNamespace(sent=lambda: self.sent.append(len(self.launched))), []
        sizes = Sizes(RANKS, EXPERTS, TOP_K, HIDDEN)
        self.used = []
        normal = SimpleNamespace(
            planner=self.planner,
            sizes=sizes,
            room=self.room,
            shared=shared,
            in_use=lambda: self.used.append(len(self.launched)),
        )
        self._found, self._graph = room, LayerGraph(self.graphs, normal, lambda: self.normal_mode) if graphs else None

    def room(self) -> Room | None:
        self.rooms.append(batch.current().group_tokens)
        return self._found

    def forward(self, hidden, ids, weights, logits):
        self.launched.append(hidden.shape[0])
        planned = self.planner(hidden, ids, weights, logits)
        self.planner.measure(ids, planned)
        self.planner.count_bounded()
        kept = planned.topk_weights.masked_fill(planned.topk_ids < 0, 0)
        return hidden * (kept * (planned.topk_ids + 1)).sum(1, keepdim=True)

    def run(self, now: batch.Batch, tokens: int, seed: int):
        given = routed(tokens, seed)
        with batch.forward(now):
            return self._graph(self.forward, *given) if self._graph else self.forward(*given)

    def counted(self) -> dict:
        counted = self.planner.counters.snapshot()
        return {name: value for name, value in counted.items() if name not in ("graphs", "plan_seconds")}


def routed(tokens: int, seed: int):
    """A batch that favours the first rank."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=g) + torch.linspace(2, 0, EXPERTS)
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=g), ids, weights, logits


def a_pass(tokens: int, seed: int = 0, **about) -> batch.Batch:
    """Of a rank with `tokens` tokens, the fullest; every third one is of a picture."""
    segment = torch.where(torch.arange(tokens) % 3 == seed % 3, 0, -1).int()
    return batch.Batch(segment, 1, **({"skip": "", "group_tokens": tokens, "most_tokens": tokens} | about))


@pytest.mark.parametrize("gamma", [1.0, math.inf])
def test_graphs_make_what_the_launches_make_and_count_as_they_do(gamma: float) -> None:
    """Batches of four sizes take turns; two of them share a graph, filled up to its size."""
    graphs, launches = Layer(True, gamma), Layer(False, gamma)
    outputs = []
    for seed, tokens in enumerate([1, 1, 300, 500, 512, 300, 500, 1, 512, 300, 1, 1]):
        now = a_pass(tokens, seed)
        outputs.append((graphs.run(now, tokens, seed), launches.run(now, tokens, seed)))
    assert all(torch.equal(*pair) for pair in outputs), "an output must outlive the next replay"
    assert graphs.counted() == launches.counted()
    assert gamma == math.inf or graphs.counted()["own"]["clipped_visual"] > 0
    assert graphs.planner.counters.graphs == 10, "the first batch of either size is launched"


def test_a_size_is_launched_once_before_it_is_captured() -> None:
    """What is compiled or allocated at a first call must not be in a graph."""
    layer = Layer(True)
    for seed in range(3):
        layer.run(a_pass(300), 300, seed)
        assert layer.planner.counters.graphs == seed
    assert layer.rooms == [512 * RANKS], "asked once a size"
    assert len(layer.sent) == 3, "a replay is a dispatch without a count, too"
    assert len(layer.used) == 2, "of which SGLang must know"


def test_graphs_of_inputs_that_have_moved_are_captured_again() -> None:
    graphs, launches = Layer(True), Layer(False)
    for seed, tokens in enumerate([200, 200, 200, 900, 200, 900, 200]):
        now = a_pass(tokens, seed)
        assert torch.equal(graphs.run(now, tokens, seed), launches.run(now, tokens, seed))
    assert graphs.counted() == launches.counted()


def test_the_fullest_rank_decides_the_size() -> None:
    """So that every rank's room is that of the group's batch."""
    layer = Layer(True)
    layer.run(a_pass(10, group_tokens=1034, most_tokens=1024), 10, 0)
    assert layer.launched == [1024] and layer.rooms == [1024 * RANKS]


@pytest.mark.parametrize(
    "about",
    [
        {"skip": "draft"},
        {"skip": "outside"},
        {"measured": True},
        {"leaves_alone": True},
        {"halves": ((0, 100), (100, 300))},
        {"most_tokens": 0},
    ],
    ids=str,
)
def test_other_batches_are_launched_as_they_are(about: dict) -> None:
    layer = Layer(True)
    for seed in range(3):
        layer.run(a_pass(300, **about), 300, seed)
    assert layer.launched == [300] * 3 and layer.planner.counters.graphs == 0 and not layer.rooms


def test_low_latency_batches_are_launched_as_they_are() -> None:
    """Of --deepep-mode auto: their dispatch takes no more tokens than it was made for."""
    layer = Layer(True)
    layer.normal_mode = False
    layer.run(a_pass(3, skip="decode"), 3, 0)
    assert layer.launched == [3] and not layer.rooms


def test_a_rank_without_tokens_is_launched_as_it_is() -> None:
    """Its top-k has no logits to copy."""
    layer = Layer(True)
    layer.run(a_pass(0, most_tokens=300), 0, 0)
    assert layer.launched == [0]


def test_a_traced_layer_is_launched_as_it_is() -> None:
    layer = Layer(True)
    layer.planner.recorder = SimpleNamespace(add=lambda *args, **kwargs: None)
    layer.run(a_pass(300), 300, 0)
    assert layer.launched == [300]


def test_where_deepep_counts_on_the_host_there_is_no_graph() -> None:
    layer = Layer(True, room=None)
    for seed in range(3):
        layer.run(a_pass(300), 300, seed)
    assert layer.launched == [300] * 3 and len(layer.rooms) == 1, "asked once a size"


@pytest.mark.parametrize("skip", ["decode", "small", "off"])
def test_batches_that_are_not_planned_have_graphs_too(skip: str) -> None:
    graphs, launches = Layer(True), Layer(False)
    for seed in range(4):
        now = a_pass(40, seed, skip=skip)
        assert torch.equal(graphs.run(now, 40, seed), launches.run(now, 40, seed))
    assert graphs.counted() == launches.counted() and graphs.planner.counters.graphs == 3


def test_a_pass_that_is_only_observed_has_graphs_and_is_counted_as_the_launches_are() -> None:
    """A graph holds no counting: its batch is counted before it."""
    layers = Layer(True), Layer(False)
    for layer in layers:
        layer.planner.plan.configure(MacsConfig.from_preset("observe"))
        layer.planner.observed = Observed(layer.planner.counters)
    for seed, tokens in enumerate([300, 300, 500, 300]):
        for layer in layers:
            layer.planner.observed.begin_pass()
            layer.run(a_pass(tokens, seed, skip="off", measured=True), tokens, seed)
            layer.planner.observed.end_pass()
    graphs, launches = (layer.counted() for layer in layers)
    assert layers[0].planner.counters.graphs == 3 and graphs["layers"]["3"]["dispatches"] == 4
    del graphs["observed_seconds"], launches["observed_seconds"]
    assert graphs == launches


def test_layers_left_alone_have_a_graph_of_their_own() -> None:
    graphs, launches = Layer(True), Layer(False)
    for seed, no_gain in enumerate([(), (3,), (), (3,), (), (3,)]):
        now = a_pass(300, seed, no_gain=frozenset(no_gain), gain={3: 5})
        assert torch.equal(graphs.run(now, 300, seed), launches.run(now, 300, seed))
    assert graphs.counted() == launches.counted()
    assert graphs.counted()["skipped"] == {"no_gain": 3} and graphs.counted()["expected_gain"] == {
        "planned": 15,
        "no_gain": 15,
    }


def test_what_cannot_be_captured_is_said_once_and_served() -> None:
    graphs, launches = Layer(True), Layer(False)
    graphs.graphs.error = RuntimeError("out of memory\nmore of it")
    for seed in range(4):
        now = a_pass(300, seed)
        assert torch.equal(graphs.run(now, 300, seed), launches.run(now, 300, seed))
    assert graphs.said == ["MoE layers of 512 rows are no CUDA graphs: out of memory"]
    assert graphs.counted() == launches.counted() and graphs.planner.counters.graphs == 0


def test_a_pool_that_all_graphs_have_left_is_not_taken_again(monkeypatch) -> None:
    """torch fails on an assertion then: behind inputs that have moved, or where the first capture failed."""
    taken, handles = [], iter(range(9))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(capture_begin=lambda pool, **kwargs: taken.append(pool), capture_end=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    graphs, output = LayerGraphs(print), torch.ones(4, HIDDEN)

    def fails() -> torch.Tensor:
        raise RuntimeError("out of memory")

    graphs.capture(lambda: output, [])
    graphs.capture(lambda: output, [])
    graphs._of(300, routed(300, 0))
    graphs.capture(lambda: output, [])
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.capture(fails, [])
    graphs.capture(lambda: output, [])
    assert taken == [0, 0, 1, 1, 2]


def test_graphs_of_other_options_never_run() -> None:
    """They hold those options; and under others DeepEP may count on the host, which no graph can."""
    layer, launches = Layer(True), Layer(False)
    for gamma, room, expected in ((1.0, ROOM, 2), (1.3, None, 2), (1.1, ROOM, 4)):
        for of in (layer, launches):
            of.planner.plan.configure(MacsConfig.from_preset("rank", gamma=gamma))
        layer.graphs.forget()
        layer._found, layer.rooms = room, []
        for seed in range(3):
            now = a_pass(300, seed)
            assert torch.equal(layer.run(now, 300, seed), launches.run(now, 300, seed))
        assert layer.planner.counters.graphs == expected and len(layer.rooms) == 1
    assert layer.counted() == launches.counted()


def test_there_is_an_end_to_the_sizes(monkeypatch) -> None:
    monkeypatch.setattr(layer_graph, "MOST_KEYS", 2)
    layer = Layer(True)
    for tokens in (100, 300, 600, 700, 100, 300):
        layer.run(a_pass(tokens), tokens, 0)
    assert layer.launched[:4] == [256, 512, 600, 700] and layer.planner.counters.graphs == 2
    assert len(layer.said) == 1 and "more than 2 sizes" in layer.said[0]


def test_sizes_are_close() -> None:
    for rows in range(1, 70000, 7):
        size = size_class(rows)
        assert rows <= size <= max(256 * -(-rows // 256), rows * 9 / 8) and size_class(size) == size
    assert [size_class(1 << n) for n in range(8, 17)] == [1 << n for n in range(8, 17)]
