"""The plan's CUDA kernels on the emulated machine, against the CPU operators: integers to the bit.

`Launchers` are in tests/support/emulated_plan.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reference import cases
from sglang_macs import ops
from tests.support import emulated, operators
from tests.support.emulated_plan import (
    FUSED_CASES,
    POISON,
    Launchers,
    assert_same_bits,
    build,
    first_tokens,
    one_by_one,
    peer_group,
    small_group,
    weights_of,
)
from tests.support.operator_cases import (
    APPLY,
    HISTOGRAM,
    SELECTIONS,
    THRESHOLD,
    USUAL,
    assert_selection,
    pick,
    selection_case,
)

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def launchers() -> Launchers:
    return build()


ENTROPY_INPUTS = {  # [T, H] and dtype, an instance of the kernel each
    "warp_per_row": ((5, 512), torch.bfloat16),
    "rows_of_256_vectors": ((3, 2048), torch.bfloat16),
    "block_per_row": ((3, 4096), torch.float16),
    "hidden_7168": ((2, 7168), torch.bfloat16),
    "any_size": ((5, 37), torch.float32),
    "f32": ((5, 64), torch.float32),
}


@pytest.mark.parametrize("name", ENTROPY_INPUTS)
def test_entropy_score(launchers: Launchers, name: str) -> None:
    shape, dtype = ENTROPY_INPUTS[name]
    hidden = (torch.randn(shape, generator=cases.generator(3)) * 3).to(dtype)
    segment = torch.zeros(shape[0], dtype=torch.int32)
    segment[1] = -1
    got = launchers.entropy_score(hidden, segment)
    torch.testing.assert_close(got, ops.entropy_score(hidden, segment), rtol=0, atol=1e-5)
    assert got[1] == 0


@pytest.mark.parametrize("name", cases.NAMED)
def test_entropy_weight(launchers: Launchers, name: str) -> None:
    b = cases.named(name).batches[0]
    inputs = ops.entropy_score(b.hidden_states, b.segment), b.segment, b.num_segments, 1.0
    torch.testing.assert_close(launchers.entropy_weight(*inputs), ops.entropy_weight(*inputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["expert", "rank"])
@pytest.mark.parametrize(("load", "reroute"), [("rows", "global"), ("effective", "local"), ("effective", "none")])
@pytest.mark.parametrize("name", sorted(set(cases.NAMED) - {"prefill"}))
def test_integers_equal_the_cpu_operators(launchers: Launchers, name: str, load: str, reroute: str, scope: str) -> None:
    """Each operator on the CPU's own input; two schedules each."""
    group, options = cases.named(name), USUAL | {"scope": scope, "load": load, "reroute": reroute}
    b = group.batches[0]
    routing = b.topk_ids, b.topk_weights, weights_of(b), b.segment
    counted = pick(options, HISTOGRAM, num_experts=group.num_experts)
    ordered = pick(options, THRESHOLD, num_ranks=group.num_ranks)
    applied = pick(options, APPLY, num_ranks=group.num_ranks, scoring=group.scoring)
    histogram = operators.load_histogram(*routing, **counted)
    shift, cut = operators.clip_threshold(histogram, histogram, group.modality, **ordered)
    inputs = (*routing, b.router_logits, shift, cut, group.selection(b))
    want = [histogram, shift, cut, *operators.clip_apply(*inputs, **applied)]
    for seed in range(2):
        launchers.library.configure(seed)
        got = [
            launchers.load_histogram(*routing, **counted),
            *launchers.clip_threshold(histogram, histogram, group.modality, **ordered),
            *launchers.clip_apply(*inputs, **applied),
        ]
        for mine, expected in zip(got, want, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6 if mine.is_floating_point() else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_score(launchers: Launchers, name: str, dtype: torch.dtype) -> None:
    logits, *routing = selection_case(name)
    logits = logits.to(dtype)
    assert_selection(launchers.selection_score(logits, *routing), ops.selection_score(logits, *routing))


def test_selection_score_of_1024_experts(launchers: Launchers) -> None:
    gen = cases.generator(4)
    logits, bias = torch.randn(5, 1024, generator=gen), torch.randn(1024, generator=gen)
    routing = logits, bias, "sigmoid", 64, 9
    assert_selection(launchers.selection_score(*routing), ops.selection_score(*routing))
    with pytest.raises(emulated.Failure):
        launchers.selection_score(logits.repeat(1, 2), bias.repeat(2), "sigmoid", 1, 1)


@pytest.mark.parametrize("load", ["rows", "effective"])
@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (192, 4), (320, 4), (512, 10), (896, 16)])
def test_a_selection_orders_candidates_whatever_their_logits(
    launchers: Launchers, experts: int, top_k: int, load: str
) -> None:
    """One of each instance of the kernel, in the two fused launchers; the last are Qwen3.5's and Kimi K3's sizes."""
    gen = cases.generator(experts)
    shape = cases.NAMED["imbalanced"] | {"num_tokens": 12, "num_experts": experts, "scoring": "sigmoid", "top_k": top_k}
    routing = cases.routing(gen, experts, "sigmoid", biased=True, groups=(8, 4))
    group = cases.Group([cases.batch(gen, **shape)], experts, 4, torch.zeros(experts, dtype=torch.int8), routing)
    options = USUAL | {"load": load, "num_ranks": 4, "scoring": "sigmoid", "importance": "gate", "buckets": 32}
    got, (b,) = launchers.plan(group, options, scored=False), group.batches
    inputs = b.topk_ids, b.topk_weights, got["weight"], b.segment, b.router_logits, got["shift"], got["cut"]
    applied = pick(options, APPLY, num_ranks=4, scoring="sigmoid")
    ids, weights, counts = operators.clip_apply(*inputs, group.selection(b), **applied)
    assert torch.equal(got["ids"], ids) and torch.equal(got["counts"], counts)
    torch.testing.assert_close(got["weights"], weights, rtol=1e-6, atol=0)
    assert not torch.equal(ids, operators.clip_apply(*inputs, **applied)[0]), "the logits' order would do"


