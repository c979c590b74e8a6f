"""Every operator against the oracle, in named cases and random ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import cases, oracle
from sglang_macs import ops
from sglang_macs.choices import BUCKETS, SCORINGS
from tests.support import operators
from tests.support.operator_cases import (
    APPLY,
    HISTOGRAM,
    SELECTIONS,
    THRESHOLD,
    USUAL,
    assert_selection,
    assigned,
    chain,
    lists,
    pick,
    selection_case,
    weight_of,
)


def same_weights(got: torch.Tensor, want: list[list[float]], kept: torch.Tensor) -> None:
    """Bit for bit where the assignment stayed or fell, 1e-5 relative where it was re-routed."""
    expected = torch.tensor(want, dtype=torch.float32).view(got.shape)
    assert torch.equal(got[kept].view(torch.int32), expected[kept].view(torch.int32))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


def check_chain(group: cases.Group, switches: dict[str, Any]) -> None:
    """Histogram, threshold and apply of every rank equal the oracle's, each fed with the oracle's own input."""
    weights = [weight_of(b) for b in group.batches]
    counted = pick(switches, HISTOGRAM, num_experts=group.num_experts)
    own = []
    for b, w in zip(group.batches, weights, strict=True):
        own.append(operators.load_histogram(*assigned(b, w), **counted))
        assert own[-1].tolist() == oracle.load_histogram(*lists(*assigned(b, w)), **counted)
    total = torch.stack(own).sum(0, dtype=torch.int32)
    ordered = pick(switches, THRESHOLD, num_ranks=group.num_ranks)
    applied = pick(switches, APPLY, num_ranks=group.num_ranks, scoring=group.scoring)
    for b, w, histogram in zip(group.batches, weights, own, strict=True):
        shift, cut = operators.clip_threshold(histogram, total, group.modality, **ordered)
        assert (shift.tolist(), cut.tolist()) == oracle.clip_threshold(
            *lists(histogram, total, group.modality), **ordered
        )
        inputs = (*assigned(b, w), b.router_logits, shift, cut, group.selection(b))
        ids, weights_, counts = operators.clip_apply(*inputs, **applied)
        want_ids, want_weights, want_counts = oracle.clip_apply(*lists(*inputs), **applied)
        assert ids.tolist() == want_ids
        assert counts.tolist() == want_counts
        same_weights(weights_, want_weights, (ids == b.topk_ids) | (ids < 0))


ENTROPY_INPUTS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "normal": lambda g: torch.randn(9, 64, generator=g),
    "wide": lambda g: torch.randn(3, 4096, generator=g) * 3,
    "odd_width": lambda g: torch.randn(5, 37, generator=g),
    "one_feature": lambda g: torch.randn(4, 1, generator=g),
    "constant_rows": lambda g: torch.full((4, 100), -7.0),
    "zero_rows": lambda g: torch.zeros(3, 2048),
    "spiked": lambda g: torch.randn(4, 512, generator=g).index_fill(1, torch.tensor([200]), 40.0),
    "two_spikes": lambda g: torch.randn(4, 512, generator=g).index_fill(1, torch.tensor([0, 511]), 30.0),
    "growing": lambda g: torch.linspace(-50, 50, 1024).expand(3, -1),
    "huge": lambda g: torch.randn(4, 64, generator=g).sign() * 60000.0,
}
# Nats. The inputs are rounded to their dtype before both sides see them, so what is left is accumulation in f32:
# about sqrt(H) ulps of the largest term, |d| e^d / Z, whose sum stays below log H (8.3 at H = 4096).
ENTROPY_TOLERANCE = {"wide": 5e-6, "growing": 5e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENTROPY_INPUTS)
def test_entropy_score(name: str, dtype: torch.dtype) -> None:
    hidden = ENTROPY_INPUTS[name](cases.generator(3)).to(dtype).contiguous()
    segment = torch.zeros(len(hidden), dtype=torch.int32)
    segment[1] = -1
    got = ops.entropy_score(hidden, segment)
    want = torch.tensor(oracle.entropy_score(*lists(hidden.double(), segment)), dtype=torch.float64)
    assert got.dtype == torch.float32
    assert got[1] == 0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=ENTROPY_TOLERANCE.get(name, 2e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_survives_the_range_of_the_dtype(dtype: torch.dtype) -> None:
    """x - max(x) overflows f32 here; the probability is 0 all the same, and 0 * inf must not become NaN."""
    hidden = torch.full((2, 16), -3e38).to(dtype)
    hidden[:, :4] = 3e38
    got = ops.entropy_score(hidden, torch.zeros(2, dtype=torch.int32))
    torch.testing.assert_close(got, torch.full((2,), math.log(4)))


@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0, 8.0])
@pytest.mark.parametrize("name", cases.NAMED)
def test_entropy_weight(name: str, delta: float) -> None:
    b = cases.named(name).batches[0]
    entropy = ops.entropy_score(b.hidden_states, b.segment)
    got = ops.entropy_weight(entropy, b.segment, b.num_segments, delta)
    want = oracle.entropy_weight(*lists(entropy, b.segment), b.num_segments, delta)
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=2e-5, atol=1e-7)
    if delta == 0:
        assert torch.equal(got, torch.where(b.segment < 0, 1.0, 0.5))


@pytest.mark.parametrize("value", [0.1, 7.6243, 8.317766])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_equal_entropies_weigh_one_half(value: float, tokens: int) -> None:
    """With no deviation at all, an ulp of error in the mean would be divided by 1e-6."""
    segment = torch.zeros(tokens, dtype=torch.int32)
    got = ops.entropy_weight(torch.full((tokens,), value), segment, 1, 1.0)
    torch.testing.assert_close(got, torch.full((tokens,), 0.5), rtol=0, atol=1e-6)


def test_entropy_weight_of_nearly_equal_entropies() -> None:
    """A deviation of 1e-4 at a mean of 8 nats: no difference of squares in f32 survives that."""
    entropy = 8 + 1e-4 * torch.randn(500, generator=cases.generator(4))
    segment = torch.arange(500, dtype=torch.int32) % 3
    got = ops.entropy_weight(entropy, segment, 3, 1.0)
    want = torch.tensor(oracle.entropy_weight(*lists(entropy, segment), 3, 1.0), dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scope", ["expert", "rank"])
@pytest.mark.parametrize("load", ["rows", "effective"])
@pytest.mark.parametrize("reroute", ["none", "local", "global"])
@pytest.mark.parametrize("name", cases.NAMED)
def test_named_cases_match_the_oracle(name: str, reroute: str, load: str, scope: str, ids_dtype: torch.dtype) -> None:
    group = cases.named(name)
    one = group.batches[0]
    group.batches[0] = replace(one, topk_ids=one.topk_ids.to(ids_dtype))
    check_chain(group, USUAL | {"scope": scope, "load": load, "reroute": reroute})


@cases.PROPERTY
@given(cases.groups(), cases.switches())
def test_any_group_matches_the_oracle(group: cases.Group, switches: dict[str, Any]) -> None:
    check_chain(group, switches)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ids_keep_their_dtype(ids_dtype: torch.dtype) -> None:
    group = cases.named("imbalanced")
    b = group.batches[0]
    inputs = chain(cases.Group([replace(b, topk_ids=b.topk_ids.to(ids_dtype))], 16, 4, group.modality))
    ids, weights, counts = operators.clip_apply(*inputs["clip_apply"][1], **inputs["clip_apply"][2])
    assert (ids.dtype, weights.dtype, counts.dtype) == (ids_dtype, torch.float32, torch.int32)


@cases.PROPERTY
@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.sampled_from(BUCKETS))
def test_any_gate_has_the_oracle_s_bucket(gates: list[float], buckets: int) -> None:
    """Zeros, subnormals, infinities and NaN included."""
    ids = torch.zeros(len(gates), 1, dtype=torch.int32)
    inputs = (ids, torch.tensor(gates)[:, None], torch.ones(len(gates)), torch.full((len(gates),), -1).int())
    settings = {"num_experts": 1, "buckets": buckets, "load": "rows", "importance": "gate"}
    assert operators.load_histogram(*inputs, **settings).tolist() == oracle.load_histogram(*lists(*inputs), **settings)


@cases.PROPERTY
@given(cases.switches(), st.integers(0, 2**16), st.sampled_from([(1, 3), (2, 4), (4, 4), (8, 32)]))
def test_threshold_of_any_histograms(switches: dict[str, Any], seed: int, shape: tuple[int, int]) -> None:
    """Histograms that no routing need have made, up to large counts, between which a rank has any share."""
    num_ranks, num_experts = shape
    gen = cases.generator(seed)
    cells = num_experts * 2 * switches["buckets"] + 4
    scale = 10 ** (5 * torch.rand(cells, generator=gen))
    own = (torch.rand(cells, generator=gen) * scale * (torch.rand(cells, generator=gen) < 0.1)).int()
    group = own + (torch.rand(cells, generator=gen) * scale * (torch.rand(cells, generator=gen) < 0.1)).int()
    own[-4], group[-4] = own[:-4].sum(), group[:-4].sum()
    modality = torch.randint(-1, 2, (num_experts,), generator=gen).to(torch.int8)
    settings = pick(switches, THRESHOLD, num_ranks=num_ranks)
    shift, cut = operators.clip_threshold(own, group, modality, **settings)
    assert (shift.tolist(), cut.tolist()) == oracle.clip_threshold(*lists(own, group, modality), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_score(name: str, dtype: torch.dtype) -> None:
    logits, bias, *routing = selection_case(name)
    logits = logits.to(dtype)
    got = ops.selection_score(logits, bias, *routing)
    want = oracle.selection_score(logits.tolist(), None if bias is None else bias.tolist(), *routing)
    assert_selection(got, torch.tensor(want, dtype=torch.float64))
    taken = got[[0, *range(4, 9)]].isfinite().sum(1)
    assert (taken == 32 // routing[1] * routing[2]).all()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_weight_that_the_router_rounded_to_nothing_stays_nothing(scoring: str) -> None:
    """At logits whose scores underflow no re-routed weight is what 0 times infinity gives."""
    ids, logits = torch.tensor([[0, 1]]), torch.tensor([[-900.0, -900.0, 0.0, 1.0]])
    inputs = (ids, torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.int32), logits)
    cut = torch.tensor([[31, 0, 0, 0], [-1, 0, 9, 9]], dtype=torch.int32)
    settings = pick(USUAL | {"buckets": 32}, APPLY, num_ranks=2, scoring=scoring)
    ids, weights, _ = operators.clip_apply(*inputs, torch.zeros(4, dtype=torch.int32), cut, **settings)
    assert ids.tolist() == [[3, 2]] and weights.tolist() == [[0.0, 0.0]]


def any_numbers(b: cases.Batch, gen: torch.Generator) -> tuple[torch.Tensor, ...]:
    """The batch's assignments with gates and weights that no router need have made.

    Weights are odd multiples of 1/512 as often as not, halfway between two fixed-point values; gates tie within a token
    without their logits tying.
    """
    weight = torch.randint(0, 513, b.segment.shape, generator=gen) / 512
    gates = torch.randint(1, 4, b.topk_ids.shape, generator=gen) / 4
    return b.topk_ids, torch.where(b.topk_ids >= 0, gates, 0.0), weight, b.segment


@cases.PROPERTY
@given(cases.groups(all_ranks=False), cases.switches(), st.integers(0, 2**16))
def test_histogram_of_any_numbers(group: cases.Group, switches: dict[str, Any], seed: int) -> None:
    inputs = any_numbers(group.batches[0], cases.generator(seed))
    counted = pick(switches, HISTOGRAM, num_experts=group.num_experts)
    assert operators.load_histogram(*inputs, **counted).tolist() == oracle.load_histogram(*lists(*inputs), **counted)


@cases.PROPERTY
@given(cases.groups(all_ranks=False), cases.switches(), st.integers(0, 2**16))
def test_apply_of_any_cut(group: cases.Group, switches: dict[str, Any], seed: int) -> None:
    """Levels, quotas and rooms that no threshold need have made: room where it cuts, next to none, or far too much."""
    gen, b = cases.generator(seed), group.batches[0]
    bounds = group.num_ranks if switches["scope"] == "rank" else group.num_experts
    unit = 256 if switches["load"] == "effective" else 1
    shift = torch.randint(0, switches["buckets"] // 4, (group.num_experts,), generator=gen, dtype=torch.int32)
    cut = torch.randint(0, (3, 12)[seed % 2] * unit, (bounds, 4), generator=gen, dtype=torch.int32)
    cut[:, 0] = torch.randint(-1, 2 * switches["buckets"], (bounds,), generator=gen)
    inputs = (*any_numbers(b, gen), b.router_logits, shift, cut, group.selection(b))
    settings = pick(switches, APPLY, num_ranks=group.num_ranks, scoring=group.scoring)
    ids, weights, counts = operators.clip_apply(*inputs, **settings)
    want_ids, want_weights, want_counts = oracle.clip_apply(*lists(*inputs), **settings)
    assert (ids.tolist(), counts.tolist()) == (want_ids, want_counts)
    same_weights(weights, want_weights, (ids == b.topk_ids) | (ids < 0))


@pytest.mark.parametrize(("rounds", "placed"), [(0, [-1, -1, -1]), (1, [2, -1, -1]), (2, [2, -1, 2])])
def test_a_proposal_refused_counts_for_those_behind_it(rounds: int, placed: list[int]) -> None:
    """Room for 250 units, proposals of 200, 200 and 40: the third has to wait for the next round."""
    ids = torch.tensor([[0], [1], [0]])
    weight = torch.tensor([200, 200, 40]) / 256
    inputs = (ids, torch.ones(3, 1), weight, torch.zeros(3, dtype=torch.int32))
    logits = torch.tensor([[0.0, 0.0, -1.0, -math.inf]]).repeat(3, 1)
    cut = torch.tensor([[31, 0, 0, 0], [-1, 0, 250, 250]], dtype=torch.int32)
    switches = USUAL | {"scope": "rank", "load": "effective", "buckets": 32, "reroute_rounds": rounds}
    settings = pick(switches, APPLY, num_ranks=2, scoring="softmax")
    inputs = (*inputs, logits, torch.zeros(4, dtype=torch.int32), cut)
    got = operators.clip_apply(*inputs, **settings)[0].flatten().tolist()
    assert got == [i for (i,) in oracle.clip_apply(*lists(*inputs), **settings)[0]] == placed


@pytest.mark.parametrize("scope", ["expert", "rank"])
def test_infinite_gamma_bounds_nothing(scope: str) -> None:
    histogram = torch.zeros(4 * 2 * 32 + 4, dtype=torch.int32)
    for rows in (0, 1000):
        histogram[5] = histogram[-4] = rows
        settings = pick(USUAL | {"scope": scope, "gamma": math.inf, "buckets": 32, "rho": 1.0}, THRESHOLD, num_ranks=2)
        shift, cut = operators.clip_threshold(histogram, histogram, torch.ones(4, dtype=torch.int8), **settings)
        assert shift.tolist() == [0] * 4
        assert cut[:, 0].tolist() == [-1] * len(cut)
        assert cut[:, 3].tolist() == [2**31 - 1] * len(cut)


@pytest.mark.parametrize("awkward", [-0.0, math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("reroute", ["local", "global"])
def test_reroute_order_at_awkward_logits(awkward: float, reroute: str) -> None:
    """-0.0 equals 0.0, so the index decides; what is not finite is no candidate."""
    group = cases.named("ties_everywhere")
    b = group.batches[0]
    group.batches[0] = replace(b, router_logits=b.router_logits.index_fill(1, torch.tensor([4, 6, 9]), awkward))
    finite = (b.topk_ids[..., None] != torch.tensor([4, 6, 9])).all(-1)  # a reference logit must be finite
    group.batches[0] = replace(group.batches[0], topk_ids=torch.where(finite, b.topk_ids, -1))
    check_chain(group, USUAL | {"scope": "expert", "reroute": reroute, "gamma": 0.8})


def test_without_logits_nothing_is_rerouted() -> None:
    operator, inputs, settings = chain(cases.named("imbalanced"))["clip_apply"]
    _, _, counts = operator(*inputs[:4], None, *inputs[5:], **settings)
    assert counts[1].sum() > 0
    assert counts[2].sum() == 0
