"""Counting late: the sums of dispatches counted one by one, few of them kept, and hardly an operation for each."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_macs.choices import WEIGHT_ONE
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe.backlog import MOST, Backlog
from sglang_macs.observe.stats import AFTER, BEFORE, CLIPPED_TEXT, KEPT_VISUAL, UNITS, Stats, recount
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan, PlanResult
from sglang_macs.plan.tokens import RoutedTokens

EXPERTS, RANKS, TOP_K, TOKENS, LAYERS = 8, 2, 2, 64, 3
CONFIGS = {
    "rank": MacsConfig.from_preset("rank", gamma=1.0),
    "rank, verified": MacsConfig.from_preset("rank", gamma=1.0, verify=True),
    "paper, verified": MacsConfig.from_preset("paper", gamma=0.8, verify=True),
    "alone, verified": MacsConfig.from_preset("rank", gamma=1.0, exchange="local", verify=True),
    "infinite gamma": MacsConfig.from_preset("rank", gamma=math.inf),
}


class AloneInGroup(LayerPlanner):
    """The group's other ranks route as this one does."""

    def all_reduce(self, tensor):
        tensor.mul_(RANKS)


def planner(config: MacsConfig, counters: Stats, layer_id: int = 0, experts: int = EXPERTS) -> LayerPlanner:
    return AloneInGroup(layer_id, Plan(config, experts, RANKS), None, counters)


def routed(seed: int, experts: int = EXPERTS):
    """Hidden states, ids, weights and logits that favour the first experts, and the segment."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, experts, generator=g) + torch.linspace(2, 0, experts)
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    segment = torch.where(torch.rand(TOKENS, generator=g) < 0.6, 0, -1).int()
    return torch.randn(TOKENS, 16, generator=g), ids, weights, logits, segment


class OneByOne:
    """What counts of dispatches must be, added up dispatch by dispatch on the host."""

    def __init__(self, config: MacsConfig) -> None:
        self.config = config
        self.share, self.outcome, self.violations = 0.0, torch.zeros(3, 2, dtype=torch.long), Counter()
        self.layers: dict[str, dict] = {}
        self.expert_rows: dict[int, torch.Tensor] = {}

    def add(self, layer_id: int, result: PlanResult, own: torch.Tensor, group: torch.Tensor) -> None:
        visual, total = result.group[-2:].tolist()
        self.share += visual / total
        self.outcome += result.counts.sum(1)
        self.expert_rows[layer_id] = self.expert_rows.get(layer_id, 0) + result.counts[:2].sum(0)
        layer = self.layers.setdefault(str(layer_id), Counter())
        layer.update(dispatches=1, cut=int((result.cut[:, 0] >= 0).any()))
        for stage, rows in (("before", group[BEFORE]), ("after", group[AFTER])):
            rows = rows.view(RANKS, -1).sum(1)
            layer[f"rows_{stage}"] = [a + b for a, b in zip(layer[f"rows_{stage}"] or [0, 0], rows.tolist())]  # noqa: B905
            layer[f"max_over_mean_{stage}"] += float(rows.max() / rows.double().mean())
        held = own if self.config.exchange == "local" else group
        held = held.view(held.shape[0], result.cut.shape[0], -1).sum(2)
        load = UNITS if self.config.load == "effective" else AFTER
        self.violations["bound"] += bool((held[load] > result.cut[:, 3]).any())
        if self.config.verify:
            self.violations["text_last"] += bool(((held[CLIPPED_TEXT] > 0) & (held[KEPT_VISUAL] > 0)).any())


def planned_batch(config: MacsConfig, segment: torch.Tensor) -> batch.Batch:
    return batch.Batch(segment, 1, "", group_tokens=TOKENS * RANKS, measured=config.verify)


def spoilt(result: PlanResult) -> PlanResult:
    """A result whose bound its rows exceed."""
    cut = result.cut.clone()
    cut[:, 3] = 0
    return result._replace(cut=cut)


@pytest.mark.parametrize("dispatches", [1, MOST, 2 * MOST + 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_sums_are_those_of_dispatches_counted_one_by_one(name, dispatches):
    config, counters = CONFIGS[name], Stats()
    planners, want = [planner(config, counters, i) for i in range(LAYERS)], OneByOne(config)
    for step in range(dispatches):
        one = planners[step % LAYERS]
        hidden, ids, weights, logits, segment = routed(step % 7)
        with batch.forward(planned_batch(config, segment)):
            planned = one(hidden, ids, weights, logits)
            if step % 5 == 0:
                planned = planned._replace(result=spoilt(planned.result))
            own = one.recount(ids, planned)
            one.prove(planned, own, own * RANKS)
        want.add(one.layer_id, planned.result, own, own * RANKS)
        if step % 29 == 3:
            counters.snapshot()  # reading in between changes nothing
    for got in (counters.to_host().snapshot(), counters.snapshot()):
        assert got["planned"] == dispatches and got["visual_share_sum"] == pytest.approx(want.share, rel=1e-12)
        kept, clipped, rerouted = want.outcome.tolist()
        for i, modality in enumerate(("visual", "text")):
            assert got["own"][f"assignments_{modality}"] == kept[i] + clipped[i]
            assert got["own"][f"rerouted_{modality}"] == rerouted[i]
        assert got["layers"].keys() == want.layers.keys()
        for layer_id, layer in want.layers.items():
            for figure, value in layer.items():
                assert got["layers"][layer_id][figure] == pytest.approx(value, rel=1e-12), (layer_id, figure)
        assert got["violations"] == want.violations and set(got["checks"].values()) == {dispatches}
        rows = {i: table.tolist() for i, table in want.expert_rows.items()} if math.isinf(config.gamma) else {}
        assert got["expert_rows"] == rows
    assert want.violations["bound"] > 0, "a case in which nothing is violated proves little"


def test_sums_may_be_beyond_32_bits():
    counters, most = Stats(), torch.tensor(2**31 - 1, dtype=torch.int32)
    result = PlanResult(*[None] * 4, group=most.expand(4), cut=None, counts=most.expand(3, EXPERTS, 2))
    for _ in range(3):
        counters.add_plan(0, result, by_expert=True)
    got = counters.snapshot()
    assert got["own"]["clipped_text"] == 3 * EXPERTS * (2**31 - 1) and got["visual_share_sum"] == 3
    assert got["expert_rows"][0][0] == [6 * (2**31 - 1)] * 2


def test_only_so_many_dispatches_are_kept():
    counters, kept = Stats(), []
    config = CONFIGS["rank"]
    one, (hidden, ids, weights, logits, segment) = planner(config, counters), routed(0)
    for _ in range(3 * MOST):
        with batch.forward(planned_batch(config, segment)):
            result = one(hidden, ids, weights, logits).result
        kept.append([weakref.ref(result.counts), weakref.ref(result.group)])
        del result
        counts, groups = (sum(ref() is not None for ref in refs) for refs in zip(*kept, strict=True))
        assert counts < MOST and not groups, "on a CPU no histogram outlives its plan"


class Stream:
    """Of a GPU that is not there: notes what waits for it."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        if other is not self:
            self.log.append(f"{self.name} waits for {other.name}")


