"""SGLang's four steps of a low-latency batch over the fused dispatch; stand-ins record who was asked."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch.low_latency import FusedLowLatency
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep
from sglang_macs.observe.stats import Stats
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from tests.support.fused_dispatch import SIZES


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
