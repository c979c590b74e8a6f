"""SGLang's top-k: how each MoE layer's router chooses and weighs experts, and what its outputs leave out."""

from typing import Any

from ..choices import SCORINGS
from ..console import say_once
from ..errors import MacsNotActive
from ..plan.routing import Routing
from . import worker
from .hooks import Hook
from .moe_config import OWN_FUNCTION
from .refusal import or_exit


@or_exit
def _model_made(model, *args, **kwargs):
    """AFTER _initialize_model: every planner learns its router, which stands beside the layer's experts."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    process = worker.current()
    if process.config.reroute == "none" or process.config.changes_nothing:
        return
    for block in model.modules():
        for experts in (child for child in block.children() if isinstance(child, FusedMoE)):
            planner = process.planners.get(experts.layer_id)
            if planner is not None:
                _follow(planner.plan, _router_of(block))


def _router_of(block: Any) -> Any:
    """The configuration of the TopK of a MoE block. Raises MacsNotActive where that does not say all."""
    from sglang.srt.layers.moe.topk import TopK

    routers = [child for child in block.children() if isinstance(child, TopK)]
    if len(routers) != 1:
        raise _cannot_follow(f"{type(block).__name__}, which routes by something else than one TopK")
    if getattr(block, "multi_gate", False):
        raise _cannot_follow(f"{type(block).__name__}, which has a gate for each modality")
    return routers[0].topk_config


def _follow(plan: Any, router: Any) -> None:
    routing = routing_of(router, _on_cpu())
    bias = routing.correction_bias
    if bias is not None and bias.numel() != plan.num_experts:
        raise _cannot_follow(f"a router of {bias.numel()} experts, {plan.num_experts} of which are dispatched")
    plan.follow(routing)
    if routing.needs_selection and plan.config.may_fuse and not _on_cpu():
        say_once(
            "the fused dispatch does not re-route by a correction bias or expert groups: the plan stands before it"
        )


def _on_cpu() -> bool:
    from sglang.srt.runtime_context import get_device

    return str(get_device().device) == "cpu"


def routing_of(router: Any, on_cpu: bool) -> Routing:
    """What SGLang's `select_experts` does under the TopKConfig `router`. Raises MacsNotActive for what nobody knows.

    Biased groups are scored by sigmoid, whatever the configuration says. A bias on softmax without groups counts on a
    CPU alone.
    """
    bias, scoring = router.correction_bias, router.scoring_func
    if router.custom_routing_function is not None:
        raise _cannot_follow(OWN_FUNCTION)
    if router.use_grouped_topk:
        scoring = scoring if bias is None else "sigmoid"
        return _known(scoring, bias, router.num_expert_group, router.topk_group)
    if bias is not None and scoring == "softmax" and not on_cpu:
        raise _cannot_follow("softmax with a correction bias, which SGLang does not use on GPUs")
    return _known(scoring, bias)


def _known(scoring: str, *others: Any) -> Routing:
    if scoring not in SCORINGS:
        raise _cannot_follow(f"{scoring} scores")
    return Routing(scoring, *others)


def _cannot_follow(what: str) -> MacsNotActive:
    return MacsNotActive(f"re-routing cannot follow {what}; pass --macs-reroute none")


def logits_of(topk_output):
    """[T, E] router logits or None. SGLang's empty output carries K columns where E belong."""
    return topk_output.router_logits if topk_output.topk_ids.shape[0] else None


def routed_nowhere(topk_output, rows: int):
    """The top-k, or as many rows of none: with two-batch overlap, SGLang pads an idle rank's rows in decode and hands
    over a top-k of no rows, on which DeepEP dies.
    """
    if not topk_output.topk_ids.shape[0] < rows:
        return topk_output
    top_k = topk_output.topk_ids.shape[1]
    nowhere = topk_output.topk_ids.new_full((rows, top_k), -1)
    return topk_output._replace(topk_ids=nowhere, topk_weights=topk_output.topk_weights.new_zeros((rows, top_k)))


HOOKS = (Hook("sglang.srt.model_loader.loader._initialize_model", _model_made, "after"),)
