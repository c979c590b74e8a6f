"""The SGLang plugin, and the only module that imports sglang: flags, hooks, dispatcher, runner.

Order of events. The launcher loads plugins, parses flags (`_from_cli_args`, `_engine_args`) and resolves them
(`_resolve_once`): MACS is translated into a backend SGLang knows, and refused here if a flag or the model rules it out.
The configuration stays with SGLang's record of the server: two engines of one process each have their own, or none.
Scheduler processes are started with it through `run_scheduler_process` below, which applies the model-side hooks and
checks that every one took: SGLang logs and swallows exceptions of plugins and hooks, and would serve on without MACS.
Without a configuration nothing is hooked on the model side.

docs/hooks.md says why each target is hooked.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial, wraps
from itertools import zip_longest
from typing import Any

from .. import cpu_compat, ops
from ..comm import peer_memory
from ..config import MacsConfig, add_flags, configure, configured, flag, from_options, given_options
from ..console import say, say_once
from ..dispatch import bounded, plan_cost
from ..dispatch.acting import LOOK_EVERY
from ..dispatch.dispatcher import LayerPlanner, MacsDispatcher
from ..dispatch.fused import Sizes
from ..dispatch.low_latency import FusedLowLatency
from ..dispatch.transport import say_for_group, unfit_device
from ..errors import MacsError, MacsNotActive
from ..observe import recorder
from ..observe.shared_state import SharedState
from ..plan import batch, profile
from ..plan.plan import Plan, check_batch_size
from . import compat, hooks, moe_config, worker
from .agreement import Agreement
from .hooks import Hook

RUNNER = "macs"
BOUNDED = "macs_bounded"  # format of a bounded dispatch in SGLang's registry


def _exit(error: Exception) -> None:
    say(str(error))
    raise SystemExit(2) from error


# ---- Launcher: flags and refusals ----------------------------------------------------------------------------------


class _EnableMacs(argparse._StoreTrueAction):
    """A switch that looks at the launcher's hooks itself: with the other ones missing, nobody else would read it.

    Of the class that SGLang's --config files take for a switch.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            hooks.check(LAUNCHER_HOOKS)
        except MacsNotActive as error:
            _exit(error)
        super().__call__(parser, namespace, values, option_string)


def _add_cli_args(result, parser):
    """AFTER ServerArgs.add_cli_args: `macs` as a choice of backend, and MACS's own flags."""
    for action in parser._actions:
        if "--moe-a2a-backend" in action.option_strings and "macs" not in action.choices:
            action.choices = [*action.choices, "macs"]
    add_flags(parser)
    parser.add_argument("--enable-macs", action=_EnableMacs, help="bound the expert-parallel load with MACS")


def _is_asked(options: dict[str, Any], backend: str) -> bool:
    """Whether a command line's or an engine's options ask for MACS. Raises MacsError, MacsNotActive."""
    given = next(iter(given_options(options)), None)
    if not (options.get("enable_macs") or backend == "macs"):
        if given is not None:
            what, expected = flag(given.removeprefix("macs_")), "it beside every --macs- flag"
            raise MacsError(what, "no --enable-macs", expected, "Add --enable-macs.")
        return False
    hooks.check(LAUNCHER_HOOKS)
    compat.check_a2a(backend)
    return True


def _from_cli_args(original, cls, args):
    """AROUND ServerArgs.from_cli_args: flags -> what the record carries; SGLang never sees `macs`."""
    options = vars(args)
    try:
        config = from_options(options) if _is_asked(options, args.moe_a2a_backend) else None
    except (MacsError, MacsNotActive) as error:
        _exit(error)
    record = original(cls, args)
    if config is not None:
        record._macs_config, record._macs_from_cli = config.to_json(), True
    return record


def _engine_args(original, **kwargs):
    """AROUND Engine.server_args_class: `enable_macs` and `macs_*` beside SGLang's own arguments."""
    options = {name: kwargs.pop(name) for name in list(kwargs) if name == "enable_macs" or name.startswith("macs_")}
    asked = _is_asked(options, kwargs.get("moe_a2a_backend", "none"))
    record = original(**kwargs)
    if asked:
        record._macs_config = (from_options(options) if given_options(options) else _default_config()).to_json()
    return record


def _default_config() -> MacsConfig:
    return configured() or MacsConfig.from_preset()