@pytest.mark.parametrize("options", FUSED_CASES.values(), ids=FUSED_CASES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 24])
def test_fused_launchers_give_the_operators_bits(tokens: int, options: dict[str, Any], launchers: Launchers) -> None:
    """A grid has a warp a token, and no fewer blocks than ranks: most of them have nothing to do here."""
    group, options = first_tokens(small_group(), tokens), USUAL | options
    want = one_by_one(launchers, group, options)
    for seed in range(2):
        launchers.library.configure(seed)
        before = launchers.library.launches
        got = launchers.plan(group, options | {"num_ranks": group.num_ranks, "scoring": group.scoring})
        assert launchers.library.launches - before == (4 if tokens > 0 else 2)  # nothing to score or to count
        assert_same_bits(got, want)
    assert want["counts"][:2].sum() == group.batches[0].topk_ids.ge(0).sum()
    assert want["counts"][1].sum() > 0 or tokens < 17, "something has to move"


def test_a_device_without_clusters_gives_the_same_bits(launchers: Launchers) -> None:
    got = one_by_one(build(max_cluster=1), small_group(), USUAL)
    assert_same_bits(got, one_by_one(launchers, small_group(), USUAL))


@pytest.mark.parametrize("options", FUSED_CASES.values(), ids=FUSED_CASES)
def test_the_second_launcher_leaves_the_workspace_prepared(options: dict, launchers: Launchers) -> None:
    """Nothing that it says the first time passes for what it says the second."""
    group = small_group(seed=7, tokens=40)
    options = USUAL | options | {"num_ranks": group.num_ranks, "scoring": group.scoring}
    once, want = (one_by_one(launchers, group, options | {"gamma": gamma}) for gamma in (1.3, 0.8))
    assert not torch.equal(once["cut"], want["cut"])
    for seed in range(4):
        launchers.library.configure(seed)
        assert_same_bits(launchers.plan(group, options | {"gamma": 1.3}, then_gamma=0.8), want)


