"""The fused dispatch around its kernels, on the CPU: sizes, choice of transport, SGLang's four steps, faults in words.

The kernels themselves run in test_fused_emulated.py; here stand-ins record what they are handed.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reference import fused_c as fc
from sglang_macs import ops
from sglang_macs.comm import peer_memory, peer_status
from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch import fused, transport
from sglang_macs.dispatch.fused import FusedDispatch, Sizes, region_shape, unsupported
from sglang_macs.dispatch.low_latency import FusedLowLatency
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep, scheduler
from sglang_macs.errors import MacsError, MacsNotActive
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens
from tests.support.ranks import run_ranks

SIZES = Sizes(num_ranks=2, num_experts=8, top_k=2, max_tokens=64, hidden_size=2048)
MEDIUM = Sizes(num_ranks=8, num_experts=128, top_k=8, max_tokens=128, hidden_size=2048)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_layout_and_faults_are_those_of_the_kernels():
    assert ops.RegionShape._fields == tuple(name for name, _ in fc.FusedShape._fields_)
    assert ops.RegionLayout._fields == tuple(name for name, _ in fc.FusedLayout._fields_)
    assert len(peer_status.FAULTS) == len(fc.FAULTS) and ctypes.sizeof(fc.FusedStatus) == peer_status.SIZE
    layout = ops.fused_layout(region_shape(SIZES, "fp8", 4))
    assert list(layout) == sorted(layout) and all(offset % 256 == 0 for offset in layout)


@pytest.mark.parametrize(("tokens", "rows"), [(128, 1024), (1, 8)])
def test_an_expert_has_room_for_every_token_of_every_rank(tokens, rows):
    """A batch that is not planned may send all of them there."""
    sizes = Sizes(**{**vars(MEDIUM), "max_tokens": tokens})
    shape = region_shape(sizes, "bf16", 4)
    assert (shape.expert_rows, shape.max_rows) == (rows, rows * 16)
    bytes_of_rows = 2 * 2 * rows * 16 * 2048  # the rows and the experts' outputs, in bf16
    assert bytes_of_rows < FusedDispatch.region_bytes(sizes, 4) < 1.05 * bytes_of_rows + 2**20


def test_rows_of_an_expert_are_whole_columns_of_scales():
    sizes = Sizes(num_ranks=3, num_experts=9, top_k=2, max_tokens=5, hidden_size=2048)
    assert region_shape(sizes, "fp8", 4).expert_rows == 16


@pytest.mark.parametrize(
    ("options", "sizes", "words"),
    [
        ({"exchange": "local"}, {}, "--macs-exchange local"),
        ({"reroute_rounds": 61}, {}, "61 rounds"),
        ({}, {"num_ranks": 32}, "32 ranks"),
        ({}, {"num_experts": 384}, "384 experts"),
        ({}, {"top_k": 17}, "top-17"),
        ({}, {"max_tokens": 1024}, "1024 tokens"),
        ({}, {"max_tokens": 1023, "top_k": 16}, "16368 assignments"),
        ({}, {"hidden_size": 2880}, "hidden size 2880"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(options, sizes, words):
    assert not unsupported(MacsConfig(), MEDIUM)
    assert words in unsupported(MacsConfig.from_preset(**options), Sizes(**{**vars(MEDIUM), **sizes}))


def test_operators_trace():
    """Shapes and dtypes of the Meta kernels, as a compiler asks for them."""
    shape = region_shape(SIZES, "bf16", 4)
    plan = Plan(MacsConfig(), SIZES.num_experts, SIZES.num_ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        region = torch.empty(ops.fused_layout(shape).bytes, dtype=torch.uint8, device="meta")
        hidden = torch.empty((5, 2048), dtype=torch.bfloat16, device="meta")
        ids, weights = torch.empty((5, 2), dtype=torch.int64, device="meta"), torch.empty((5, 2), device="meta")
        segment = torch.empty(5, dtype=torch.int32, device="meta")
        options = plan.fused_options(region.device) | {"num_segments": 1, "phase": "send", "timeout_ns": 1, "layer": 0}
        out = ops.fused_dispatch(region, [0, 0], 0, shape, hidden, ids, weights, segment, None, **options)
        ops.fused_carry(region, [0, 0], 0, shape, hidden, ids, phase="both", timeout_ns=1, layer=0)
        combined = ops.fused_combine(region, [0, 0], 0, shape, ids, weights, None, phase="both", timeout_ns=1, layer=0)
    assert [tuple(t.shape) for t in out] == [(5, 2), (5, 2), (5,), (2, 4), (3, 8, 2), (4,)]
    assert out[0].dtype == torch.int64 and combined.shape == (5, 2048) and combined.dtype == torch.bfloat16


# ---- Which transport ------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """A group of this process alone, on a GPU that would do."""
    monkeypatch.setattr(transport, "unfit_device", lambda: "")
    monkeypatch.setattr(transport.peer_memory, "unreachable", lambda group, unfit: unfit)
    monkeypatch.setattr(transport.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(transport, "make", lambda config, sizes, group: SimpleNamespace(
        num_blocks=4, sizes=sizes, region_bytes=FusedDispatch.region_bytes, epoch=lambda: 5
    ))  # fmt: skip


def chosen(dispatch: str, sizes: Sizes = SIZES, mode: str = "low_latency", overlaps: bool = False) -> int:
    transports = transport.Transports(MacsConfig.from_preset(dispatch=dispatch))
    return len(transports.of(sizes, 2, mode, overlaps, group=None))


def test_auto_takes_the_fused_dispatch_and_says_so_once(alone, capsys):
    transports = transport.Transports(MacsConfig.from_preset(dispatch="auto", scope="expert"))
    made = transports.of(SIZES, 2, "low_latency", False, group=None)
    assert len(made) == 2 and transports.of(SIZES, 2, "low_latency", False, group=None) is made
    said = capsys.readouterr().err
    size = 2 * FusedDispatch.region_bytes(SIZES, 4)
    assert said.count("\n") == 1 and "the fused dispatch carries every low-latency batch" in said
    assert f"{size / 1e6:.0f} MB a rank for 64 tokens of every rank" in said
    assert transports.state() == {"bytes": size, "rounds": 10}
    assert transports.of(MEDIUM, 2, "low_latency", False, group=None) == [], "a layer of other sizes"


@pytest.mark.parametrize(
    ("sizes", "mode", "overlaps", "words"),
    [
        (Sizes(**{**vars(MEDIUM), "hidden_size": 2880}), "low_latency", False, "hidden size 2880"),
        (SIZES, "normal", False, "--deepep-mode normal"),
        (SIZES, "auto", True, "--enable-single-batch-overlap"),
        (SIZES, "low_latency", True, "--enable-single-batch-overlap"),
    ],
)
def test_auto_falls_back_and_says_why(alone, capsys, sizes, mode, overlaps, words):
    assert chosen("auto", sizes, mode, overlaps) == chosen("auto_fused", sizes, mode, overlaps) == 0
    said = capsys.readouterr().err
    assert said.startswith("sglang-macs: DeepEP carries every batch") and words in said
    with pytest.raises(MacsNotActive, match=words):
        chosen("fused", sizes, mode, overlaps)


@pytest.mark.parametrize("dispatch", ["deepep", "bounded"])
def test_without_it_nobody_is_asked(dispatch):
    assert chosen(dispatch) == 0
    assert transport.Transports(MacsConfig(dispatch=dispatch)).state() == {"bytes": 0, "rounds": 0}


@pytest.mark.parametrize(
    ("mode", "decode", "plans"),
    [("low_latency", False, True), ("auto", False, False), ("auto", True, True)],
)
def test_planned_batches_are_fused_where_they_are_low_latency(alone, mode, decode, plans):
    """With --deepep-mode auto a prefill is planned in front of DeepEP's normal mode, and has to pay for it."""
    transports = transport.Transports(MacsConfig.from_preset(dispatch="fused", decode=decode))
    assert not transports.plans and transports.of(SIZES, 1, mode, False, group=None)
    assert transports.plans == plans