def _config_of(record) -> MacsConfig | None:
    """The configuration that SGLang's record of a server carries, or None: MACS was not asked for."""
    if record.moe_a2a_backend == "macs" and not hasattr(record, "_macs_config"):  # a record made by hand
        record._macs_config = _default_config().to_json()
    values = getattr(record, "_macs_config", None)
    return None if values is None else MacsConfig.from_json(values)


def _resolve_once(original, self):
    """AROUND ServerArgs.resolve_once: translate the backend before SGLang resolves, refuse what MACS cannot serve
    after.
    """
    if getattr(self, "_resolution_finished", False) or (config := _config_of(self)) is None:
        return original(self)
    try:
        hooks.check(LAUNCHER_HOOKS)
        _translate(self)
        config = config.on(self.device)
        self._macs_config = config.to_json()
        if getattr(self, "_macs_from_cli", False):
            configure(config)  # this process serves nothing else: whatever it starts can read it
        original(self)
        _check_launch(self, config)
    except (MacsError, MacsNotActive) as error:
        if getattr(self, "_macs_from_cli", False):
            _exit(error)
        raise


def _translate(record) -> None:
    """`macs` becomes the backend whose code paths SGLang takes: deepep on CUDA, the open `customized` on CPU."""
    if record.moe_a2a_backend == "customized":
        return  # a copy of a record that was translated before
    ops.check()
    compat.check_a2a(record.moe_a2a_backend)
    if record.device == "cpu":
        record.moe_a2a_backend = "customized"
    else:
        _translate_for_cuda(record)
    if record.ep_size == 1:
        record.ep_size = record.tp_size  # as SGLang does for DeepEP
    if record.moe_runner_backend == RUNNER:
        _register_runner_name()


def _translate_for_cuda(record) -> None:
    """DeepEP's dispatcher, planned; DeepGEMM's runner, the only one that takes DeepEP's formats in bf16."""
    if not ops.has_cuda():
        fix = "Build it where nvcc and a CUDA torch are, or serve with --device cpu."
        raise MacsError("sglang_macs._C", "no CUDA operators", "a build with CUDA for a GPU server", fix)
    record.moe_a2a_backend = "deepep"
    if record.moe_runner_backend in ("auto", RUNNER):
        record.moe_runner_backend = "deep_gemm"


def _check_launch(record, config: MacsConfig) -> None:
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    model = model_config_of(record)
    architecture, text = (model.hf_config.architectures or ["unknown"])[0], model.hf_text_config
    launch = compat.Launch(
        resolved_view(record),
        config,
        architecture,
        moe_config.num_experts(text),
        moe_config.top_k(text),
        moe_config.special_routing(text),
        model.context_len,
    )
    compat.check(launch)
    if config.profile:
        of_model = profile.load(config.profile)
        of_model.check_model(architecture, launch.num_experts)
        for layer in moe_config.layers(text) or ():
            of_model.of_layer(layer)


def _launch_subprocesses(original, cls, server_args, *args, **kwargs):
    """AROUND Engine._launch_subprocesses: a kind of engine that starts schedulers in its own way (RayEngine) would
    start them without MACS.
    """
    ours = hooks.is_wrapped_by(cls._launch_scheduler_processes, _launch_scheduler_processes)
    if not ours and _config_of(server_args) is not None:
        got = f"{cls.__name__}, which starts schedulers in its own way"
        raise MacsError("engine", got, "one whose schedulers load plugins (MACS)", "Use sglang.Engine.")
    return original(cls, server_args, *args, **kwargs)


def _launch_scheduler_processes(original, cls, server_args, port_args, run_scheduler_process_func, **kwargs):
    """AROUND Engine._launch_scheduler_processes: schedulers start through our own entry, which checks its hooks."""
    config, entry = _config_of(server_args), run_scheduler_process_func
    if config is not None:  # one name for the trace files of all schedulers
        entry = partial(run_scheduler_process, config.to_json(), recorder.new_run())
    return original(cls, server_args, port_args, entry, **kwargs)


LAUNCHER_HOOKS = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", _add_cli_args, "after"),
    Hook("sglang.srt.server_args.ServerArgs.from_cli_args", _from_cli_args, "around"),
    Hook("sglang.srt.server_args.ServerArgs.resolve_once", _resolve_once, "around"),
    Hook("sglang.srt.entrypoints.engine.Engine.server_args_class", _engine_args, "class"),
    Hook("sglang.srt.entrypoints.engine.Engine._launch_subprocesses", _launch_subprocesses, "around"),
    Hook("sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes", _launch_scheduler_processes, "around"),
)


