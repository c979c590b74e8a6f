"""Re-routing as the router would go on, beside SGLang's own `select_experts`, and routers that nobody can follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_macs.config import MacsConfig
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch import low_latency
from sglang_macs.engine import topk
from sglang_macs.errors import MacsNotActive
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.routing import Routing

HERE = Path(__file__).resolve().parent
KINDS = (
    "softmax", "softmax, not renormalised", "sigmoid", "sqrtsoftplus", "softmax with a bias", "sigmoid with a bias",
    "sqrtsoftplus with a bias", "DeepSeek-V2", "DeepSeek-V3", "GLM-4.5, which names no scoring", "scaled", "one group",
)  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    # torch.compile would take minutes for routers of a few numbers.
    env = {**os.environ, **environment(ranks=2), "TORCHDYNAMO_DISABLE": "1"}
    program = [sys.executable, str(HERE / "support" / "router_program.py")]
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.server
@pytest.mark.parametrize("kind", KINDS)
def test_re_routing_goes_on_where_the_router_stopped(answers, kind):
    """Every clipped slot gets the router's next expert whose rank has room, with the weight that the router would have
    given: its own score under the scaling of the token's others.
    """
    found = answers["routed"][kind]
    assert set(answers["routed"]) == set(KINDS)
    moved = skipped = 0
    for token, (ids, new_ids) in enumerate(zip(found["ids"], found["new_ids"], strict=True)):
        order, score = found["order"][token], dict(zip(found["order"][token], found["score"][token], strict=True))
        assert set(ids) == set(order[: len(ids)])
        open_to = [expert for expert in order if expert not in ids and found["room"][expert // 8] > 0]
        skipped += len(open_to) < len(order) - len(ids)
        clipped = [slot for slot, (old, new) in enumerate(zip(ids, new_ids, strict=True)) if old != new]
        best = max(range(len(ids)), key=lambda slot, token=token: found["weights"][token][slot])
        scale = found["weights"][token][best] / score[ids[best]]
        for slot, wanted in zip(clipped, open_to, strict=False):
            if new_ids[slot] >= 0:  # else the rank was full by then
                assert new_ids[slot] == wanted
                assert found["new_weights"][token][slot] == pytest.approx(score[wanted] * scale, rel=1e-5)
                moved += 1
        assert all(new_ids[slot] < 0 for slot in clipped[len(open_to) :])
    assert moved > 10 and skipped > 10


REFUSED = {
    "softmax": "",
    "DeepSeek-V3": "",
    "own function": "a routing function of the model's own",
    "other scores": "tanh scores",
    "hash": "Block, which routes by something else than one TopK",
    "two routers": "Block, which routes by something else than one TopK",
    "a gate for each modality": "Block, which has a gate for each modality",
    "experts that do nothing": "a router of 34 experts, 32 of which are dispatched",
}


@pytest.mark.server
@pytest.mark.parametrize("kind", REFUSED)
def test_a_scheduler_ends_with_one_line_where_re_routing_cannot_follow(answers, kind):
    assert answers["refused"]["none"][kind] == ""
    why = REFUSED[kind]
    line = f"2 sglang-macs: re-routing cannot follow {why}; pass --macs-reroute none" if why else ""
    assert answers["refused"]["global"][kind] == line


def router(**changes: Any) -> SimpleNamespace:
    config = {"scoring_func": "softmax", "correction_bias": None, "custom_routing_function": None}
    return SimpleNamespace(**config | {"use_grouped_topk": False, "num_expert_group": 8, "topk_group": 4} | changes)


def test_groups_count_only_where_top_k_is_grouped():
    plain, grouped = (topk.routing_of(router(use_grouped_topk=used), False) for used in (False, True))
    assert (plain.needs_selection, grouped.needs_selection) == (False, True)
    assert (grouped.num_groups, grouped.topk_groups) == (8, 4)
    assert not topk.routing_of(router(use_grouped_topk=True, topk_group=8), False).needs_selection


def test_softmax_with_a_bias_is_not_followed_on_gpus():
    """SGLang leaves the bias out there, and counts it on a CPU."""
    assert topk.routing_of(router(correction_bias=[0.0]), True).correction_bias == [0.0]
    with pytest.raises(MacsNotActive, match="softmax with a correction bias"):
        topk.routing_of(router(correction_bias=[0.0]), False)


@pytest.mark.parametrize(("dispatch", "told"), [("fused", True), ("auto", True), ("bounded", False)])
def test_where_the_fused_dispatch_does_not_plan_it_is_told(monkeypatch, capfd, dispatch, told):
    followed = []
    plan = SimpleNamespace(num_experts=2, config=MacsConfig(dispatch=dispatch), follow=followed.append)
    monkeypatch.setattr(topk, "_on_cpu", lambda: False)
    topk.say_once.cache_clear()
    topk._follow(plan, router())
    assert capfd.readouterr().err == "" and not followed[-1].needs_selection
    for _ in range(2):
        topk._follow(plan, router(use_grouped_topk=True))
    assert followed[-1].needs_selection
    assert capfd.readouterr().err.count("the plan stands before it") == told


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "topk_groups": 2}])
def test_the_fused_kernels_plan_only_where_logits_order_candidates(monkeypatch, groups):
    """Else the layer's own plan goes before them, and they carry what it has planned."""
    fused = object.__new__(low_latency.FusedLowLatency)
    fused.planner = SimpleNamespace(plan=Plan(MacsConfig(), 8, 2, routing=Routing(**groups)))
    monkeypatch.setattr(fused, "takes", lambda: True, raising=False)
    with batch.forward(batch.Batch(skip="")):
        assert fused.plans() == (not groups)