def test_a_build_without_kernels_does_not_do():
    if ops.cuda_backend() != "cuda":
        assert "no CUDA kernels" in transport.unfit_device()


SEAT = peer_memory._Seat("host", "GPU-0", 1)


@pytest.mark.parametrize(
    ("seat", "words"),
    [
        (SEAT, ""),
        (peer_memory._Seat("host", "GPU-1", 2), ""),
        (peer_memory._Seat("host", "GPU-2", 2), "no peer access between GPU 0 and GPU 2"),
        (peer_memory._Seat("host", "GPU-9", 2), "hidden from its peers"),
        (peer_memory._Seat("other", "GPU-0", 2), "another host"),
    ],
)
def test_peers_have_to_be_reachable(monkeypatch, seat, words):
    monkeypatch.setattr(peer_memory, "_gpu_id", lambda device: f"GPU-{device}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: there == 1)
    found = peer_memory._distance(SEAT, seat, 1)
    assert words in found and bool(found) == bool(words)


def test_handles_stay_on_the_host_while_a_model_is_loaded(monkeypatch):
    """SGLang loads with `torch.device("cuda")`; "meta" shows as well where a tensor is made."""
    opened = []
    monkeypatch.setattr(ops, "allocate_shared", lambda size: (torch.zeros(size, device="cpu"),) * 2)
    monkeypatch.setattr(ops, "open_shared", lambda handle: opened.append(handle.device.type) or 7)
    monkeypatch.setattr(peer_memory, "everyone", lambda value, group: [value] * 3)
    monkeypatch.setattr(peer_memory.dist, "get_rank", lambda group: 1)
    with torch.device("meta"):
        shared = peer_memory.share(8, group=None)
    assert opened == ["cpu", "cpu"] and shared.addresses[0] == shared.addresses[2] == 7


# ---- SGLang's four steps ---------------------------------------------------------------------------------------------


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Output(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    masked_m: torch.Tensor
    expected_m: int


class Impl:
    """What SGLang's low-latency implementation offers; it records that DeepEP was asked."""

    use_fp8, overlap_args = False, None

    def __init__(self):
        self.asked = []

    def dispatch_a(self, hidden_states, topk_output):
        self.asked.append("dispatch_a")
        return hidden_states, topk_output

    def dispatch_b(self, hidden_states, topk_output):
        self.asked.append("dispatch_b")
        return Output(hidden_states, None, topk_output.topk_ids, topk_output.topk_weights, None, 999)

    def combine_a(self, hidden_states, topk_ids, topk_weights):
        self.asked.append("combine_a")
        return (hidden_states,)

    def combine_b(self, hidden_states):
        self.asked.append("combine_b")
        return hidden_states


class Inner:
    """What SGLang's `DeepEPDispatcher` does around its implementation."""

    def __init__(self, impl):
        self._low_latency_dispatcher = impl

    def _get_impl(self):
        return self._low_latency_dispatcher

    def dispatch_a(self, hidden_states, topk_output):
        self._state = self._get_impl().dispatch_a(hidden_states=hidden_states, topk_output=topk_output)

    def dispatch_b(self):
        return self._get_impl().dispatch_b(*self._state)

    def combine(self, combine_input):
        hidden_states, ids, weights = combine_input
        state = self._get_impl().combine_a(hidden_states=hidden_states, topk_ids=ids, topk_weights=weights)
        return self._get_impl().combine_b(*state)


class Outer:
    def __init__(self, *inners):
        self._inners = list(inners)

    def _execute(self, name, tbo_subbatch_index=None, **kwargs):
        return getattr(self._inners[tbo_subbatch_index or 0], name)(**kwargs)


class Transport:
    """The fused dispatch as a stand-in: it plans with the composed operators and remembers its calls."""

    format = "bf16"

    def __init__(self):
        self.calls, self.noted = [], []

    def fits(self, format):
        return format == self.format

    def carry(self, layer_id, format, hidden, ids, *, awaits):
        self.calls.append(("carry", layer_id, format, awaits, ids))

    def send(self, plan, layer_id, format, tokens, *, awaits):
        self.calls.append(("send", layer_id, format, awaits))
        result = plan(tokens)
        return result._replace(own=result.own[-4:], group=result.group[-4:])

    def receive(self):
        self.calls.append(("receive",))
        return torch.zeros(4, 8, 16), None, torch.full((4,), 5)

    def offer(self, outputs, ids, weights):
        self.calls.append(("offer", outputs))

    def combine(self, ids, weights, outputs=None):
        self.calls.append(("combine", ids, weights, outputs))
        return "combined"


class AloneInGroup(LayerPlanner):
    def all_reduce(self, tensor):
        pass


def make(verify: bool = True):
    """(dispatcher, implementation, transport, counters) of one layer."""
    counters, carrier, impl = Stats(), Transport(), Impl()
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0, verify=verify), SIZES.num_experts, SIZES.num_ranks)
    planner = AloneInGroup(3, plan, group=None, counters=counters)
    wrapped = FusedLowLatency(impl, carrier, planner, Output, lambda received: carrier.noted.append(received))
    dispatcher = Outer(Inner(impl))
    deepep.plan_before(dispatcher, planner, [wrapped])
    return dispatcher, impl, carrier, counters