# ---- Scheduler: the model side -------------------------------------------------------------------------------------


def run_scheduler_process(config: dict[str, object], run: str, *args, **kwargs):
    """Entry of a scheduler process: hooks applied and checked, then SGLang's own entry.

    config: `MacsConfig.to_json` of the server that this process belongs to; run: the name of its start, for a trace.
    """
    from sglang.srt.plugins import load_plugins

    global _in_scheduler
    _in_scheduler = True
    configure(MacsConfig.from_json(config))
    os.environ[recorder.RUN_ENV] = run
    load_plugins()
    try:
        hooks.check((*SCHEDULER_HOOKS, *_registered))
    except MacsNotActive as error:
        _exit(error)
    from sglang.srt.managers.scheduler import run_scheduler_process as entry

    return entry(*args, **kwargs)


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


def _expert_location(original, cls, *args, **kwargs):
    """AROUND ExpertLocationDispatchInfo.init_new: nothing, where nobody asked for it.

    Up to 0.5.22, SGLang first asserts metadata that many multimodal models do not provide, and then does the same.
    """
    from sglang.srt.runtime_context import get_exec

    return None if get_exec().moe.ep_dispatch_algorithm is None else original(cls, *args, **kwargs)


def _or_exit(function):
    """Ends the process with one line where `function` refuses: SGLang would make a page of traceback of it."""

    @wraps(function)
    def refusing(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (MacsError, MacsNotActive) as error:
            _exit(error)

    return refusing


@_or_exit
def _topk_init(result, self, *args, **kwargs):
    """AFTER TopK.__init__: how this layer routes, whatever the model's configuration made the launcher believe."""
    config, topk = worker.current().config, self.topk_config
    if config.reroute == "none" or config.changes_nothing:
        return
    special = ""
    if topk.custom_routing_function is not None:
        special = "a routing function of the model's own"
    elif topk.correction_bias is not None:
        special = "a correction bias in the selection"
    elif topk.scoring_func != "softmax":
        special = f"{topk.scoring_func} scores"
    elif topk.use_grouped_topk:
        special = moe_config.group_limit(topk.num_expert_group, topk.topk_group)
    if special:
        raise MacsNotActive(f"re-routing cannot follow {special}; pass --macs-reroute none")


@_or_exit
def _create_moe_dispatcher(original, moe_runner_config, *args, **kwargs):
    """AROUND: our dispatcher for the `customized` backend (CPU); our plan in front of DeepEP's own."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    backend = get_moe_a2a_backend()
    if not (backend.is_customized() or backend.is_deepep()):
        return original(moe_runner_config, *args, **kwargs)
    if moe_runner_config.num_fused_shared_experts:
        raise MacsNotActive("fused shared experts must not be clipped; pass --disable-shared-experts-fusion")
    planner = _layer_planner(moe_runner_config)
    if backend.is_customized():
        return _cpu_dispatcher(planner)
    dispatcher = original(moe_runner_config, *args, **kwargs)
    _bound_normal(dispatcher, planner, moe_runner_config)
    return _plan_before_deepep(dispatcher, planner, _fused_low_latency(dispatcher, planner, moe_runner_config))


def _layer_planner(moe_runner_config):
    from sglang.srt.runtime_context import get_parallel

    process, parallel, layer_id = worker.current(), get_parallel(), moe_runner_config.layer_id
    plan = Plan(
        process.config,
        moe_runner_config.num_experts,
        parallel.moe_ep_size,
        process.profile.of_layer(layer_id) if process.profile else None,
    )
    attn_tp = (parallel.attn_tp_rank, parallel.attn_tp_size)
    traced = process.recorder_at(_place(parallel))
    group = parallel.tp_group
    peers = process.transports.all_reduce(plan.histogram_size, group.cpu_group)
    planner = LayerPlanner(layer_id, plan, group.device_group, process.stats, attn_tp, traced, peers, process.acting)
    process.planners[layer_id] = planner
    process.top_k = max(process.top_k, moe_runner_config.top_k or 1)
    sizes = (moe_runner_config.hidden_size, moe_runner_config.intermediate_size_per_partition, process.top_k)
    process.expert_sizes = plan_cost.ExpertSizes(*sizes)
    return planner


def _place(parallel) -> recorder.Place:
    """Which file of a trace is this process's. Under dp-attention the ranks of dp are ranks of one EP group."""
    replica = (parallel.dp_rank or 0) if parallel.attn_dp_size == 1 else 0
    return recorder.Place(parallel.moe_ep_rank, parallel.pp_rank, replica, parallel.pp_size, parallel.attn_tp_size)


def _cpu_dispatcher(planner):
    from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    inner = MacsDispatcher(planner)

    class Dispatcher(BaseDispatcher):
        """SGLang's interface around `MacsDispatcher`: rows come out as single-expert tokens of gate 1."""

        def dispatch(self, hidden_states, topk_output):
            weights, ids = topk_output.topk_weights, topk_output.topk_ids
            rows, experts = inner.dispatch(hidden_states, ids, weights.float(), _logits(topk_output))
            ones = rows.new_ones((rows.shape[0], 1), dtype=weights.dtype)
            return StandardDispatchOutput(
                rows, None, StandardTopKOutput(ones, experts.to(ids.dtype).unsqueeze(1), None)
            )

        def combine(self, combine_input):
            return inner.combine(combine_input.hidden_states)

    return Dispatcher()


def _logits(topk_output):
    """[T, E] router logits or None. SGLang's empty output carries K columns where E belong."""
    return topk_output.router_logits if topk_output.topk_ids.shape[0] else None


def _fused_low_latency(dispatcher, planner, moe_runner_config):
    """For every half of a batch the fused dispatch in place of DeepEP's low-latency kernels; empty: DeepEP's carry."""
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput
    from sglang.srt.layers.moe.utils import is_sbo_enabled
    from sglang.srt.runtime_context import get_parallel

    if planner.plan.config.dispatch in ("deepep", "bounded"):
        return []
    inners, config, plan = dispatcher._inners, moe_runner_config, planner.plan
    mode, group = inners[0].deepep_mode.value, get_parallel().tp_group.cpu_group
    # Without a low-latency implementation there is nothing to ask: the mode alone refuses.
    impl = getattr(inners[0], "_low_latency_dispatcher", None)
    tokens = impl.num_max_dispatch_tokens_per_rank if impl is not None else 1
    sizes = Sizes(plan.num_ranks, plan.num_experts, config.top_k, tokens, config.hidden_size)
    transports = worker.current().transports.of(sizes, len(inners), mode, is_sbo_enabled(), group)
    return [
        FusedLowLatency(inner._low_latency_dispatcher, transport, planner, DeepEPLLDispatchOutput)
        for inner, transport in zip(inners, transports, strict=False)
    ]


def _bound_normal(dispatcher, planner, moe_runner_config) -> None:
    """With --macs-dispatch bounded, DeepEP's normal mode is told how many tokens can come, and counts none."""
    from sglang.srt.layers.moe.token_dispatcher.base import DispatchOutputFormat
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput
    from sglang.srt.runtime_context import get_parallel

    process = worker.current()
    if process.config.dispatch != "bounded":
        return
    if process.bounded is None:
        unfit = peer_memory.everyone(unfit_device(), get_parallel().tp_group.cpu_group)
        tell = partial(say_for_group, group=planner.group)
        process.bounded = bounded.BoundedDispatch(process.config, tell, next(filter(None, unfit), ""))
        _register_bounded_permutation()

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
    sizes = bounded.Sizes(planner.plan.num_ranks, planner.plan.num_experts, config.top_k, config.hidden_size)
    for inner in dispatcher._inners:
        impl = getattr(inner, "_normal_dispatcher", None)
        if impl is not None:
            bounded.BoundedNormal(impl, process.bounded, planner, sizes, make_output)


def _register_bounded_permutation() -> None:
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
            hidden_states_scale_tma_aligned=True,
            activation_scale_block_size=128,
        )

    @register_post_permute("deep_gemm", BOUNDED)
    def gather(runner_output, quant_info, runner_config, running_state):
        received, place = running_state[BOUNDED]
        tokens = received.gather(runner_output.hidden_states, place)
        return DeepEPNormalCombineInput(tokens, received.topk_ids, received.topk_weights)


