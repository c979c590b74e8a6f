"""Run as a program: what SGLang's own router chooses, beside what a plan re-routes to, as JSON on the last line.

{"routed": {kind of router: what `routed` returns}, "refused": {"global" | "none": {kind of block: its line or ""}}}.
"""

import contextlib
import io
import json
from dataclasses import replace

import torch
from sglang.srt.plugins import load_plugins
from torch import nn

from sglang_macs.config import MacsConfig, configure
from sglang_macs.engine import scheduler_process, topk, worker
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

configure(MacsConfig.from_preset())
scheduler_process.here = True
load_plugins()
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # noqa: E402  after the plugins
from sglang.srt.layers.moe.topk import TopK, TopKConfig, select_experts  # noqa: E402
from sglang.srt.model_loader import loader  # noqa: E402

TOKENS, EXPERTS, RANKS, TOP_K = 96, 32, 4, 4
BIAS = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2)) * 0.3
V2 = {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 4}
V3 = V2 | {"correction_bias": BIAS}
KINDS = {
    "softmax": {},
    "softmax, not renormalised": {"renormalize": False},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus"},
    "softmax with a bias": {"correction_bias": BIAS},
    "sigmoid with a bias": {"scoring_func": "sigmoid", "correction_bias": BIAS},
    "sqrtsoftplus with a bias": {"scoring_func": "sqrtsoftplus", "correction_bias": BIAS},
    "DeepSeek-V2": {**V2, "renormalize": False},
    "DeepSeek-V3": {**V3, "scoring_func": "sigmoid"},
    "GLM-4.5, which names no scoring": V3,
    "scaled": {**V3, "routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True},
    "one group": V3 | {"num_expert_group": 1, "topk_group": 1},
}


def routed(gen: torch.Generator, **kind: object) -> dict[str, object]:
    """A batch on a hot rank 0. order, score [T, N]: the router's whole order of the experts that a token may have, and
    their scores. ids, weights [T, K]: its choice; new_ids, new_weights: the plan's; room [R]: of the ranks.
    """
    logits = torch.randn(TOKENS, EXPERTS, generator=gen)
    logits[:, : EXPERTS // RANKS] += 1.0
    hidden = torch.zeros(TOKENS, 8)
    config = TopKConfig(TOP_K, torch_native=True, **kind)
    weights, ids, _ = select_experts(hidden, logits, config)
    groups = (kind["num_expert_group"], kind["topk_group"]) if kind.get("use_grouped_topk") else (1, 1)
    bare = {"renormalize": False, "apply_routed_scaling_factor_on_output": False}
    whole = replace(config, top_k=EXPERTS // groups[0] * groups[1], **bare)
    score, order, _ = select_experts(hidden, logits, whole)
    selection = score if config.correction_bias is None else score + BIAS[order.long()]
    best_first = selection.argsort(1, descending=True)
    plan = Plan(
        MacsConfig.from_preset(gamma=1.0, reroute_rounds=1), EXPERTS, RANKS, None, topk.routing_of(config, True)
    )
    segment = torch.zeros(TOKENS, dtype=torch.int32)
    result = plan(RoutedTokens(hidden, ids, weights.float(), logits, segment, 1))
    found = {"order": order.gather(1, best_first), "score": score.gather(1, best_first), "ids": ids, "weights": weights}
    found |= {"new_ids": result.topk_ids, "new_weights": result.topk_weights, "room": result.cut[:, 2]}
    return {name: tensor.tolist() for name, tensor in found.items()}


class Experts(FusedMoE):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer_id = 3


class Router(TopK):
    """As a model makes it, without what SGLang has to know of the server by then."""

    def __init__(self, **kind: object) -> None:
        nn.Module.__init__(self)
        self.topk_config = TopKConfig(TOP_K, **kind)


class Block(nn.Module):
    """A MoE block, its experts and its router in either order."""

    def __init__(self, experts_first: bool = False, routers: int = 1, multi_gate: bool = False, **kind: object) -> None:
        super().__init__()
        self.multi_gate = multi_gate
        made = [(f"topk{i}", Router(**kind)) for i in range(routers)]
        for name, module in [("experts", Experts()), *made] if experts_first else [*made, ("experts", Experts())]:
            setattr(self, name, module)


BLOCKS = {
    "softmax": {},
    "DeepSeek-V3": {"experts_first": True, **V3},
    "own function": {"custom_routing_function": print},
    "other scores": {"scoring_func": "tanh"},
    "hash": {"routers": 0},
    "two routers": {"routers": 2},
    "a gate for each modality": {"multi_gate": True},
    "experts that do nothing": {"scoring_func": "sigmoid", "correction_bias": torch.zeros(EXPERTS + 2)},
}


def refused(kind: dict[str, object], reroute: str) -> str:
    """What a scheduler says at the end of making a model of one such block."""
    process = worker._current = worker.Worker(MacsConfig.from_preset(reroute=reroute))
    plan = Plan(process.config, EXPERTS, RANKS)
    process.planners[3] = type("Planner", (), {"plan": plan})
    kind = dict(kind)
    topk._on_cpu = lambda: True
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            topk._model_made(nn.Sequential(Block(**kind)))
        except SystemExit as stop:
            return f"{stop.code} {error.getvalue().strip().splitlines()[-1]}"
    assert plan.routing.needs_selection == (reroute == "global" and "correction_bias" in kind)
    return ""


assert loader._initialize_model.__wrapped__, "the hook did not take"
answers = {"routed": {name: routed(torch.Generator().manual_seed(1), **kind) for name, kind in KINDS.items()}}
answers["refused"] = {
    reroute: {name: refused(kind, reroute) for name, kind in BLOCKS.items()} for reroute in ("global", "none")
}
print(json.dumps(answers))
