"""The plan in front of DeepEP V2's dispatcher, and its prefills without a count on the host."""

from functools import partial

from ..dispatch import bounded
from ..dispatch.bounded_v2 import BoundedV2
from ..dispatch.transport import say_for_group
from . import deepep, worker

BOUNDED_V2 = "macs_bounded_v2"  # format of a bounded dispatch in SGLang's registry
PLANNED_MODELS = ("Qwen3VLMoeForConditionalGeneration",)  # run blocks of a model that SGLang lets through V2


def register_models() -> None:
    """Lets SGLang's check of architectures through whose blocks V2 serves already."""
    from sglang.srt.configs.moe_model_registry import register_deepep_v2_model

    for architecture in PLANNED_MODELS:
        register_deepep_v2_model(architecture)


def plan_before(dispatcher, planner, moe_runner_config) -> None:
    """Wraps `dispatch` on the instance: SGLang checks the class. Prefills count nothing where that can be had."""
    _bound(dispatcher, planner, moe_runner_config)
    dispatcher.dispatch = partial(_plan_first, dispatcher.dispatch, planner)


def _plan_first(dispatch, planner, hidden_states, topk_output):
    """AROUND DeepEPv2Dispatcher.dispatch: what is planned is sent, and proved."""
    output, _ = deepep.planned(planner, hidden_states, topk_output)
    return dispatch(hidden_states=hidden_states, topk_output=output)


def _bound(dispatcher, planner, moe_runner_config) -> None:
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    process, config = worker.current(), moe_runner_config
    if not process.config.may_bound:
        return
    if process.bounded is None:
        process.bounded = bounded.BoundedDispatch(process.config, partial(say_for_group, group=planner.group))
        register_expanded()
    sizes = bounded.Sizes.of(planner.plan, config.top_k, config.hidden_size)
    process.bounded.expect(sizes, -(-worker.most_prefill_tokens() // planner.attn_tp[1]))
    BoundedV2(dispatcher._impl, process.bounded, planner, sizes, get_is_extend_in_batch, output_class()._make)


def output_class() -> type:
    """SGLang's output of a dispatch, but for its format's name."""
    from sglang.srt.layers.moe.token_dispatcher.base import DispatchOutputFormat
    from sglang.srt.layers.moe.token_dispatcher.deepep_v2 import DeepEPv2DispatchOutput

    class Format:
        """DeepEP V2's, but for the name under which the runner finds what lies before it."""

        value = BOUNDED_V2

        def __getattr__(self, name):
            return getattr(DispatchOutputFormat.DEEPEP_V2, name)

    class Output(DeepEPv2DispatchOutput):
        format = Format()

    return Output


def register_expanded() -> None:
    """What lies between a bounded dispatch and DeepGEMM's runner, in SGLang's registry: nothing is moved."""
    from sglang.srt.layers.moe.moe_runner.base import (
        PermuteMethodPool,
        register_post_permute,
        register_pre_permute,
    )
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmRunnerInput

    @register_pre_permute(BOUNDED_V2, "deep_gemm")
    def hand_over(dispatch_output, quant_info, runner_config, running_state):
        rows = dispatch_output.hidden_states
        running_state |= {
            "all_tokens": rows.shape[0],
            "hidden_states_shape": rows.shape,
            "hidden_states_device": rows.device,
            "hidden_states_dtype": rows.dtype,
            "topk_ids": None,
            "topk_weights": dispatch_output.topk_weights,
            "deepep_v2_expanded": True,
        }
        return DeepGemmRunnerInput(
            hidden_states=rows,
            hidden_states_scale=dispatch_output.hidden_states_scale,
            use_masked_gemm=False,
            m_indices=dispatch_output.psum_num_recv_tokens_per_expert,  # ends of the experts' rows, as DeepGEMM reads
            activation_scale_block_size=dispatch_output.activation_scale_block_size,
        )

    register_post_permute("deep_gemm", BOUNDED_V2)(PermuteMethodPool.get_post_permute("deep_gemm", "deepep_v2"))