def _grouped_gemm(gemm: str):
    """AROUND deep_gemm_wrapper.grouped_gemm_nt_*_contig: a bounded dispatch tells the end of each expert's rows in
    place of each row's expert, and no tile behind is computed. (Those marked -1 are, in bf16.)
    """

    def around(original, lhs, rhs, out, layout, **recipes):
        if layout.shape[0] == out.shape[0]:
            return original(lhs, rhs, out, layout, **recipes)
        import deep_gemm

        given = {name: recipe for name, recipe in recipes.items() if recipe is not None}
        return getattr(deep_gemm, gemm)(lhs, rhs, out, layout, use_psum_layout=True, **given)

    return around


def _plan_before_deepep(dispatcher, planner, fused=()):
    """Wraps `dispatch_a`, the one funnel of DeepEP's modes and overlaps, on the instance: SGLang checks the class.

    fused: a `FusedLowLatency` for every inner dispatcher, or none; it plans and sends in one.
    """
    half = None  # which half of the batch is dispatched, under two-batch overlap

    def plan_first(dispatch_a, inner, fused, hidden_states, topk_output):
        topk_output = _routed_nowhere(topk_output, hidden_states.shape[0])
        ids, weights = topk_output.topk_ids, topk_output.topk_weights
        takes = fused is not None and inner._get_impl() is fused.impl and fused.takes()
        planned = planner(hidden_states, ids, weights, _logits(topk_output), half, fused.plan if takes else None)
        planner.measure(ids, planned)
        output = topk_output._replace(topk_ids=planned.topk_ids, topk_weights=planned.topk_weights)
        return dispatch_a(hidden_states=hidden_states, topk_output=output)

    def hint_rows(dispatch_b):
        """Low latency: the rows that DeepGEMM tiles for. DeepEP's hint takes all ranks to be as full as this one."""
        output = dispatch_b()
        rows = planner.expected_rows(output.topk_ids.shape[1]) if hasattr(output, "expected_m") else None
        return output if rows is None else output._replace(expected_m=rows)

    def execute(original, name, tbo_subbatch_index=None, **kwargs):
        nonlocal half
        half = tbo_subbatch_index
        return original(name, tbo_subbatch_index, **kwargs)

    for inner, of_half in zip_longest(dispatcher._inners, fused):
        inner.dispatch_a = partial(plan_first, inner.dispatch_a, inner, of_half)
        inner.dispatch_b = partial(hint_rows, inner.dispatch_b)
    dispatcher._execute = partial(execute, dispatcher._execute)
    return dispatcher


