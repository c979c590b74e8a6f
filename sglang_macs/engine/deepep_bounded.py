"""The bounded dispatch in SGLang: DeepEP's normal mode with no count on the host, and DeepGEMM behind it."""

from functools import partial

from ..comm import peer_memory
from ..dispatch import bounded
from ..dispatch.alias import alias
from ..dispatch.layer_graph import LayerGraph, LayerGraphs
from ..dispatch.transport import say_for_group, unfit_device
from . import worker
from .hooks import Hook

BOUNDED = "macs_bounded"  # format of a bounded dispatch in SGLang's registry
_DEEP_GEMM = "sglang.srt.layers.deep_gemm_wrapper"


def bound_normal(dispatcher, planner, moe_runner_config) -> None:
    """Under the bounded dispatch DeepEP's normal mode is told how many tokens can come, and counts none."""
    from sglang.srt.layers.moe.token_dispatcher.base import DispatchOutputFormat
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput
    from sglang.srt.runtime_context import get_parallel

    process = worker.current()
    if not process.config.may_bound:
        return
    if process.bounded is None:
        unfit = peer_memory.everyone(unfit_device(), get_parallel().tp_group.cpu_group)
        tell = partial(say_for_group, group=planner.group)
        process.bounded = bounded.BoundedDispatch(process.config, tell, next(filter(None, unfit), ""))
        process.layer_graphs = LayerGraphs(tell) if process.config.layer_graphs else None
        register_permutation()

    class Format:
        """DeepEP's, but for the name under which the runner finds its permutation."""

        value = BOUNDED

        def __getattr__(self, name):
            return getattr(DispatchOutputFormat.DEEPEP_NORMAL, name)

    class Output(DeepEPNormalDispatchOutput):
        format = Format()

    def make_output(output, received):
        made = Output(*output)
        made.received = received
        return made

    config = moe_runner_config
    sizes = bounded.Sizes.of(planner.plan, config.top_k, config.hidden_size)
    process.bounded.expect(sizes, -(-worker.most_prefill_tokens() // planner.attn_tp[1]))
    for inner in dispatcher._inners:
        impl = getattr(inner, "_normal_dispatcher", None)
        if impl is not None:
            normal = bounded.BoundedNormal(impl, process.bounded, planner, sizes, make_output)
            if process.layer_graphs is not None:
                dispatcher.macs_graph = LayerGraph(process.layer_graphs, normal, partial(_carries, inner, impl))


def _carries(inner, impl) -> bool:
    return inner._get_impl() is impl


def _forward_impl(original, self, hidden_states, topk_output):
    """AROUND DeepEPMoE.forward_impl: dispatch, experts and combine of a layer, one launch where it can be a graph."""
    graph = getattr(self.dispatcher, "macs_graph", None)
    if graph is None or topk_output._fields != ("topk_weights", "topk_ids", "router_logits"):
        return original(self, hidden_states, topk_output)

    def forward(hidden, ids, weights, logits):
        return original(self, hidden, topk_output._replace(topk_ids=ids, topk_weights=weights, router_logits=logits))

    return graph(forward, hidden_states, topk_output.topk_ids, topk_output.topk_weights, topk_output.router_logits)


def register_permutation() -> None:
    """What lies between a bounded dispatch and DeepGEMM's runner, in SGLang's registry."""
    from sglang.srt.layers.moe.moe_runner.base import register_post_permute, register_pre_permute
    from sglang.srt.layers.moe.moe_runner.deep_gemm import DeepGemmRunnerInput
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalCombineInput
    from sglang.srt.utils import dispose_tensor

    @register_pre_permute(BOUNDED, "deep_gemm")
    def permute(dispatch_output, quant_info, runner_config, running_state):
        received = dispatch_output.received
        rows, scales, index = received.permute()
        running_state |= {
            "all_tokens": rows.shape[0],
            "hidden_states_shape": received.tokens.shape,
            "hidden_states_device": rows.device,
            "hidden_states_dtype": rows.dtype,
            BOUNDED: (received, index.place),
        }
        dispose_tensor(received.tokens)  # as SGLang's own does: its memory serves the GEMM
        return DeepGemmRunnerInput(
            hidden_states=rows,
            hidden_states_scale=scales,
            use_masked_gemm=False,
            m_indices=index.expert_end,
            activation_scale_block_size=128,
        )

    @register_post_permute("deep_gemm", BOUNDED)
    def gather(runner_output, quant_info, runner_config, running_state):
        received, place = running_state[BOUNDED]
        tokens = received.gather(runner_output.hidden_states, place)
        return DeepEPNormalCombineInput(tokens, received.topk_ids, received.topk_weights)


def _align_scale(original, scale):
    """AROUND tma_align_input_scale: scales that lie as DeepGEMM reads them, as those of a bounded dispatch do, are not
    copied: columns one behind the other, each at a multiple of 16 bytes.
    """
    rows, itemsize = scale.shape[0], scale.element_size()
    lies_so = scale.stride() == (1, rows) and rows * itemsize % 16 == 0 and scale.data_ptr() % 16 == 0
    return scale if lies_so else original(scale)


def _grouped_gemm(gemm: str):
    """AROUND deep_gemm_wrapper.grouped_gemm_nt_*_contig: a bounded dispatch tells the end of each expert's rows in
    place of each row's expert, and no tile behind is computed. (Those marked -1 are, in bf16.)
    """

    def around(original, lhs, rhs, out, layout, **recipes):
        if layout.shape[0] == out.shape[0]:
            return original(lhs, rhs, out, layout, **recipes)
        import deep_gemm

        given = {name: recipe for name, recipe in recipes.items() if recipe is not None}
        lhs, out = _as_for_the_largest_batch(lhs, out)
        return getattr(deep_gemm, gemm)(lhs, rhs, out, layout, use_psum_layout=True, **given)

    return around


def _as_for_the_largest_batch(lhs, out):
    """DeepGEMM chooses a kernel by the number of rows, and compiles for seconds where it has none: in bf16 it is told
    that of the largest batch in all. It touches no row behind the experts' ends. FP8's scales lie by that number.
    """
    rows = worker.current().bounded.most_rows
    if isinstance(lhs, tuple) or rows <= out.shape[0]:
        return lhs, out
    return alias(lhs, rows), alias(out, rows)


HOOKS = (
    Hook("sglang.srt.layers.moe.ep_moe.layer.DeepEPMoE.forward_impl", _forward_impl, "around"),
    Hook(f"{_DEEP_GEMM}.grouped_gemm_nt_bf16_contig", _grouped_gemm("m_grouped_bf16_gemm_nt_contiguous"), "around"),
    Hook(f"{_DEEP_GEMM}.grouped_gemm_nt_f8f8bf16_contig", _grouped_gemm("m_grouped_fp8_gemm_nt_contiguous"), "around"),
    Hook("sglang.kernels.ops.moe.ep_moe_kernels.tma_align_input_scale", _align_scale, "around"),
)