def routed(tokens: int = 64):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, 8, generator=g) + torch.linspace(2, 0, 8)
    weights, ids = torch.softmax(logits, -1).topk(2)
    return torch.randn(tokens, 16, generator=g), TopK(weights, ids, logits)


def forward(skip: str = ""):
    return batch.forward(batch.Batch(torch.zeros(64, dtype=torch.int32), 1, skip, group_tokens=64, measured=not skip))


def test_a_planned_batch_goes_through_the_fused_kernels():
    dispatcher, impl, carrier, counters = make()
    hidden, topk = routed()
    with forward():
        dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
        assert carrier.calls == [("send", 3, "bf16", True)], (
            "rows leave in the first step, which awaits those of others"
        )
        output = dispatcher._execute("dispatch_b")
    assert output.hidden_states.shape == (4, 8, 16) and output.masked_m.tolist() == [5] * 4
    assert output.expected_m == 16, "the mean of the group's rows, as for DeepEP"
    assert (output.topk_ids < 4).sum() == 64, "the bound holds on what is sent"
    rows = torch.ones(4, 8, 16)
    combined = dispatcher._inners[0].combine((rows, output.topk_ids, output.topk_weights))
    assert combined == "combined" and impl.asked == []
    assert [call[0] for call in carrier.calls] == ["send", "receive", "combine"], "a launch each way"
    assert carrier.calls[2][3] is rows and torch.equal(carrier.calls[2][1], output.topk_ids)
    assert counters.fused == counters.planned == 1 and counters.snapshot()["violations"]["bound"] == 0