def _routed_nowhere(topk_output, rows: int):
    """The top-k, or as many rows of none: with two-batch overlap, SGLang pads an idle rank's rows in decode and hands
    over a top-k of no rows, on which DeepEP dies.
    """
    if not topk_output.topk_ids.shape[0] < rows:
        return topk_output
    top_k = topk_output.topk_ids.shape[1]
    nowhere = topk_output.topk_ids.new_full((rows, top_k), -1)
    return topk_output._replace(topk_ids=nowhere, topk_weights=topk_output.topk_weights.new_zeros((rows, top_k)))


def _update_gather_batch(result, schedule_batch, sync_info, *args, **kwargs):
    """AFTER _update_gather_batch: keeps what every rank runs, which SGLang's schedulers have just told each other.

    With --moe-dense-tp-size and --enable-dp-lm-head SGLang hands a rank its own token count alone.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    told = sync_info.tp0_info_cpu  # [attention-DP ranks, fields]; None where the exchange was left out
    modes = [] if told is None else [ForwardMode(mode) for mode in told[:, 5].tolist()]
    schedule_batch.macs_ranks = batch.RankBatches.of_modes(told[:, 0].tolist(), modes) if modes else None


def _forward_batch_init_new(result, cls, schedule_batch, *args, **kwargs):
    """AFTER ForwardBatch.init_new: what the scheduler's batch knows and this one does not take along."""
    result.macs_ranks = getattr(schedule_batch, "macs_ranks", None)
    result.macs_decoding = len(schedule_batch.decoding_reqs or ())
    if result.forward_mode.is_extend() and result.contains_mm_inputs():
        _tell_of_unmarked(schedule_batch.reqs or ())


def _tell_of_unmarked(reqs) -> None:
    """Pictures that SGLang has not marked in the prompt are text to MACS; SGLang 0.5.21 dies on many of them."""
    # A session's ids hold earlier turns, of which offsets do not speak.
    inputs = [(req.multimodal_inputs, req.origin_input_ids) for req in reqs if req.session is None]
    if any(batch.unmarked(mm.mm_items, ids) for mm, ids in inputs if mm is not None):
        say_once("a picture has no position of its own in the prompt: SGLang did not mark it, no token is visual")


def _batch_of(forward_batch, config: MacsConfig) -> batch.Batch:
    from sglang.srt.runtime_context import get_parallel

    parallel, ranks = get_parallel(), getattr(forward_batch, "macs_ranks", None)
    if ranks is None and parallel.attn_dp_size > 1:
        return batch.Batch()  # not from a scheduler
    decoding = getattr(forward_batch, "macs_decoding", 0)
    return batch.of_forward(forward_batch, config, parallel.moe_ep_size, ranks, decoding)


