"""The plan in front of DeepEP's dispatcher, with a stand-in of SGLang's classes: what it is handed, half by half, and
which of DeepEP's modes carries what under `--deepep-mode auto`.
"""

import math
from typing import NamedTuple

import pytest
import torch

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.low_latency import FusedLowLatency
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep
from sglang_macs.observe.demand import GivenUp
from sglang_macs.observe.stats import Stats, rows_of
from sglang_macs.plan import batch
from sglang_macs.plan.places import Places
from sglang_macs.plan.plan import Plan

EXPERTS, RANKS, TOP_K, TOKENS = 8, 2, 2, 64


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class Output(NamedTuple):
    topk_ids: torch.Tensor
    expected_m: int


class Inner:
    """What SGLang's `DeepEPDispatcher` does around its two steps."""

    def dispatch_a(self, hidden_states, topk_output):
        self.sent = topk_output

    def dispatch_b(self):
        return Output(self.sent.topk_ids, expected_m=999)

    def dispatch(self, hidden_states, topk_output):
        self.dispatch_a(hidden_states, topk_output)
        return self.dispatch_b()


class MaybeTbo:
    """What SGLang's `MaybeTboDeepEPDispatcher` does: an inner dispatcher for each half."""

    def __init__(self):
        self._inners = [Inner(), Inner()]

    def _execute(self, name, tbo_subbatch_index=None, **kwargs):
        return getattr(self._inners[tbo_subbatch_index or 0], name)(**kwargs)

    def dispatch(self, **kwargs):
        return self._execute("dispatch", **kwargs)

    def dispatch_a(self, **kwargs):
        return self._execute("dispatch_a", **kwargs)

    def dispatch_b(self, **kwargs):
        return self._execute("dispatch_b", **kwargs)


class AloneInGroup(LayerPlanner):
    def all_reduce(self, tensor):
        pass


@pytest.fixture
def planned():
    """(dispatcher, counters): the plan in front of the stand-in."""
    counters = Stats()
    config = MacsConfig.from_preset("rank", gamma=1.0, verify=True)
    planner = AloneInGroup(0, Plan(config, EXPERTS, RANKS), group=None, counters=counters)
    dispatcher = MaybeTbo()
    deepep.plan_before(dispatcher, planner)
    return dispatcher, counters