def test_a_pass_with_decoded_rows_is_planned_before_it_is_carried():
    """The fused kernel plans every row that it sends, and those are to be left alone."""
    dispatcher, impl, carrier, counters = make()
    hidden, topk = routed()
    segment = torch.zeros(64, dtype=torch.int32)
    segment[40:] = batch.LEFT_ALONE
    with batch.forward(batch.Batch(segment, 1, "", group_tokens=64, leaves_alone=True)):
        dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
        output = dispatcher._execute("dispatch_b")
    assert impl.asked == [] and [call[0] for call in carrier.calls] == ["carry", "receive"]
    assert counters.fused == 0 and counters.planned == 1
    assert output.topk_ids is carrier.calls[0][4], "what is carried is what was planned"
    assert torch.equal(output.topk_ids[40:], topk.topk_ids[40:]) and (output.topk_ids != topk.topk_ids).any()


@pytest.mark.parametrize("skip", ["decode", "small", "outside", "draft"])
def test_what_macs_leaves_alone_is_carried_as_it_is_routed(skip):
    dispatcher, impl, carrier, counters = make()
    hidden, topk = routed()
    for planned in (False, True, False):
        with forward("" if planned else skip):
            dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
            output = dispatcher._execute("dispatch_b")
            combined = dispatcher._inners[0].combine((hidden, output.topk_ids, output.topk_weights))
        assert combined == "combined" and planned == (output.topk_ids is not topk.topk_ids)
        assert output.expected_m == (16 if planned else (64 * 2 * 2 + 8) // 8), "DeepEP's own hint where nobody knows"
    assert [call[0] for call in carrier.calls] == [
        *("carry", "receive", "combine"), *("send", "receive", "combine"), *("carry", "receive", "combine")
    ]  # fmt: skip
    assert impl.asked == [] and counters.skipped == {skip: 2} and counters.fused == 1
    assert [received.tolist() for received in carrier.noted] == [[5] * 4] * 3, "for SGLang's recorder of loads"


def test_an_idle_rank_takes_part():
    dispatcher, impl, carrier, _ = make()
    hidden, topk = routed()
    with forward("decode"):
        dispatcher._execute("dispatch_a", hidden_states=hidden[:0], topk_output=TopK(*(t[:0] for t in topk)))
        output = dispatcher._execute("dispatch_b")
        dispatcher._inners[0].combine((hidden, output.topk_ids, output.topk_weights))
    assert [call[0] for call in carrier.calls] == ["carry", "receive", "combine"] and not impl.asked


def test_halves_of_a_batch_wait_in_their_second_steps():
    """Two-batch overlap: the work of one half stands between the steps of the other."""
    impls, carriers, counters = [Impl(), Impl()], [Transport(), Transport()], Stats()
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0), SIZES.num_experts, SIZES.num_ranks)
    planner = AloneInGroup(3, plan, group=None, counters=counters)
    dispatcher = Outer(*(Inner(impl) for impl in impls))
    fused = [FusedLowLatency(impl, carrier, planner, Output) for impl, carrier in zip(impls, carriers, strict=True)]
    deepep.plan_before(dispatcher, planner, fused)
    hidden, topk = routed()
    with batch.forward(batch.Batch(skip="decode")):
        for half in range(2):
            dispatcher._execute("dispatch_a", half, hidden_states=hidden, topk_output=topk)
        for half in range(2):
            output = dispatcher._execute("dispatch_b", half)
            done = (hidden, output.topk_ids, output.topk_weights)
            assert dispatcher._execute("combine", half, combine_input=done) == "combined"
        dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)  # a whole batch again
    steps = [[(call[0], *call[3:4]) for call in carrier.calls] for carrier in carriers]
    assert [[name for name, *_ in of_half] for of_half in steps] == [
        ["carry", "receive", "offer", "combine", "carry"], ["carry", "receive", "offer", "combine"]
    ]  # fmt: skip
    assert [call[3] for call in carriers[0].calls if call[0] == "carry"] == [False, True], "who awaits the rows"


