"""Which dispatcher a MoE layer gets: ours on CPU, DeepEP's with the plan in front of it on CUDA."""

from ..dispatch.cpu import MacsDispatcher
from ..dispatch.plan_cost import ExpertSizes
from ..dispatch.planner import LayerPlanner
from ..errors import MacsNotActive
from ..observe.recorder import Place
from ..plan.plan import Plan
from . import deepep, deepep_bounded, deepep_v2, replicas, worker
from .hooks import Hook
from .launch import V2
from .refusal import or_exit
from .topk import logits_of


def _is_deepep(original, self):
    """AROUND MoeA2ABackend.is_deepep: on CPU models scatter their MoE rows, keep shared experts whole and leave
    dispatch and combine to the dispatcher, as for DeepEP.
    """
    return self.is_customized() or original(self)


def _get_moe_impl_class(original, quant_config):
    """AROUND get_moe_impl_class: on CPU the layer that takes any dispatcher, not the one for DeepEP's formats."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return FusedMoE if get_moe_a2a_backend().is_customized() else original(quant_config)


@or_exit
def _create_moe_dispatcher(original, moe_runner_config, *args, **kwargs):
    """AROUND: our dispatcher for the `customized` backend (CPU); our plan in front of DeepEP's own."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    backend = get_moe_a2a_backend()
    is_v2 = backend.value == V2
    if not (backend.is_customized() or backend.is_deepep() or is_v2):
        return original(moe_runner_config, *args, **kwargs)
    if moe_runner_config.num_fused_shared_experts:
        raise MacsNotActive("fused shared experts must not be clipped; pass --disable-shared-experts-fusion")
    planner = _layer_planner(moe_runner_config)
    if backend.is_customized():
        return _cpu_dispatcher(planner)
    dispatcher = original(moe_runner_config, *args, **kwargs)
    if is_v2:
        deepep_v2.plan_before(dispatcher, planner, moe_runner_config)
        return dispatcher
    deepep_bounded.bound_normal(dispatcher, planner, moe_runner_config)
    given_up = worker.current().given_up if replicas.counts_behind_dispatch() else None
    fused = deepep.fused_low_latency(dispatcher, planner, moe_runner_config)
    deepep.plan_before(dispatcher, planner, fused, given_up)
    return dispatcher


def _layer_planner(moe_runner_config):
    from sglang.srt.runtime_context import get_parallel

    process, parallel, layer_id = worker.current(), get_parallel(), moe_runner_config.layer_id
    places = replicas.places_of(process.config, moe_runner_config)
    plan = Plan(
        process.config,
        moe_runner_config.num_experts if places is None else places.num_experts,
        parallel.moe_ep_size,
        process.profile.of_layer(layer_id) if process.profile else None,
        places=places,
    )
    attn_tp = (parallel.attn_tp_rank, parallel.attn_tp_size)
    traced = process.recorder_at(_place(parallel))
    group = parallel.tp_group
    peers = process.transports.all_reduce(plan.histogram_size, group.cpu_group)
    planner = LayerPlanner(
        layer_id, plan, group.device_group, process.stats, attn_tp, traced, peers, process.acting, process.observed
    )
    process.planners[layer_id] = planner
    process.top_k = max(process.top_k, moe_runner_config.top_k or 1)
    sizes = (moe_runner_config.hidden_size, moe_runner_config.intermediate_size_per_partition, process.top_k)
    process.expert_sizes = ExpertSizes(*sizes)
    return planner


def _place(parallel) -> Place:
    """Which file of a trace is this process's. Under dp-attention the ranks of dp are ranks of one EP group."""
    replica = (parallel.dp_rank or 0) if parallel.attn_dp_size == 1 else 0
    return Place(parallel.moe_ep_rank, parallel.pp_rank, replica, parallel.pp_size, parallel.attn_tp_size)


def _cpu_dispatcher(planner):
    from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    inner = MacsDispatcher(planner)

    class Dispatcher(BaseDispatcher):
        """SGLang's interface around `MacsDispatcher`: rows come out as single-expert tokens of gate 1."""

        def dispatch(self, hidden_states, topk_output):
            weights, ids = topk_output.topk_weights, topk_output.topk_ids
            rows, experts = inner.dispatch(hidden_states, ids, weights.float(), logits_of(topk_output))
            ones = rows.new_ones((rows.shape[0], 1), dtype=weights.dtype)
            return StandardDispatchOutput(
                rows, None, StandardTopKOutput(ones, experts.to(ids.dtype).unsqueeze(1), None)
            )

        def combine(self, combine_input):
            return inner.combine(combine_input.hidden_states)

    return Dispatcher()


HOOKS = (
    Hook("sglang.srt.layers.moe.utils.MoeA2ABackend.is_deepep", _is_deepep, "around"),
    Hook("sglang.srt.layers.moe.ep_moe.layer.get_moe_impl_class", _get_moe_impl_class, "around"),
    Hook("sglang.srt.layers.moe.fused_moe_triton.layer.create_moe_dispatcher", _create_moe_dispatcher, "around"),
)
