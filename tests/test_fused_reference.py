"""The reference of the fused dispatch against the composed operators, and against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import fused_reference as reference
from reference.fused_case import FusedConfig, make_group, masked
from reference.kernel_case import Config
from sglang_macs import ops
from tests.support import operators

PLAN = Config(T=12, H=512, E=16, K=4, R=4, hot=1.5, visual=0.8)
CONFIGS = [
    FusedConfig(PLAN, (12, 0, 7, 1)),
    FusedConfig(replace(PLAN, scope="expert", load="effective", importance="entropy", reroute="local"), (5, 12, 12, 3)),
    FusedConfig(replace(PLAN, scope="expert", importance="gate", reroute="none", protect_text=False), (12, 12, 12, 12)),
    FusedConfig(replace(PLAN, hot=50.0), (12, 12, 12, 12)),
    FusedConfig(replace(PLAN, R=1, empty=0.3, scope="expert"), (12,)),
]


def weight_of(config: FusedConfig, ranks) -> list[np.ndarray]:
    entropies = [ops.entropy_score(x.hidden, torch.from_numpy(x.segment)) for x in ranks]
    return [
        ops.entropy_weight(e, torch.from_numpy(x.segment), config.plan.num_segments, config.plan.delta).numpy()
        for e, x in zip(entropies, ranks, strict=True)
    ]


@pytest.mark.parametrize("config", CONFIGS)
def test_decisions_are_the_composed_operators(config: FusedConfig) -> None:
    f, ranks = config.plan, make_group(config, 3)
    weights = weight_of(config, ranks)
    plans = reference.plan_group(config, ranks, weights)
    common = {"buckets": f.buckets, "load": f.load}
    routing = [
        tuple(torch.from_numpy(a) for a in (x.ids, x.gates, w, x.segment)) for x, w in zip(ranks, weights, strict=True)
    ]
    own = [operators.load_histogram(*one, num_experts=f.E, importance=f.importance, **common) for one in routing]
    group = torch.stack(own).sum(0, dtype=torch.int32)
    order = {"num_ranks": f.R, "scope": f.scope, "reroute": f.reroute, "protect_text": f.protect_text} | common
    for inputs, one, histogram, plan in zip(ranks, routing, own, plans, strict=True):
        modality = torch.from_numpy(ranks[0].modality)
        shift, cut = operators.clip_threshold(
            histogram, group, modality, gamma=f.gamma, rho=f.rho, alpha=f.alpha, c_min=f.c_min, **order
        )
        ids, new_weights, counts = operators.clip_apply(
            *one, torch.from_numpy(inputs.logits), shift, cut, importance=f.importance, reroute_rounds=f.rounds,
            scoring=f.scoring, **order,
        )  # fmt: skip
        assert (plan.cut == cut.numpy()).all() and (plan.ids == ids.numpy()).all()
        assert (plan.counts == counts.numpy()).all()
        np.testing.assert_allclose(plan.weights, new_weights.numpy(), rtol=1e-5)
    assert sum((p.counts[1].sum() for p in plans), 0) > 0, "nothing was clipped: the case shows nothing"


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_lie_by_source_token_and_slot(config: FusedConfig, own_rows: bool) -> None:
    config = masked(config) if own_rows else replace(config, alignment=8)
    f, ranks = config.plan, make_group(config, 4)
    ids = torch.full((f.R, f.T, f.K), -1)
    following: dict[int, int] = {}
    for rank, inputs in enumerate(ranks):
        ids[rank, : len(inputs.ids)] = torch.from_numpy(inputs.ids)
    placement = reference.place(config, ids)
    for rank, token, slot in (ids >= 0).nonzero().tolist():
        expert = int(ids[rank, token, slot])
        at = following.get(expert, int(placement.starts[expert]))
        following[expert] = at + 1
        assert placement.positions[rank, token, slot] == at
        assert placement.source[expert // config.local, at] == rank * f.T + token
    assert (placement.source >= 0).sum() == (ids >= 0).sum()
    assert placement.received.sum() == (ids >= 0).sum()
    for expert, start in enumerate(placement.starts.tolist()):
        assert start % (config.expert_rows or config.alignment) == 0 and start < config.rows
        ends = start + int(placement.received[expert])
        if (expert + 1) % config.local:
            assert ends <= placement.starts[expert + 1], "experts overlap"


@pytest.mark.parametrize("format", ["fp8", "fp8_power_of_two", "fp8_ue8m0"])
def test_the_cast_loses_what_e4m3_loses(format: str) -> None:
    hidden = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    hidden[2] = 0
    features, words = reference.cast(hidden, format)
    scale = words.view(torch.float32)
    if format == "fp8_ue8m0":
        exponents = words.view(torch.uint8)[:, : 1024 // 128].int()
        scale = (exponents << 23).view(torch.float32)
    assert format == "fp8" or bool((torch.frexp(scale).mantissa == 0.5).all())
    back = features.view(torch.float8_e4m3fn).float() * scale.repeat_interleave(128, 1)
    # Three bits of mantissa: at most 1/16 of a value; below the smallest normal 2^-10 of it, in units of the scale.
    assert ((back - hidden.float()).abs() <= hidden.float().abs() / 16 + scale.repeat_interleave(128, 1) / 1024).all()
    assert (back[2] == 0).all()
