"""The plan in front of DeepEP's dispatcher, and the fused dispatch in place of its low-latency kernels.

Which of DeepEP's modes a pass has is SGLang's choice, of `is_extend_in_batch`, which its schedulers have exchanged:
with --deepep-mode auto a pass in which any rank prefills is in normal mode on all.
"""

from functools import partial
from itertools import zip_longest

from ..console import say_once
from ..dispatch.fused import Sizes
from ..dispatch.low_latency import FusedLowLatency
from ..dispatch.planner import LayerPlanner
from ..observe.demand import GivenUp
from . import worker
from .hooks import Hook
from .topk import logits_of, routed_nowhere


def fused_low_latency(dispatcher, planner, moe_runner_config):
    """For every half of a batch the fused dispatch in place of DeepEP's low-latency kernels; empty: DeepEP's carry."""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput
    from sglang.srt.layers.moe.utils import is_sbo_enabled
    from sglang.srt.runtime_context import get_parallel

    if not planner.plan.config.may_fuse:
        return []
    inners, config, plan = dispatcher._inners, moe_runner_config, planner.plan
    mode, group = inners[0].deepep_mode.value, get_parallel().tp_group.cpu_group
    # Without a low-latency implementation there is nothing to ask: the mode alone refuses.
    impl = getattr(inners[0], "_low_latency_dispatcher", None)
    tokens = impl.num_max_dispatch_tokens_per_rank if impl is not None else 1
    sizes = Sizes(plan.num_ranks, plan.num_physical, config.top_k, tokens, config.hidden_size)
    transports = worker.current().transports.of(sizes, len(inners), mode, is_sbo_enabled(), group)
    if transports and plan.places is not None:
        say_once("the fused dispatch knows no replicas: the plan stands before it")

    def note(received):
        get_global_expert_distribution_recorder().on_deepep_dispatch_low_latency(received)

    return [
        FusedLowLatency(inner._low_latency_dispatcher, transport, planner, DeepEPLLDispatchOutput, note)
        for inner, transport in zip(inners, transports, strict=False)
    ]


def plan_before(dispatcher, planner: LayerPlanner, fused=(), given_up: GivenUp | None = None) -> None:
    """Wraps `dispatch_a`, the one funnel of DeepEP's modes and overlaps, on the instance: SGLang checks the class.

    fused: a `FusedLowLatency` for every inner dispatcher, or none; it plans and sends in one. given_up: is told of
    every plan.
    """
    halves = _Halves(planner, given_up)
    for inner, of_half in zip_longest(dispatcher._inners, fused):
        inner.dispatch_a = partial(halves.plan_first, inner.dispatch_a, inner, of_half)
        inner.dispatch_b = partial(halves.hint_rows, inner.dispatch_b)
    dispatcher._execute = partial(halves.execute, dispatcher._execute)


def planned(planner: LayerPlanner, hidden_states, topk_output, half=None, plan=None):
    """(the top-k as it is sent, the plan's result or None), measured and proved. half, plan: `LayerPlanner`'s."""
    topk_output = routed_nowhere(topk_output, hidden_states.shape[0])
    ids, weights = topk_output.topk_ids, topk_output.topk_weights
    found = planner(hidden_states, ids, weights, logits_of(topk_output), half, plan)
    planner.measure(ids, found)
    return topk_output._replace(topk_ids=found.topk_ids, topk_weights=found.topk_weights), found.result


class _Halves:
    """What is wrapped around a layer's dispatchers, and which half of the batch they dispatch: under two-batch overlap
    there is one for each.
    """

    def __init__(self, planner: LayerPlanner, given_up: GivenUp | None) -> None:
        self._planner, self._given_up = planner, given_up
        self._half: int | None = None  # None: a whole batch

    def execute(self, original, name, tbo_subbatch_index=None, **kwargs):
        """AROUND `_execute`, which knows the half."""
        self._half = tbo_subbatch_index
        return original(name, tbo_subbatch_index, **kwargs)

    def plan_first(self, dispatch_a, inner, fused, hidden_states, topk_output):
        """AROUND `dispatch_a`: what is planned is sent, and proved."""
        if fused is not None:
            fused.in_halves = self._half is not None
        plan = fused.plan if fused is not None and inner._get_impl() is fused.impl and fused.plans() else None
        output, result = planned(self._planner, hidden_states, topk_output, self._half, plan)
        if self._given_up is not None and result is not None:
            self._given_up.add(self._planner.layer_id, result)
        return dispatch_a(hidden_states=hidden_states, topk_output=output)

    def hint_rows(self, dispatch_b):
        """AROUND `dispatch_b`, low latency: the rows that DeepGEMM tiles for. DeepEP's hint takes all ranks to be as
        full as this one.
        """
        output = dispatch_b()
        if not hasattr(output, "expected_m"):
            return output
        rows = self._planner.expected_rows(output.topk_ids.shape[1])
        return output if rows is None else output._replace(expected_m=rows)


def _masked_gemm(original, inputs, weights, out, *args, **kwargs):
    """AROUND deep_gemm_wrapper.grouped_gemm_nt_*_masked: outputs of experts that the fused dispatch has fed are written
    where its combine reads them, not copied there.
    """
    worker.current().transports.place_outputs(inputs[0] if isinstance(inputs, tuple) else inputs, out)
    return original(inputs, weights, out, *args, **kwargs)


HOOKS = tuple(
    Hook(f"sglang.srt.layers.deep_gemm_wrapper.grouped_gemm_nt_{kind}_masked", _masked_gemm, "around")
    for kind in ("bf16", "f8f8bf16")
)