def test_a_layer_of_another_format_stays_with_deepep():
    """One region holds rows of one format: a draft model in bf16 beside a model in FP8."""
    dispatcher, impl, carrier, counters = make()
    carrier.format = "fp8"
    hidden, topk = routed()
    for skip in ("decode", ""):
        with forward(skip):
            dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
    assert impl.asked == ["dispatch_a"] * 2 and not carrier.calls and counters.planned == 1


@pytest.mark.parametrize("dtype", ["use_nvfp4", "use_mxfp4", "use_mxfp8"])
def test_formats_that_are_not_ours_stay_with_deepep_behind_the_plan(dtype):
    dispatcher, impl, carrier, counters = make()
    setattr(impl, dtype, True)
    hidden, topk = routed()
    with forward():
        dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
    assert impl.asked == ["dispatch_a"] and carrier.calls == []
    assert counters.planned == 1 and counters.fused == 0


SGLANG_SIDE = """
import inspect, json
from sglang.srt.layers.moe.token_dispatcher import deepep
from sglang.srt.layers.moe.utils import DeepEPMode, is_sbo_enabled
impl = deepep._DeepEPDispatcherImplLowLatency
steps = ("dispatch_a", "dispatch_b", "combine_a", "combine_b")
print(json.dumps({
    "fields": deepep.DeepEPLLDispatchOutput._fields,
    "parameters": {name: list(inspect.signature(getattr(impl, name)).parameters) for name in steps},
    "modes": [mode.value for mode in DeepEPMode],
    "source": inspect.getsource(deepep._DeepEPDispatcherImplBase) + inspect.getsource(deepep.DeepEPDispatcher)
    + inspect.getsource(impl),
}))
"""


