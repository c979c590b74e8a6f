"""SGLang's replicas of experts: where they lie, now and after each rebalancing, what its recorder counts for EPLB, and
what some models lack for it.
"""

from contextlib import nullcontext

import torch

from ..config import MacsConfig
from ..errors import MacsNotActive
from ..plan.places import Places
from . import worker
from .hooks import Hook
from .placement import replicas_on
from .refusal import or_exit

_RECORDER = "sglang.srt.eplb.expert_distribution"
_QWEN3_VL_MOE = "sglang.srt.models.qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration"


def places_of(config: MacsConfig, moe_runner_config) -> Places | None:
    """Of a layer whose replicas the plan chooses among; None: physical experts are taken for experts as they come."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_device, get_exec, get_parallel

    moe = get_exec().moe
    placed = moe.enable_eplb or moe.ep_num_redundant_experts or moe.init_expert_location != "trivial"
    device = str(get_device().device).partition(":")[0]
    if not placed or config.is_off or config.replicas == "keep":
        return None
    if not replicas_on(device, moe.deepep_mode):
        return None
    metadata, layer_id = get_global_expert_location_metadata(), moe_runner_config.layer_id
    if metadata is None or metadata.num_physical_experts != moe_runner_config.num_experts:
        raise MacsNotActive("SGLang does not say where this model's experts lie; pass --macs-replicas keep")
    parallel = get_parallel()
    sizes = metadata.num_logical_experts, metadata.num_physical_experts, parallel.moe_ep_size, parallel.moe_ep_rank
    return Places(*sizes, metadata.physical_to_logical_map_cpu[layer_id])


@or_exit
def _expert_location_update(result, self, other, update_layer_ids):
    """AFTER ExpertLocationMetadata.update: the tables follow. All ranks come here behind the same forward pass."""
    planners = worker.current().planners
    for layer_id in update_layer_ids:
        planner = planners.get(layer_id)
        if planner is not None and planner.plan.places is not None:
            planner.plan.places.refresh(self.physical_to_logical_map_cpu[layer_id])


def counts_behind_dispatch() -> bool:
    """Whether SGLang's recorder counts the rows that arrive, not those that were routed."""
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    return moe.expert_distribution_recorder_mode in ("stat", "per_pass") and moe.deepep_mode == "low_latency"


def _collect(original, self):
    """AROUND _LayerBasedGpuSinglePassGatherer.collect, at the end of a pass: what was clipped was asked for, too.

    SGLang adds up the counts of all ranks; here each adds what its own tokens have lost, at any copy of the expert.
    """
    process, found = worker.current(), original(self)
    for layer_id, given_up in process.given_up.take().items():
        places = process.planners[layer_id].plan.places
        counts = found["global_physical_count"][layer_id]
        at = torch.arange(len(given_up)) if places is None else places.first
        counts.index_add_(0, at.to(counts.device), given_up.to(counts.dtype))
    return found


def _moe_block_forward(original, self, *args, **kwargs):
    """AROUND Qwen3MoeSparseMoeBlock.forward: the recorder learns which layer this is, where the model does not say so.

    Without that, any recorder of the expert distribution dies in the first pass of Qwen3-VL-MoE.
    """
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

    recorder = get_global_expert_distribution_recorder()
    known = getattr(recorder, "_current_layer_idx", None)
    unknown = known is not None and known.value is None
    with recorder.with_current_layer(self.layer_id) if unknown else nullcontext():
        return original(self, *args, **kwargs)


@property
def _routed_experts_weights_of_layer(self):
    """Of Qwen3-VL-MoE: {layer: weights of its experts}, which EPLB moves."""
    blocks = {i: getattr(layer, "mlp", None) for i, layer in enumerate(self.model.layers)}
    return {i: block.get_moe_weights() for i, block in blocks.items() if hasattr(block, "get_moe_weights")}


HOOKS = (
    Hook("sglang.srt.eplb.expert_location.ExpertLocationMetadata.update", _expert_location_update, "after"),
    Hook(f"{_RECORDER}._LayerBasedGpuSinglePassGatherer.collect", _collect, "around"),
    Hook("sglang.srt.models.qwen3_moe.Qwen3MoeSparseMoeBlock.forward", _moe_block_forward, "around"),
    Hook(f"{_QWEN3_VL_MOE}.routed_experts_weights_of_layer", _routed_experts_weights_of_layer, "missing"),
)