def routed(tokens: int = TOKENS):
    """Hidden states and a top-k that favours the first rank."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(tokens, EXPERTS, generator=g) + torch.linspace(2, 0, EXPERTS)
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    return torch.randn(tokens, 16, generator=g), TopK(weights, ids, logits)


def per_rank(ids):
    return rows_of(ids, EXPERTS).view(RANKS, -1).sum(1)


def test_what_is_sent_keeps_the_bound_and_the_hint_is_the_mean(planned):
    dispatcher, counters = planned
    hidden, topk = routed()
    assert per_rank(topk.topk_ids).max() > TOKENS
    now = batch.Batch(torch.zeros(TOKENS, dtype=torch.int32), 1, "", group_tokens=TOKENS, measured=True)
    with batch.forward(now):
        output = dispatcher.dispatch(hidden_states=hidden, topk_output=topk)
    assert per_rank(output.topk_ids).tolist() == [TOKENS, TOKENS]
    assert output.expected_m == TOKENS * TOP_K // EXPERTS
    counted = counters.snapshot()
    assert counted["checks"]["bound"] == 1 and counted["violations"]["bound"] == 0


def test_each_half_is_planned_with_its_own_mask(planned):
    dispatcher, counters = planned
    hidden, topk = routed()
    segment = torch.full((TOKENS,), -1, dtype=torch.int32)
    segment[: TOKENS // 2] = 0  # the first half is visual, the second text
    halves = ((0, TOKENS // 2), (TOKENS // 2, TOKENS))
    with batch.forward(batch.Batch(segment, 1, "", group_tokens=TOKENS, halves=halves)):
        for i, (start, end) in enumerate(halves):
            part = TopK(*(t[start:end] for t in topk))
            dispatcher.dispatch_a(hidden_states=hidden[start:end], topk_output=part, tbo_subbatch_index=i)
        outputs = [dispatcher.dispatch_b(tbo_subbatch_index=i) for i in range(2)]
    assert [output.expected_m for output in outputs] == [999, 999]  # nobody knows the halves of the other ranks
    assert all(per_rank(output.topk_ids).max() <= TOKENS // 2 for output in outputs)
    kept_clipped_rerouted = counters.to_host().outcome
    assert kept_clipped_rerouted[1].min() > 0, "both halves clip: one visual assignments, the other text"
    assert kept_clipped_rerouted[:2].sum(dim=0).tolist() == [TOKENS // 2 * TOP_K] * 2


@pytest.mark.parametrize("skip", ["decode", "outside"])
def test_a_skipped_batch_passes_untouched(planned, skip):
    dispatcher, counters = planned
    hidden, topk = routed()
    with batch.forward(batch.Batch(skip=skip)):
        output = dispatcher.dispatch(hidden_states=hidden, topk_output=topk)
    assert output == (topk.topk_ids, 999) and counters.skipped == {skip: 1} and not counters.planned


def test_padded_rows_of_an_idle_rank_go_nowhere(planned):
    """SGLang 0.5.21, two-batch overlap: rows in decode, and a top-k of none."""
    dispatcher, _ = planned
    empty = TopK(torch.empty(0, TOP_K), torch.empty((0, TOP_K), dtype=torch.int64), torch.empty(0, TOP_K))
    with batch.forward(batch.Batch(skip="decode")):
        dispatcher.dispatch_a(hidden_states=torch.zeros(3, 16), topk_output=empty)
        assert dispatcher.dispatch_b().topk_ids.tolist() == [[-1] * TOP_K] * 3
        assert dispatcher._inners[0].sent.topk_weights.tolist() == [[0.0] * TOP_K] * 3
        dispatcher.dispatch_a(hidden_states=torch.zeros(0, 16), topk_output=empty)
        assert dispatcher.dispatch_b().topk_ids.shape == (0, TOP_K)


# ---- `--deepep-mode auto` --------------------------------------------------------------------------------------------


class AutoInner:
    """What SGLang's `DeepEPDispatcher` does with mode auto: `is_extend_in_batch` chooses, which all ranks have alike
    (engine/agreement.py).
    """

    def __init__(self):
        self.extends = False
        self._normal_dispatcher, self._low_latency_dispatcher = Implementation("normal"), Implementation("low latency")

    def _get_impl(self):
        return self._normal_dispatcher if self.extends else self._low_latency_dispatcher

    def dispatch_a(self, hidden_states, topk_output):
        self._state = self._get_impl().dispatch_a(hidden_states=hidden_states, topk_output=topk_output)

    def dispatch_b(self):
        return self._get_impl().dispatch_b(*self._state)


class Implementation:
    use_fp8, overlap_args = False, None

    def __init__(self, mode: str):
        self.mode, self.sent = mode, []

    def dispatch_a(self, hidden_states, topk_output):
        self.sent.append(topk_output.topk_ids)
        return (topk_output.topk_ids,)

    def dispatch_b(self, *state):
        return state[0]

    def combine_a(self, hidden_states, topk_ids, topk_weights):
        raise AssertionError("not asked for here")

    combine_b = combine_a


class Carrier:
    """In the place of the fused dispatch."""

    def __init__(self):
        self.carried, self.planned = [], 0

    def fits(self, format):
        return True

    def carry(self, layer_id, format, hidden_states, topk_ids, *, awaits):
        self.carried.append(topk_ids)

    def send(self, plan, layer_id, format, tokens, *, awaits):
        self.planned += 1
        return plan(tokens)

    def receive(self):
        return None, None, None


class LowLatencyOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    masked_m: torch.Tensor
    expected_m: int


@pytest.fixture
def auto():
    """(dispatch, normal mode's ids, carrier, counters): a server with --deepep-mode auto and --macs-dispatch fused."""
    counters, carrier, inner, dispatcher = Stats(), Carrier(), AutoInner(), MaybeTbo()
    config = MacsConfig.from_preset("rank", gamma=1.0, dispatch="fused")
    planner = AloneInGroup(0, Plan(config, EXPERTS, RANKS), group=None, counters=counters)
    dispatcher._inners = [inner]
    fused = FusedLowLatency(inner._low_latency_dispatcher, carrier, planner, LowLatencyOutput)
    deepep.plan_before(dispatcher, planner, [fused])

    def dispatch(now: batch.Batch, tokens: int = TOKENS, extends: bool = False):
        inner.extends = extends
        fused._sent = None  # as combine leaves it
        hidden, topk = routed(tokens)
        with batch.forward(now):
            dispatcher.dispatch_a(hidden_states=hidden, topk_output=topk)
            return topk.topk_ids, dispatcher.dispatch_b()

    return dispatch, inner._normal_dispatcher.sent, carrier, counters


@pytest.mark.parametrize("gamma", [1.0, math.inf])
def test_a_plan_with_replicas_stands_before_the_fused_dispatch(gamma):
    """Its kernel knows none: it carries what was planned, to physical experts."""
    first = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    config = MacsConfig.from_preset("rank", gamma=gamma, dispatch="fused")
    plan = Plan(config, EXPERTS, RANKS, places=Places(EXPERTS, len(first), RANKS, 0, first))
    counters, carrier, implementation = Stats(), Carrier(), Implementation("low latency")
    inner, dispatcher = AutoInner(), MaybeTbo()
    inner._low_latency_dispatcher, dispatcher._inners = implementation, [inner]
    planner = AloneInGroup(0, plan, group=None, counters=counters)
    fused, given_up = FusedLowLatency(implementation, carrier, planner, LowLatencyOutput), GivenUp()
    deepep.plan_before(dispatcher, planner, [fused], given_up)
    hidden, topk = routed()
    with batch.forward(a_prefill()):
        dispatcher.dispatch_a(hidden_states=hidden, topk_output=topk)
        output = dispatcher.dispatch_b()
    (carried,) = carrier.carried
    assert carried is output.topk_ids and rows_of(carried, len(first)).view(RANKS, -1).sum(1).tolist() == [TOKENS] * 2
    assert carrier.planned == counters.fused == 0 and counters.planned == 1
    assert output.expected_m == math.ceil(TOKENS * TOP_K / len(first)), "rows of a physical expert"
    with batch.forward(batch.Batch(skip="decode")):  # DeepEP's hint
        fused._sent = None  # as combine leaves it
        dispatcher.dispatch_a(hidden_states=hidden[:30], topk_output=TopK(*(t[:30] for t in topk)))
        assert dispatcher.dispatch_b().expected_m == (2 * 30 * TOP_K + len(first)) // len(first)
    assert torch.equal(carrier.carried[1], topk.topk_ids[:30]), "decode keeps SGLang's choice"
    (of_layer,) = given_up.take().values()
    assert int(of_layer.sum()) == (topk.topk_ids >= 0).sum() - (carried >= 0).sum()


def a_prefill(**options) -> batch.Batch:
    return batch.Batch(torch.zeros(TOKENS, dtype=torch.int32), 1, "", group_tokens=TOKENS, **options)


def test_prefill_is_planned_in_normal_mode_and_decode_carried_in_low_latency(auto):
    dispatch, normal, carrier, counters = auto
    for _ in range(2):  # in turns, as a server does
        routed_ids, sent = dispatch(a_prefill(), extends=True)
        assert per_rank(sent).tolist() == [TOKENS, TOKENS] and per_rank(routed_ids).max() > TOKENS
        routed_ids, output = dispatch(batch.Batch(skip="decode"), tokens=3)
        assert torch.equal(output.topk_ids, routed_ids), "decode is left alone"
    assert len(normal) == len(carrier.carried) == counters.planned == 2
    assert carrier.planned == counters.fused == 0 and counters.skipped == {"decode": 2}


def test_a_rank_that_decodes_beside_a_prefill_is_in_normal_mode_with_its_rows_as_routed(auto):
    dispatch, normal, carrier, counters = auto
    alone = torch.full((3,), batch.LEFT_ALONE, dtype=torch.int32)
    beside = batch.Batch(alone, 0, "", group_tokens=TOKENS + 3, leaves_alone=True)
    routed_ids, sent = dispatch(beside, tokens=3, extends=True)
    assert torch.equal(sent, routed_ids) and len(normal) == 1 and not carrier.carried
    assert counters.planned == 1, "it takes part in the plan"


def test_a_mixed_chunk_is_in_normal_mode_and_its_decoded_rows_are_left_alone(auto):
    dispatch, normal, carrier, _ = auto
    mixed = a_prefill(leaves_alone=True)
    mixed.segment[-8:] = batch.LEFT_ALONE
    routed_ids, sent = dispatch(mixed, extends=True)
    assert torch.equal(sent[-8:], routed_ids[-8:]) and not torch.equal(sent, routed_ids)
    assert len(normal) == 1 and not carrier.carried


@pytest.mark.parametrize("skip", ["small", "decode"])
def test_a_pass_that_is_not_planned_keeps_its_mode(auto, skip):
    """A small prefill is in normal mode; a batch of target verification, which is no prefill to SGLang, is not."""
    dispatch, normal, carrier, _ = auto
    dispatch(batch.Batch(skip=skip), extends=skip == "small")
    assert (len(normal), len(carrier.carried)) == ((1, 0) if skip == "small" else (0, 1))


def test_a_captured_graph_carries_decode(auto):
    """Captured outside of any pass, with rows of padding: -1 everywhere."""
    dispatch, normal, carrier, _ = auto
    routed_ids, _ = dispatch(batch.Batch(), tokens=16)
    assert carrier.carried[0] is routed_ids and not normal