def test_the_stand_ins_are_what_sglang_has():
    env = {**os.environ, **environment(1)}
    done = subprocess.run([sys.executable, "-c", SGLANG_SIDE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert tuple(found["fields"]) == Output._fields
    for step in ("dispatch_a", "combine_a"):
        assert found["parameters"][step] == list(inspect.signature(getattr(Impl, step)).parameters)
    assert sorted(found["modes"]) == ["auto", "low_latency", "normal"]
    used = ("use_fp8", "use_nvfp4", "use_mxfp4", "use_mxfp8", "overlap_args", "num_max_dispatch_tokens_per_rank")
    assert all(f"self.{name} = " in found["source"] or f'"{name}"' in found["source"] for name in used)
    calls = (
        "get_global_expert_distribution_recorder().on_deepep_dispatch_low_latency(",
        "_get_impl()",
        "_low_latency_dispatcher",
        "deepep_mode",
        "dispatch_b(*inner_state)",
        "combine_b(*inner_state)",
    )
    assert all(call in found["source"] for call in calls)


# ---- Faults in words ------------------------------------------------------------------------------------------------


def status(fault: int, peer: int = 1, block: int = 2, layer: int = 3, limit_ms: int = 8000) -> torch.Tensor:
    packed = bytes(fc.FusedStatus(fault, peer, block, layer, 7, limit_ms, 5, 6))
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def seen(fault: int, **options: int) -> peer_status.Record | None:
    return peer_status.read(status(fault, **options))


@pytest.fixture
def dispatched() -> FusedDispatch:
    """With memory of its own, before its first dispatch."""
    memory = torch.zeros(FusedDispatch.region_bytes(SIZES, 4), dtype=torch.uint8)
    return FusedDispatch(MacsConfig(), SIZES, PeerMemory(0, memory, [0, 0]), 4)


def test_a_fault_names_rank_layer_and_stage(dispatched):
    """As the device has recorded it: the host has not counted what a graph replays."""
    dispatched._raise_for(seen(0))
    words = r"rank 1 \(block 2\) never sent its assignments in layer 3, says rank 0 .*every rank within 8 s"
    with pytest.raises(MacsError, match=words):
        dispatched._raise_for(seen(fc.FAULTS.index("assignments")))
    with pytest.raises(MacsError, match=r"rank 1 claims more tokens than there may be in layer 0.*within 200 s"):
        dispatched._raise_for(seen(fc.FAULTS.index("bad tokens"), block=-1, layer=0, limit_ms=200_000))


class Event:
    """Of a stream whose work ends when `done` says so."""

    done = 0

    def __init__(self):
        self.number = None

    def record(self):
        Event.recorded = self.number = getattr(Event, "recorded", 0) + 1

    def query(self):
        return self.number <= Event.done

    def synchronize(self):
        Event.done = max(Event.done, self.number)


@pytest.fixture
def events(monkeypatch):
    """Events of one stream, and copies that are there at once."""
    Event.done = Event.recorded = 0
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    return Event


def test_every_pass_is_looked_at_though_the_host_is_ahead(events):
    """With SGLang's overlapped schedule a pass is launched before the one before is done."""
    watch, good, bad = peer_status.Watch(), status(0), status(2, peer=4)
    for said in (good, good, bad):
        assert watch.look(said) is None, "nothing has arrived"
    events.done = 2
    assert watch.arrived() is None
    events.done = 3
    assert watch.arrived().peer == 4 and watch.arrived() is None
    for _ in range(100):
        watch.look(good)
    assert len(watch._on_their_way) == peer_status.MOST_ON_THEIR_WAY, "a device that stands still costs no memory"


def test_tokens_of_a_pass_without_a_rank_do_not_leave(dispatched, events, monkeypatch):
    """SGLang waits for its copies inside process_batch_result, and takes the tokens behind that."""
    transports = transport.Transports(MacsConfig.from_preset(dispatch="fused"))
    monkeypatch.setattr(scheduler.worker, "current", lambda: SimpleNamespace(transports=transports))
    left = []

    def original(self, batch, result):
        result.copy_done.synchronize()
        assert result.copy_done.query()
        left.append(batch)

    def process(batch: str) -> None:
        copied = Event()
        copied.record()
        scheduler._process_batch_result(original, None, batch, SimpleNamespace(copy_done=copied))

    process("before there is a region")
    transports._made = [dispatched]
    dispatched._set_format("bf16")
    transports.check()
    process("a good pass")
    dispatched._status().copy_(status(2))
    transports.check()  # behind the launch of the pass, which is not done
    with pytest.raises(MacsError, match=r"rank 1 .* never sent its assignments in layer 3"):
        process("a pass without rank 1")
    assert left == ["before there is a region", "a good pass"]


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """(operator, phase, layer, seconds) of every launch, in place of the kernels."""
    made = []

    def note(name: str, phase: str, given: dict) -> None:
        made.append((name, phase, given["layer"], given["timeout_ns"] // 10**9))

    def dispatch(*_, phase, **given):
        note("dispatch", phase, given)
        return (torch.zeros(1, 4),) * 6

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops, "fused_dispatch", dispatch)
    monkeypatch.setattr(ops, "fused_carry", lambda *_, phase, **given: note("carry", phase, given))
    monkeypatch.setattr(ops, "fused_receive", lambda *_, **given: note("receive", "", given))
    monkeypatch.setattr(ops, "fused_combine", lambda *_, phase, **given: note("combine", phase, given))
    return made


ROUTING = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4)


def a_dispatch(carrier: FusedDispatch, layer: int = 0, awaits: bool = False) -> None:
    carrier.carry(layer, "fp8", torch.zeros(1, 2048), ROUTING[0], awaits=awaits)
    carrier.receive()
    carrier.combine(*ROUTING)


def test_a_whole_batch_is_one_launch_each_way(dispatched, launches):
    def planned(layer: int, awaits: bool) -> None:
        plan = SimpleNamespace(fused_options=lambda device: {})
        tokens = RoutedTokens(torch.zeros(1, 2048), *ROUTING, None, torch.zeros(1), 1)
        dispatched.send(plan, layer, "fp8", tokens, awaits=awaits)
        dispatched.receive()

    planned(3, awaits=True)
    a_dispatch(dispatched, 4, awaits=True)
    dispatched.combine(*ROUTING, torch.zeros(4, 128, 2048))
    assert launches == [
        *(("dispatch", "both", 3, 200), ("carry", "both", 4, 200)),
        *(("combine", "receive", 4, 200), ("combine", "both", 4, 200)),
    ]
    launches.clear()
    planned(5, awaits=False)
    a_dispatch(dispatched, layer=6)
    assert launches[:2] == [("dispatch", "send", 5, 200), ("receive", "", 5, 200)]
    assert launches[2:] == [("carry", "send", 6, 200), ("receive", "", 6, 200), ("combine", "receive", 6, 200)]


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("intermediate", [512, 1024], ids=["", "first result as wide"])
def test_experts_write_where_combine_reads(dispatched, launches, monkeypatch, format, intermediate):
    """Of the two GEMMs of a layer the second one's result; a first one as wide as the model is not taken for it."""
    given = []
    monkeypatch.setattr(ops, "fused_combine", lambda *args, **_: given.append(args[-1]))
    transports = transport.Transports(MacsConfig.from_preset(dispatch="fused"))
    transports._made = [FusedDispatch(MacsConfig(), SIZES, dispatched.memory, 4), dispatched]  # one for each half
    transports.place_outputs(torch.zeros(2), torch.zeros(2))  # of a layer before any dispatch
    for _ in range(2):
        dispatched.carry(0, format, torch.zeros(1, 2048), ROUTING[0], awaits=True)
        rows, _, _ = dispatched.receive()
        first = torch.full((4, 128, 2 * intermediate), 1.0, dtype=torch.bfloat16)
        activated, outputs = first[..., :intermediate].clone(), torch.full((4, 128, 2048), 3.0, dtype=torch.bfloat16)
        transports.place_outputs(rows, first)
        assert (first == 1.0).all()
        transports.place_outputs(activated, outputs)
        outputs.fill_(5.0)  # the GEMM
        assert (dispatched._outputs() == 5.0).all() and outputs.shape == (4, 128, 2048)
        dispatched.combine(*ROUTING, outputs)
        assert given.pop() is None, "nothing is left to copy"
        dispatched._outputs().zero_()
    elsewhere = torch.full((4, 128, 2048), 3.0, dtype=torch.bfloat16)
    transports.place_outputs(activated, elsewhere)  # of a layer that DeepEP has fed
    assert (elsewhere == 3.0).all() and elsewhere.data_ptr() != outputs.data_ptr()
    dispatched.combine(*ROUTING, elsewhere)
    assert given.pop() is elsewhere, "another runner's outputs are copied"


def test_how_long_a_rank_is_waited_for(dispatched, launches, monkeypatch):
    """Three ranks of four died while one compiled, with empty caches, before its first dispatch. In a graph nobody
    compiles, and the limit is that of its capture, however often it is replayed.
    """
    for before, capturing, seconds in (
        (0, False, 200), (fused.FIRST_EPOCHS - 1, False, 200), (fused.FIRST_EPOCHS, False, 30), (0, True, 8)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        dispatched._launched = before
        a_dispatch(dispatched)
        assert [launches.pop()[3] for _ in range(3)] == [seconds] * 3 and not launches


def _recover(rank: int, world: int) -> tuple[int, int]:
    """One rank that recovers from a fault: its region's epoch, and what is left of the fault."""
    torch.cuda.synchronize = lambda: None
    size = FusedDispatch.region_bytes(SIZES, 4)
    carrier = FusedDispatch(MacsConfig(), SIZES, PeerMemory(rank, torch.zeros(size, dtype=torch.uint8), [0, 0]), 4)
    carrier._set_format("fp8")
    carrier._part("epoch", torch.int32, 1).fill_(5 + rank)  # the other rank gave up before it began
    carrier._status().copy_(status(2))
    scales = carrier.memory.own[carrier._layout.row_scales : carrier._layout.scales]
    scales.fill_(7)  # of rows that nobody received
    carrier.recover(torch.distributed.group.WORLD)
    left = int(carrier._status().sum()) + int(scales.sum())
    return carrier.epoch(), left


def test_ranks_that_recover_agree_on_an_epoch_and_forget_the_fault():
    assert run_ranks(2, _recover) == [(7, 0)] * 2


def test_rows_that_nobody_received_stop_the_next_layer(dispatched, launches):
    for layer in (0, 1):
        a_dispatch(dispatched, layer)
    dispatched.carry(2, "fp8", torch.zeros(1, 2048), ROUTING[0])
    with pytest.raises(MacsError, match=r"layer 3 sent.*layer 2 received before"):
        dispatched.carry(3, "fp8", torch.zeros(1, 2048), ROUTING[0])


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_what_the_runner_is_handed_lies_as_deepgemm_wants_it(dispatched, format):
    assert dispatched.fits("bf16") and dispatched.fits("fp8"), "the first layer says"
    dispatched._set_format(format)
    assert dispatched.fits(format) and not dispatched.fits("fp8" if format == "bf16" else "bf16")
    rows, scales, m = dispatched.rows(), dispatched.scales(), dispatched.shape.expert_rows
    assert rows.shape == (4, m, 2048) and rows.is_contiguous()
    if format == "bf16":
        assert scales is None
    else:
        assert rows.dtype == torch.float8_e4m3fn
        assert scales.shape == (4, m, 16) and scales.stride() == (16 * m, 1, m) and m % 4 == 0
    with pytest.raises(MacsError, match="as the layers before"):
        dispatched._set_format("fp8" if format == "bf16" else "bf16")
