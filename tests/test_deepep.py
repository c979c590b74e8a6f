"""The plan in front of DeepEP's dispatcher, with a stand-in of SGLang's classes: what it is handed, half by half."""

from typing import NamedTuple

import pytest
import torch

from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.engine import deepep
from sglang_macs.observe.stats import Stats, rows_of
from sglang_macs.plan import batch
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
    kept_clipped_rerouted = counters.to_host().fate
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