def test_items_are_counted_on_their_own_stream_and_readers_wait_on_the_device(monkeypatch):
    log, current = [], []

    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", use)
    backlog = Backlog(lambda items: log.append(f"{len(items)} on {current[-1].name}"))
    passes, others, reader = (Stream(name, log) for name in ("passes", "others", "reader"))
    for stream, items in ((passes, MOST + 2), (others, 1)):
        with use(stream):
            for _ in range(items):
                backlog.add(0, stream.device, alike=())
    with use(reader), backlog.settled():
        log.append("read")
    assert log == [
        f"{MOST} on passes",
        "2 on passes",  # the passes moved
        "others waits for passes",
        "1 on others",
        "reader waits for others",
        "read",
        "others waits for reader",
    ]


def test_layers_of_different_sizes_are_counted_apart():
    config, counters = CONFIGS["infinite gamma"], Stats()
    for layer_id in (0, 1, 0, 1):
        experts = EXPERTS * (1 + layer_id)
        one, (hidden, ids, weights, logits, segment) = planner(config, counters, layer_id, experts), routed(5, experts)
        with batch.forward(planned_batch(config, segment)):
            planned = one(hidden, ids, weights, logits)
            own = one.recount(ids, planned)
            one.prove(planned, own, own)
    got = counters.snapshot()
    assert {i: len(table) for i, table in got["expert_rows"].items()} == {0: EXPERTS, 1: 2 * EXPERTS}
    for layer_id, table in got["expert_rows"].items():
        total = 2 * TOKENS * TOP_K
        assert sum(map(sum, table)) == sum(got["layers"][str(layer_id)]["rows_before"]) == total


def test_a_copy_on_the_host_does_not_count_on():
    counters = Stats()
    config = CONFIGS["infinite gamma"]
    one, (hidden, ids, weights, logits, segment) = planner(config, counters), routed(0)
    states = []
    for _ in range(2):
        with batch.forward(planned_batch(config, segment)):
            planned = one(hidden, ids, weights, logits)
            own = one.recount(ids, planned)
            one.prove(planned, own, own)
        copy = counters.to_host()
        states.append((copy, copy.snapshot()))
    assert all(copy.snapshot() == seen for copy, seen in states)
    assert states[0][1]["own"] != states[1][1]["own"]