@pytest.mark.parametrize("top_k", [3, 4], ids=["slots_in_turn", "halves"])
def test_of_equal_gates_the_first_is_referred_to(launchers: Launchers, top_k: int) -> None:
    """A token's gates are equal, its logits are not: what a re-routed expert weighs says whose logit was taken."""
    group = small_group(seed=9, top_k=top_k)
    b = replace(group.batches[0], topk_weights=torch.full_like(group.batches[0].topk_weights, 0.25))
    group = replace(group, batches=[b])
    got = one_by_one(launchers, group, USUAL)
    routing = b.topk_ids, b.topk_weights, got["weight"], b.segment, b.router_logits, got["shift"], got["cut"]
    ids, weights, counts = operators.clip_apply(*routing, **pick(USUAL, APPLY, num_ranks=4, scoring=group.scoring))
    assert counts[2].sum() > 3 and torch.equal(got["ids"], ids)
    torch.testing.assert_close(got["weights"], weights, rtol=1e-6, atol=0)
    assert_same_bits(launchers.plan(group, USUAL | {"num_ranks": 4, "scoring": group.scoring}), got)


@pytest.mark.parametrize("scope", FUSED_CASES)
def test_fused_launchers_without_scores(launchers: Launchers, scope: str) -> None:
    """Where only gates matter no hidden vector is read: visual tokens weigh 0.5, else the bits are the operators'."""
    b = cases.batch(cases.generator(6), **(cases.NAMED["imbalanced"] | {"num_tokens": 24}))
    group = cases.Group([b], 16, 4, torch.arange(16).remainder(3).sub(1).to(torch.int8))
    options = USUAL | FUSED_CASES[scope] | {"importance": "gate"}
    weight = torch.where(b.segment < 0, 1.0, 0.5)
    routing = b.topk_ids, b.topk_weights, weight, b.segment
    own = operators.load_histogram(*routing, **pick(options, HISTOGRAM, num_experts=16))
    shift, cut = operators.clip_threshold(own, own, group.modality, **pick(options, THRESHOLD, num_ranks=4))
    applied = pick(options, APPLY, num_ranks=4, scoring=group.scoring)
    ids, weights, counts = operators.clip_apply(*routing, b.router_logits, shift, cut, **applied)
    want = {"weight": weight, "histogram": own, "shift": shift, "cut": cut, "counts": counts, "ids": ids}
    for seed in range(2):
        launchers.library.configure(seed)
        before = launchers.library.launches
        got = launchers.plan(group, options | {"num_ranks": 4, "scoring": group.scoring}, scored=False)
        assert launchers.library.launches - before == 3
        torch.testing.assert_close(got["weights"], weights, rtol=1e-6, atol=0)
        for name, expected in want.items():
            assert torch.equal(got[name], expected), name
        assert (got["entropy"].view(torch.uint8) == POISON).all()
    assert counts[1].sum() > 0 and (b.segment < 0).any() and (b.segment >= 0).any()


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", FUSED_CASES)
def test_a_plan_with_its_exchange_over_peers(launchers: Launchers, scope: str, logits: torch.dtype) -> None:
    """Every rank's chain of launches on a stream of its own; logits as the router has them."""
    group = peer_group(logits)
    options = USUAL | FUSED_CASES[scope] | {"importance": "gate", "buckets": 32, "gamma": 1.05}
    options |= {"num_ranks": 2, "scoring": group.scoring}
    weights = [torch.where(b.segment < 0, 1.0, 0.5) for b in group.batches]
    routings = [(b.topk_ids, b.topk_weights, w, b.segment) for b, w in zip(group.batches, weights, strict=True)]
    own = [operators.load_histogram(*r, **pick(options, HISTOGRAM, num_experts=16)) for r in routings]
    total = torch.stack(own).sum(0, dtype=torch.int32)
    moved = 0
    for seed in range(2):
        launchers.library.configure(seed)
        before = launchers.library.launches
        results = launchers.plans(group, options, scored=False)
        assert launchers.library.launches - before == 2 * 4
        for b, routing, histogram, got in zip(group.batches, routings, own, results, strict=True):
            shift, cut = operators.clip_threshold(
                histogram, total, group.modality, **pick(options, THRESHOLD, num_ranks=2)
            )
            applied = pick(options, APPLY, num_ranks=2, scoring=group.scoring)
            ids, gates, counts = operators.clip_apply(*routing, b.router_logits.float(), shift, cut, **applied)
            want = {"histogram": histogram, "group": total, "shift": shift, "cut": cut, "ids": ids, "counts": counts}
            for name, expected in want.items():
                assert torch.equal(got[name], expected), name
            torch.testing.assert_close(got["weights"], gates, rtol=1e-6, atol=0)
            moved += counts[2].sum()
    assert moved > 0, "something has to find another expert"
