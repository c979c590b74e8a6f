"""The fused dispatch around its kernels, on the CPU: sizes, choice of transport, SGLang's four steps, faults in words.

The kernels themselves run in test_fused_emulated.py; here stand-ins record what they are handed.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from support import fused_c as fc
from support.ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_macs import ops
from sglang_macs.comm import peer_memory, peer_status
from sglang_macs.comm.peer_memory import PeerMemory
from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch import fused, transport
from sglang_macs.dispatch.fused import FusedDispatch, Sizes, region_shape, rows_per_expert, unsupported
from sglang_macs.dispatch.low_latency import FusedLowLatency
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep
from sglang_macs.errors import MacsError, MacsNotActive
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

SIZES = Sizes(num_ranks=2, num_experts=8, top_k=2, max_tokens=64, hidden_size=2048)
MEDIUM = Sizes(num_ranks=8, num_experts=128, top_k=8, max_tokens=128, hidden_size=2048)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


def test_layout_and_faults_are_those_of_the_kernels():
    assert ops.RegionShape._fields == tuple(name for name, _ in fc.FusedShape._fields_)
    assert ops.RegionLayout._fields == tuple(name for name, _ in fc.FusedLayout._fields_)
    assert len(peer_status.FAULTS) == len(fc.FAULTS) and ctypes.sizeof(fc.FusedStatus) == peer_status.SIZE
    layout = ops.fused_layout(region_shape(MacsConfig(), SIZES, "fp8", 4))
    assert list(layout) == sorted(layout) and all(offset % 256 == 0 for offset in layout)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scope": "expert", "gamma": 1.0, "rho": 0.0}, 8192 // 128 + 4),  # 8192 assignments, and one for rounding
        ({"scope": "expert", "gamma": 1.0, "rho": 0.5}, 80 + 4),
        ({"scope": "expert", "gamma": 1.0, "rho": 0.0, "c_min": 100.0}, 104),
        ({"scope": "rank", "gamma": 0.5}, 516),
        ({"scope": "rank", "gamma": 1.1}, 1024),  # a rank may hold more than every token of one expert
        ({"scope": "expert", "gamma": math.inf}, 1024),
        ({"scope": "expert", "gamma": 1.0, "load": "effective"}, 1024),  # units bound rows by a factor of 256 only
    ],
)
def test_rows_of_an_expert_follow_the_bound(options, expected):
    config = MacsConfig.from_preset(**options)
    assert rows_per_expert(config, MEDIUM) == expected
    saved = FusedDispatch.saved_bytes(config, MEDIUM)
    assert saved == (1024 - expected) * 16 * 2048 * 4


def test_no_plan_exceeds_the_rows_of_its_region():
    """A bound computed at run time, from any number of assignments, against the room made beforehand."""
    for gamma in (0.3, 1.0, 1.1):
        config = MacsConfig.from_preset("rank", scope="expert", gamma=gamma, reroute="none")
        sizes = Sizes(2, 8, 2, 40, 2048)
        plan = Plan(config, 8, 2, torch.ones(8, dtype=torch.int8))
        tokens = sizes.num_ranks * sizes.max_tokens
        ids = torch.stack([torch.zeros(tokens), torch.ones(tokens)], 1).long()
        segment = torch.zeros(tokens, dtype=torch.int32)
        hidden = torch.randn(tokens, 32)
        result = plan(RoutedTokens(hidden, ids, torch.full((tokens, 2), 0.5), torch.zeros(tokens, 8), segment, 1))
        kept = torch.bincount(result.topk_ids[result.topk_ids >= 0], minlength=8)
        assert 0 < int(kept.max()) <= rows_per_expert(config, sizes)


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
    shape = region_shape(MacsConfig(), SIZES, "bf16", 4)
    plan = Plan(MacsConfig(), SIZES.num_experts, SIZES.num_ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        region = torch.empty(ops.fused_layout(shape).bytes, dtype=torch.uint8, device="meta")
        hidden = torch.empty((5, 2048), dtype=torch.bfloat16, device="meta")
        ids, weights = torch.empty((5, 2), dtype=torch.int64, device="meta"), torch.empty((5, 2), device="meta")
        segment = torch.empty(5, dtype=torch.int32, device="meta")
        options = plan.fused_options(region.device) | {"num_segments": 1, "phase": "send", "timeout_ns": 1}
        out = ops.fused_dispatch(region, [0, 0], 0, shape, hidden, ids, weights, segment, None, **options)
        combined = ops.fused_combine(region, [0, 0], 0, shape, ids, weights, None, phase="both", timeout_ns=1)
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
        num_blocks=4, region_bytes=FusedDispatch.region_bytes, saved_bytes=FusedDispatch.saved_bytes
    ))  # fmt: skip


def chosen(dispatch: str, sizes: Sizes = SIZES, mode: str = "low_latency", overlaps: bool = False) -> int:
    transports = transport.Transports(MacsConfig.from_preset(dispatch=dispatch))
    return len(transports.of(sizes, 2, mode, overlaps, group=None))


def test_auto_takes_the_fused_dispatch_and_says_so_once(alone, capsys):
    transports = transport.Transports(MacsConfig.from_preset(dispatch="auto", scope="expert"))
    made = transports.of(SIZES, 2, "low_latency", False, group=None)
    assert len(made) == 2 and transports.of(SIZES, 2, "low_latency", False, group=None) is made
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the fused dispatch carries planned low-latency batches" in said
    assert transports.of(MEDIUM, 2, "low_latency", False, group=None) == [], "a layer of other sizes"


@pytest.mark.parametrize(
    ("sizes", "mode", "overlaps", "words"),
    [
        (Sizes(**{**vars(MEDIUM), "hidden_size": 2880}), "low_latency", False, "hidden size 2880"),
        (SIZES, "normal", False, "--deepep-mode normal"),
        (SIZES, "auto", False, "--deepep-mode auto"),
        (SIZES, "low_latency", True, "--enable-single-batch-overlap"),
    ],
)
def test_auto_falls_back_and_says_why(alone, capsys, sizes, mode, overlaps, words):
    assert chosen("auto", sizes, mode, overlaps) == 0
    said = capsys.readouterr().err
    assert said.startswith("sglang-macs: DeepEP carries every batch") and words in said
    with pytest.raises(MacsNotActive, match=words):
        chosen("fused", sizes, mode, overlaps)


def test_deepep_is_the_default_and_asks_nobody():
    assert chosen(MacsConfig().dispatch) == 0 and MacsConfig().dispatch == "deepep"


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

    def __init__(self):
        self.calls = []

    def send(self, plan, layer_id, format, tokens):
        self.calls.append(("send", layer_id, format))
        result = plan(tokens)
        return result._replace(own=result.own[-4:], group=result.group[-4:])

    def receive(self):
        self.calls.append(("receive",))
        return torch.zeros(4, 8, 16), None, torch.full((4,), 5)

    def offer(self, outputs, ids, weights):
        self.calls.append(("offer", outputs))

    def combine(self, ids, weights):
        self.calls.append(("combine", ids, weights))
        return "combined"


class AloneInGroup(LayerPlanner):
    def all_reduce(self, tensor):
        pass


def make(verify: bool = True):
    """(dispatcher, implementation, transport, counters) of one layer."""
    counters, carrier, impl = Stats(), Transport(), Impl()
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.0, verify=verify), SIZES.num_experts, SIZES.num_ranks)
    planner = AloneInGroup(3, plan, group=None, counters=counters)
    wrapped = FusedLowLatency(impl, carrier, planner, Output)
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
        assert carrier.calls == [("send", 3, "bf16")], "rows leave in the first step"
        output = dispatcher._execute("dispatch_b")
    assert output.hidden_states.shape == (4, 8, 16) and output.masked_m.tolist() == [5] * 4
    assert output.expected_m == 16, "the mean of the group's rows, as for DeepEP"
    assert (output.topk_ids < 4).sum() == 64, "the bound holds on what is sent"
    rows = torch.ones(4, 8, 16)
    combined = dispatcher._inners[0].combine((rows, output.topk_ids, output.topk_weights))
    assert combined == "combined" and impl.asked == []
    assert [call[0] for call in carrier.calls] == ["send", "receive", "offer", "combine"]
    assert carrier.calls[2][1] is rows and torch.equal(carrier.calls[3][1], output.topk_ids)
    assert counters.fused == counters.planned == 1 and counters.snapshot()["violations"]["bound"] == 0


def test_a_pass_with_decoded_rows_is_planned_in_front_of_deepep():
    """The fused kernel plans every row that it sends, and those are to be left alone."""
    dispatcher, impl, carrier, counters = make()
    hidden, topk = routed()
    segment = torch.zeros(64, dtype=torch.int32)
    segment[40:] = batch.LEFT_ALONE
    with batch.forward(batch.Batch(segment, 1, "", group_tokens=64, leaves_alone=True)):
        dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
        output = dispatcher._execute("dispatch_b")
    assert (
        impl.asked == ["dispatch_a", "dispatch_b"]
        and not carrier.calls
        and counters.fused == 0
        and counters.planned == 1
    )
    assert torch.equal(output.topk_ids[40:], topk.topk_ids[40:]) and (output.topk_ids != topk.topk_ids).any()


@pytest.mark.parametrize("skip", ["decode", "small", "outside"])
def test_what_macs_leaves_alone_goes_through_deepep(skip):
    dispatcher, impl, carrier, counters = make()
    hidden, topk = routed()
    for planned in (False, True, False):
        with forward("" if planned else skip):
            dispatcher._execute("dispatch_a", hidden_states=hidden, topk_output=topk)
            output = dispatcher._execute("dispatch_b")
            dispatcher._inners[0].combine((hidden, output.topk_ids, output.topk_weights))
    assert impl.asked == ["dispatch_a", "dispatch_b", "combine_a", "combine_b"] * 2
    assert len(carrier.calls) == 4 and counters.skipped == {skip: 2}


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
    "source": inspect.getsource(deepep._DeepEPDispatcherImplBase) + inspect.getsource(deepep.DeepEPDispatcher),
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
        "_get_impl()",
        "_low_latency_dispatcher",
        "deepep_mode",
        "dispatch_b(*inner_state)",
        "combine_b(*inner_state)",
    )
    assert all(call in found["source"] for call in calls)


# ---- Faults in words ------------------------------------------------------------------------------------------------


def status(fault: int, peer: int = 1, block: int = 2, in_round: int = 7) -> torch.Tensor:
    packed = bytes(fc.FusedStatus(fault, peer, block, in_round, 5, 6))
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def seen(fault: int, **options: int) -> peer_status.Record | None:
    return peer_status.read(status(fault, **options))


@pytest.fixture
def dispatched() -> FusedDispatch:
    """After eight dispatches of layers 0 to 3, twice."""
    carrier = FusedDispatch(MacsConfig(), SIZES, PeerMemory(0, torch.zeros(1), [0, 0]), 4)
    carrier._layers.extend([0, 1, 2, 3, 0, 1, 2, 3])
    carrier._round = 8
    return carrier


def test_a_fault_names_rank_layer_and_stage(dispatched):
    dispatched._raise_for(seen(0))
    with pytest.raises(MacsError, match=r"rank 1 \(block 2\) never sent its assignments in layer 2, says rank 0"):
        dispatched._raise_for(seen(fc.FAULTS.index("assignments")))
    with pytest.raises(MacsError, match="rank 1 claims more tokens than there may be"):
        dispatched._raise_for(seen(fc.FAULTS.index("bad tokens"), block=-1))
    with pytest.raises(MacsError, match="layer unknown"):
        dispatched._raise_for(seen(fc.FAULTS.index("rows"), in_round=2**31))


def test_a_rank_that_compiles_its_first_kernels_is_waited_for_longer(dispatched, monkeypatch):
    """Three ranks of four died while one compiled, with empty caches, before its first dispatch."""
    limits = []
    monkeypatch.setattr(ops, "fused_dispatch", lambda *_, timeout_ns, **__: limits.append(timeout_ns) or (None,) * 6)
    monkeypatch.setattr(ops, "fused_receive", lambda *where: limits.append(where[-1]))
    monkeypatch.setattr(ops, "fused_combine", lambda *_, timeout_ns, **__: limits.append(timeout_ns))
    size = FusedDispatch.region_bytes(MacsConfig(), SIZES, 4)
    dispatched.memory = PeerMemory(0, torch.zeros(size, dtype=torch.uint8), [0, 0])
    tokens = RoutedTokens(torch.zeros(1, 2048), torch.zeros(1, 4), torch.zeros(1, 4), None, torch.zeros(1), 1)
    for before, seconds in ((0, 200), (fused.FIRST_ROUNDS - 1, 200), (fused.FIRST_ROUNDS, 30)):
        dispatched._round = before
        dispatched.send(SimpleNamespace(fused_options=lambda device: {}), 0, "fp8", tokens)
        dispatched.receive()
        dispatched.combine(tokens.topk_ids, tokens.topk_weights)
        assert {limits.pop() for _ in range(3)} == {seconds * 10**9} and not limits
    for in_round, said in ((7, "within 200 s"), (fused.FIRST_ROUNDS + 1, "within 30 s")):
        with pytest.raises(MacsError, match=said):
            dispatched._raise_for(seen(fc.FAULTS.index("assignments"), in_round=in_round))


def _recover(rank: int, world: int) -> tuple[int, int, int]:
    """One rank that recovers from a fault: its host's round, its region's round, and what is left of the fault."""
    torch.cuda.synchronize = lambda: None
    size = FusedDispatch.region_bytes(MacsConfig(), SIZES, 4)
    carrier = FusedDispatch(MacsConfig(), SIZES, PeerMemory(rank, torch.zeros(size, dtype=torch.uint8), [0, 0]), 4)
    carrier._set_format("fp8")
    carrier._part("round", torch.int32, 1).fill_(5 + rank)  # the other rank gave up before it began
    carrier._status().copy_(status(2))
    scales = carrier.memory.own[carrier._layout.row_scales : carrier._layout.scales]
    scales.fill_(7)  # of rows that nobody received
    carrier.recover(torch.distributed.group.WORLD)
    left = int(carrier._status().sum()) + int(scales.sum())
    return carrier._round, int(carrier._part("round", torch.int32, 1)), left


def test_ranks_that_recover_agree_on_a_round_and_forget_the_fault():
    assert run_ranks(2, _recover) == [(7, 7, 0)] * 2


def test_rows_that_nobody_received_stop_the_next_layer(dispatched, monkeypatch):
    monkeypatch.setattr(ops, "fused_dispatch", lambda *_, **__: (None,) * 6)
    monkeypatch.setattr(ops, "fused_receive", lambda *_: None)
    size = FusedDispatch.region_bytes(MacsConfig(), SIZES, 4)
    dispatched.memory = PeerMemory(0, torch.zeros(size, dtype=torch.uint8), [0, 0])
    tokens = RoutedTokens(torch.zeros(1, 2048), torch.zeros(1, 4), torch.zeros(1, 4), None, torch.zeros(1), 1)
    plan = SimpleNamespace(fused_options=lambda device: {})
    for layer in (0, 1):
        dispatched.send(plan, layer, "fp8", tokens)
        dispatched.receive()
    dispatched.send(plan, 2, "fp8", tokens)
    with pytest.raises(MacsError, match=r"layer 3 sent.*layer 2 received before"):
        dispatched.send(plan, 3, "fp8", tokens)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_what_the_runner_is_handed_lies_as_deepgemm_wants_it(dispatched, format):
    size = FusedDispatch.region_bytes(MacsConfig(), SIZES, 4)
    dispatched.memory = PeerMemory(0, torch.zeros(size, dtype=torch.uint8), [0, 0])
    dispatched._set_format(format)
    rows, scales, m = dispatched.rows(), dispatched.scales(), dispatched.shape.expert_rows
    assert rows.shape == (4, m, 2048) and rows.is_contiguous()
    if format == "bf16":
        assert scales is None
    else:
        assert rows.dtype == torch.float8_e4m3fn
        assert scales.shape == (4, m, 16) and scales.stride() == (16 * m, 1, m) and m % 4 == 0
    with pytest.raises(MacsError, match="as the layers before"):
        dispatched._set_format("fp8" if format == "bf16" else "bf16")