def test_a_recount_is_that_of_its_definition():
    _, ids, _, _, segment = routed(3)
    g = torch.Generator().manual_seed(4)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.1, -1)
    sent = torch.where(
        torch.rand(ids.shape, generator=g) < 0.3, torch.randint(-1, EXPERTS, ids.shape, generator=g), ids
    )
    weight = torch.rand(TOKENS, generator=g)
    want = torch.zeros(5, EXPERTS, dtype=torch.long)
    for t in range(TOKENS):
        for before, after in zip(ids[t].tolist(), sent[t].tolist(), strict=True):
            text = segment[t] < 0
            if before >= 0:
                want[BEFORE, before] += 1
                want[KEPT_VISUAL, before] += int(not text and before == after)
                want[CLIPPED_TEXT, before] += int(text and before != after)
            if after >= 0:
                want[AFTER, after] += 1
                want[UNITS, after] += max(1, int((weight[t] * WEIGHT_ONE).round()))
    assert torch.equal(recount(EXPERTS, ids, sent, weight, segment), want)
    assert torch.equal(recount(EXPERTS, ids, sent, weight, None), want[:2])
    assert recount(EXPERTS, ids, sent, None, segment).is_contiguous(), "it is sent to the other ranks"


def test_a_trace_holds_the_rows_left_alone_as_the_counters_do():
    config, recorded = CONFIGS["rank, verified"], []
    one, (hidden, ids, weights, logits, segment) = planner(config, Stats()), routed(0)
    one.recorder = SimpleNamespace(add=lambda *arguments, **_: recorded.append(arguments[-1].counts))
    segment[-7:] = batch.LEFT_ALONE
    with batch.forward(replace(planned_batch(config, segment), leaves_alone=True)):
        planned = one(hidden, ids, weights, logits)
        own = one.recount(ids, planned)
    kept, clipped, rerouted = recorded[0].sum(dim=2).long()
    assert torch.equal(kept + clipped, own[BEFORE]) and torch.equal(kept + rerouted, own[AFTER])


def test_rows_left_alone_are_counted_and_promised_nothing():
    """Decoded rows beside a prefill: they are load, but no bound speaks of them."""
    config, counters = CONFIGS["rank, verified"], Stats()
    one, (hidden, ids, weights, logits, segment) = planner(config, counters), routed(0)
    segment[-7:] = batch.LEFT_ALONE
    with batch.forward(replace(planned_batch(config, segment), leaves_alone=True)):
        planned = one(hidden, ids, weights, logits)
        own = one.recount(ids, planned)
        one.prove(planned, own, own * RANKS)
    assert torch.equal(planned.topk_ids[-7:], ids[-7:]) and torch.equal(planned.topk_weights[-7:], weights[-7:])
    assert (planned.topk_ids[:-7] != ids[:-7]).any(), "a case that clips nothing proves nothing"
    left = torch.bincount(ids[-7:].flatten(), minlength=EXPERTS)
    assert torch.equal(own[-1], left) and own[BEFORE].sum() == TOKENS * TOP_K
    bound = planned.result.cut[:, 3]
    assert (RANKS * own[AFTER].view(RANKS, -1).sum(1) > bound).any(), "with them a rank is above its bound"
    got = counters.snapshot()
    assert got["violations"] == {"bound": 0, "text_last": 0} and got["checks"] == {"bound": 1, "text_last": 1}
    assert sum(got["own"][f"assignments_{m}"] for m in ("visual", "text")) == (TOKENS - 7) * TOP_K
    assert sum(got["layers"]["0"]["rows_after"]) == RANKS * int((planned.topk_ids >= 0).sum())


class Operations(TorchDispatchMode):
    """How many operations torch was asked for: on a GPU, about as many launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "proves", "most"),
    [
        # Beside the plan: a slice and a copy of four sums (on a CPU alone), a share of the segment and of counting.
        ("rank", False, 2.5),
        ("infinite gamma", False, 2.5),
        # And a recount, of nine operations or, verified, 26.
        ("rank", True, 12.5),
        ("paper, verified", True, 29.5),
    ],
)
def test_a_planned_dispatch_asks_for_hardly_more_than_its_plan(name, proves, most):
    config, counters, layers, passes = CONFIGS[name], Stats(), 32, 8
    planners = [planner(config, counters, i) for i in range(layers)]
    hidden, ids, weights, logits, segment = routed(0)

    def serve() -> None:
        for _ in range(passes):
            with batch.forward(planned_batch(config, segment)):
                for one in planners:
                    planned = one(hidden, ids, weights, logits)
                    if proves:
                        own = one.recount(ids, planned)
                        one.prove(planned, own, own)

    serve()
    assert layers * passes % MOST == 0, "what was kept before is as much as what is kept after"
    with Operations() as planning:
        planners[0].plan(RoutedTokens(hidden, ids, weights, logits, segment, 1), planners[0].all_reduce)
    with Operations() as serving:
        serve()
    beside = serving.count / (layers * passes) - planning.count
    assert 0 < beside < most