def _forward(original, self, forward_batch, *args, **kwargs):
    """AROUND ModelRunner.forward: what this pass is to MACS, before embedding clamps the padded ids away."""
    from sglang.srt.runtime_context import get_parallel

    if self.is_draft_worker:
        with batch.forward(batch.Batch(skip="draft")):
            return original(self, forward_batch, *args, **kwargs)
    process = worker.current()
    acts_on = process.decide(_batch_of(forward_batch, process.config))
    if not acts_on.skip:
        check_batch_size(acts_on.group_tokens, process.top_k, process.config.load)
    if acts_on.skip != "outside" and process.agreement is not None:
        process.agreement.check(acts_on, forward_batch.input_ids.numel())
    with batch.forward(acts_on), process.recorded(forward_batch, get_parallel().attn_tp_rank):
        result = original(self, forward_batch, *args, **kwargs)
    process.tick()
    return result


def _on_idle(result, self):
    """AFTER Scheduler.on_idle: what was counted since the last busy moment is published, too."""
    worker.current().tick(idle=True)


def _group_coordinator_init(original, self, *args, **kwargs):
    """AROUND GroupCoordinator.__init__: --dist-timeout holds for the gloo groups of the host, too.

    SGLang gives those two hours: a node whose peer is cut off would sit in the schedulers' exchange for that long.
    """
    from sglang.srt.distributed import parallel_state

    if parallel_state._MODEL_PARALLEL_GROUP_TIMEOUT is not None:
        kwargs.setdefault("gloo_timeout", parallel_state._MODEL_PARALLEL_GROUP_TIMEOUT)
    return original(self, *args, **kwargs)


def _scheduler_init(result, self, *args, **kwargs):
    """AFTER Scheduler.__init__: a server whose MoE layers did not take our dispatcher must not start."""
    from sglang.srt.runtime_context import get_observability, get_parallel

    process = worker.current()
    if not process.planners:
        raise MacsNotActive("no MoE layer of this model took the MACS dispatcher; serve it without --enable-macs")
    parallel = get_parallel()
    _check_exchange_of_schedulers(parallel)
    say(f"active on {len(process.planners)} MoE layers, {parallel.moe_ep_size} ranks, {process.config}")
    flags, options = compat.parallel_flags(self.server_args), process.options_of_the_group()
    agreement = Agreement(parallel.tp_group.cpu_group, flags, options)
    process.join(parallel.moe_ep_rank, parallel.moe_ep_size, agreement, _shared_state(parallel))
    process.acting.rows_that_pay = _rows_that_pay(process, parallel, self.model_config.quantization)
    if get_observability().enable_metrics:
        process.export_metrics(_metric_labels(self.metrics_collector, parallel))


def _rows_that_pay(process, parallel, quantization: str | None) -> int:
    """What a plan must be expected to take off the most loaded rank; 0: every layer is planned. Alike on all ranks."""
    import torch

    if not process.config.may_leave_layers or process.transports.fuses:  # that plans while it dispatches
        return 0
    rows = process.config.act_rows
    if rows is None:
        planner, group = next(iter(process.planners.values())), parallel.tp_group
        sizes = process.expert_sizes._replace(fp8="fp8" in (quantization or ""))
        rows = plan_cost.rows_that_pay(planner, sizes, torch.device(group.device), group.cpu_group)
    if parallel.moe_ep_rank == 0:
        say(
            f"a layer is planned from {rows} rows on that this takes off the most loaded rank (--macs-act-rows), "
            f"others once in {LOOK_EVERY} passes"
        )
    return rows


def _check_exchange_of_schedulers(parallel) -> None:
    from sglang.srt.environ import envs

    if parallel.attn_dp_size > 1 and envs.SGLANG_SCHEDULER_SKIP_ALL_GATHER.get():
        raise MacsNotActive("with SGLANG_SCHEDULER_SKIP_ALL_GATHER ranks do not know of each other's batches; unset it")


def _shared_state(parallel) -> SharedState:
    """Of this rank. Attention-TP rank 0 of stage 0 is asked, and speaks for its attention-TP group in all stages."""
    from torch.distributed.distributed_c10d import _get_default_store

    first = parallel.tp_rank - parallel.attn_tp_rank
    group = range(first, first + parallel.attn_tp_size)
    with_us, later = [], []
    if parallel.attn_tp_rank == 0 and parallel.pp_rank == 0:
        with_us = [(0, rank) for rank in group if rank != first]
        later = [(stage, rank) for stage in range(1, parallel.pp_size) for rank in group]
    return SharedState(_get_default_store(), (parallel.pp_rank, parallel.tp_rank), with_us, later)


