"""Published expert loads of Qwen3-VL-30B-A3B through the product: what a bound per rank and one per expert clip."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import pytest
import torch

from reference import cases
from sglang_macs.config import MacsConfig
from sglang_macs.plan.plan import Plan, check_batch_size

LOADS = json.loads((resources.files("sglang_macs.simulate") / "qwen3vl_30b_a3b.json").read_text())
EXPERTS, TOP_K, RANKS = 128, 8, 8


@cache
def routed(layer: str) -> cases.Batch:
    """All 313,440 tokens of the study, dealt so that every expert has exactly its published rows."""
    rows = LOADS["expert_rows_by_layer"][layer]
    tokens = sum(rows) // TOP_K
    gen = cases.generator(int(layer))
    ids = cases.assign(rows, tokens, gen)
    return cases.Batch(
        hidden_states=torch.zeros(tokens, 1),
        topk_ids=ids,
        topk_weights=torch.rand(ids.shape, generator=gen),
        router_logits=torch.empty(tokens, EXPERTS),
        segment=cases.segments(tokens, 0.9, 192),
        num_segments=192,
    )


def clipped_share(layer: str, config: MacsConfig) -> float:
    """Share of all assignments that the plan clips, with nothing re-routed."""
    b = routed(layer)
    check_batch_size(len(b.topk_ids), TOP_K)
    result = Plan(config, EXPERTS, RANKS)(b.routed._replace(router_logits=None))
    kept, clipped, rerouted = result.counts.sum((1, 2)).tolist()
    assert rerouted == 0
    assert kept + clipped == b.topk_ids.numel()
    assert kept == (result.topk_ids >= 0).sum()
    return clipped / (kept + clipped)


@pytest.mark.parametrize("layer", ["0", "3"])
def test_every_expert_has_its_published_rows(layer: str) -> None:
    b = routed(layer)
    assert b.topk_ids.shape == (313440, TOP_K)
    assert torch.bincount(b.topk_ids.flatten()).tolist() == LOADS["expert_rows_by_layer"][layer]
    ordered = b.topk_ids.sort(-1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


@pytest.mark.parametrize(("layer", "percent"), [("0", "0.0"), ("3", "1.9")])
def test_a_bound_per_rank_at_1_1(layer: str, percent: str) -> None:
    config = MacsConfig.from_preset("rank", gamma=1.1, importance="gate", reroute="none", rho=0.0)
    assert f"{100 * clipped_share(layer, config):.1f}" == percent


@pytest.mark.parametrize(("layer", "percent"), [("0", "13.2"), ("3", "19.6")])
def test_a_bound_per_expert_at_1_0(layer: str, percent: str) -> None:
    config = MacsConfig.from_preset("cai", gamma=1.0)
    assert f"{100 * clipped_share(layer, config):.1f}" == percent


@pytest.mark.parametrize("layer", ["0", "3"])
def test_only_the_overflow_is_clipped(layer: str) -> None:
    """To the row: neither scope gives up more than what lies over its bounds."""
    rows = torch.tensor(LOADS["expert_rows_by_layer"][layer])
    for config, bounded in (
        (MacsConfig.from_preset("rank", gamma=1.1, importance="gate", reroute="none"), rows.view(RANKS, -1).sum(1)),
        (MacsConfig.from_preset("cai", gamma=1.0), rows),
    ):
        bound = int(config.gamma * int(rows.sum()) / len(bounded))
        over = int((bounded - bound).clamp(min=0).sum())
        assert clipped_share(layer, config) == over / int(rows.sum())