def _metric_labels(collector, parallel) -> dict[str, Any]:
    """SGLang's own labels; made alike on ranks that export nothing of SGLang's (attention-TP)."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.runtime_context import get_disagg, get_observability, get_serving

    if collector is not None:
        return dict(collector.labels)
    labels = {
        "model_name": get_serving().served_model_name,
        "engine_type": DisaggregationMode.to_engine_type(get_disagg().disaggregation_mode),
        "tp_rank": parallel.tp_rank,
        "pp_rank": parallel.pp_rank,
        "moe_ep_rank": parallel.moe_ep_rank,
    }
    if parallel.dp_rank is not None:
        labels["dp_rank"] = parallel.dp_rank
    return labels | (get_observability().extra_metric_labels or {})


def _run_event_loop(original, self):
    """AROUND Scheduler.run_event_loop: one line a rank that stops, so that the rank without one is known for dead."""
    from sglang.srt.runtime_context import get_parallel

    try:
        return original(self)
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0][:160]
        which = f"expert-parallel rank {get_parallel().moe_ep_rank} of {get_parallel().moe_ep_size}"
        hint = "A rank without such a line died first, if one is missing."
        say(f"{which} stops: {type(error).__name__}: {why} | {hint}")
        raise


def _get_internal_state(result, self, *args, **kwargs):
    """AFTER Scheduler.get_internal_state: counters under `internal_states[*].macs` of GET /server_info."""
    result.internal_state["macs"] = worker.current().answer()


def _add_deepstack(original, hidden_states, forward_batch, extra):
    """AROUND residual.batch.add_to_output: deepstack rows follow the hidden states' scatter over attention-TP.

    Stock SGLang adds all rows to the scattered share and dies on the shapes.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_tp_size == 1:
        return original(hidden_states, forward_batch, extra)
    output = original(hidden_states, forward_batch, extra.new_zeros(()))  # completes the output, adds nothing
    if extra.shape[0] != output.shape[0]:
        extra = batch.scattered(extra, output.shape[0], parallel.attn_tp_rank, parallel.attn_tp_size)
    return output.add_(extra)


# ---- Runner: `--moe-runner-backend macs` ---------------------------------------------------------------------------


def _register_runner_name() -> None:
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name

    register_moe_runner_backend_name(RUNNER)


def _register_runner() -> None:
    """Our core in SGLang's registry. On CPU it hands the rows to SGLang's native expert loop."""
    from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
    from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

    class RunnerCore(DispatchMoeRunnerCore):
        @property
        def runner_backend(self):
            return resolve_moe_runner_backend(RUNNER)

        def run_from_dispatch(self, dispatch_output, quant_info, runner_config, hooks=None):
            from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
            from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

            worker.current().stats.runner_calls += 1
            topk, rows = dispatch_output.topk_output, dispatch_output.hidden_states
            return StandardCombineInput(moe_forward_native(quant_info.layer, rows, topk, runner_config))

    register_moe_runner_core(RUNNER, RunnerCore)


def _create_moe_runner(result, self, layer, moe_runner_config):
    """AFTER UnquantizedFusedMoEMethod.create_moe_runner: the registered core where the flag asks for it."""
    from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    backend = get_moe_runner_backend()
    if backend.value == RUNNER:
        self.runner = MoeRunner(backend, moe_runner_config)


def _forward_moe(original, self, layer, dispatch_output):
    """AROUND UnquantizedFusedMoEMethod.forward_cpu and forward_native, which bypass the runner: through ours where
    asked for.
    """
    from sglang.srt.layers.moe.moe_runner.base import MoeQuantInfo

    if self.runner.runner_backend.value != RUNNER:
        return original(self, layer, dispatch_output)

    class LayerInfo(MoeQuantInfo):
        """The expert weights, unquantised: the layer itself."""

        def __init__(self, layer) -> None:
            self.layer = layer

    return self.runner.run(dispatch_output, LayerInfo(layer))


_DEEP_GEMM = "sglang.srt.layers.deep_gemm_wrapper"
_UNQUANT = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"
SCHEDULER_HOOKS = (
    Hook("sglang.srt.layers.moe.topk.TopK.__init__", _topk_init, "after"),
    Hook("sglang.srt.layers.moe.utils.MoeA2ABackend.is_deepep", _is_deepep, "around"),
    Hook("sglang.srt.layers.moe.ep_moe.layer.get_moe_impl_class", _get_moe_impl_class, "around"),
    Hook("sglang.srt.eplb.expert_location_dispatch.ExpertLocationDispatchInfo.init_new", _expert_location, "around"),
    Hook("sglang.srt.layers.moe.fused_moe_triton.layer.create_moe_dispatcher", _create_moe_dispatcher, "around"),
    Hook("sglang.srt.managers.scheduler_components.dp_attn._update_gather_batch", _update_gather_batch, "after"),
    Hook("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", _forward_batch_init_new, "after"),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", _forward, "around"),
    Hook("sglang.srt.distributed.parallel_state.GroupCoordinator.__init__", _group_coordinator_init, "around"),
    Hook("sglang.srt.managers.scheduler.Scheduler.__init__", _scheduler_init, "after"),
    Hook("sglang.srt.managers.scheduler.Scheduler.run_event_loop", _run_event_loop, "around"),
    Hook("sglang.srt.managers.scheduler.Scheduler.on_idle", _on_idle, "after"),
    Hook("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _get_internal_state, "after"),
    Hook("sglang.srt.layers.layer_boundary.residual.batch.add_to_output", _add_deepstack, "around"),
    Hook(f"{_DEEP_GEMM}.grouped_gemm_nt_bf16_contig", _grouped_gemm("m_grouped_bf16_gemm_nt_contiguous"), "around"),
    Hook(f"{_DEEP_GEMM}.grouped_gemm_nt_f8f8bf16_contig", _grouped_gemm("m_grouped_fp8_gemm_nt_contiguous"), "around"),
    Hook(f"{_UNQUANT}.create_moe_runner", _create_moe_runner, "after"),
    Hook(f"{_UNQUANT}.forward_cpu", _forward_moe, "around"),  # with AMX
    Hook(f"{_UNQUANT}.forward_native", _forward_moe, "around"),  # without
)


# ---- Registration --------------------------------------------------------------------------------------------------


_registered: list[Hook] = []
_in_scheduler = False  # set by `run_scheduler_process`: the launcher must not import the model stack


def _hook(target: str, function: Callable[..., Any], kind: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _registered.append(Hook(target, function, kind))
    if kind == "class":
        hooks.construct_through(target, function)
    else:
        HookRegistry.register(target, function, HookType(kind))


def probe(side: str) -> dict[str, str]:
    """`sglang-macs doctor`, in a process of its own: "" or what is wrong, for every hook of the "launcher" or of a
    "scheduler".
    """
    from sglang.srt.plugins import load_plugins

    global _in_scheduler
    _in_scheduler = side == "scheduler"
    if _in_scheduler:
        configure(MacsConfig.from_preset())
    load_plugins()
    side_hooks = (*SCHEDULER_HOOKS, *_registered) if _in_scheduler else LAUNCHER_HOOKS
    return {hook.target: hooks.trouble(hook) for hook in side_hooks}


def try_launch(argv: list[str]) -> dict[str, Any]:
    """Resolves a server's flags as its launcher would, after `probe("launcher")`. Ends the process where that would.
    Returns those that `sglang-macs doctor` looks at.
    """
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.server_args import prepare_server_args

    record = prepare_server_args(argv)
    record.resolve_once()
    if _config_of(record) is None:
        _exit(MacsError("server flags", "none that turn MACS on", "MACS", "Add --moe-a2a-backend macs."))
    flags = resolved_view(record)
    return {name: getattr(flags, name) for name in ("device", "dp_size", "enable_dp_attention", "chunked_prefill_size")}


def register() -> None:
    """Called by the entry point (entry_point.py), once in the launcher and in every scheduler process."""
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices

    if RUNNER not in MOE_RUNNER_BACKEND_CHOICES:
        add_moe_runner_backend_choices([RUNNER])
    if not _in_scheduler:
        _register_all(LAUNCHER_HOOKS)
    elif configured() is not None:
        _register_runner()
        if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
            cpu_compat.register(_hook, hooks.define_missing)
        else:
            cpu_compat.register_idle_mrope(_hook)
        _register_all(SCHEDULER_HOOKS)


def _register_all(side_hooks: tuple[Hook, ...]) -> None:
    for hook in side_hooks:
        _hook(hook.target, hook.function, hook.kind)
