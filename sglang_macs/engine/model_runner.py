"""A forward pass: what it is to MACS, and which rows of its batch are visual."""

from ..config import MacsConfig
from ..console import say_once
from ..plan import batch
from ..plan.plan import check_batch_size
from . import exempt, prefix_cache, set_state, worker
from .hooks import Hook


def _expert_location(original, cls, *args, **kwargs):
    """AROUND ExpertLocationDispatchInfo.init_new: nothing, where nobody asked for it.

    Up to 0.5.22, SGLang first asserts metadata that many multimodal models do not provide, and then does the same.
    """
    from sglang.srt.runtime_context import get_exec

    return None if get_exec().moe.ep_dispatch_algorithm is None else original(cls, *args, **kwargs)


def _update_gather_batch(result, schedule_batch, sync_info, *args, **kwargs):
    """AFTER _update_gather_batch: keeps what every rank runs, which SGLang's schedulers have just told each other.

    With --moe-dense-tp-size and --enable-dp-lm-head SGLang hands a rank its own token count alone.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    told = sync_info.tp0_info_cpu  # [attention-DP ranks, fields]; None where the exchange was left out
    schedule_batch.macs_agreed = None if told is None else set_state.received_by_all(told)
    modes = [] if told is None else [ForwardMode(mode) for mode in told[:, 5].tolist()]
    ranks = batch.RankBatches.of_modes(told[:, 0].tolist(), modes, set_state.exempts_of(told)) if modes else None
    schedule_batch.macs_ranks = ranks


def _forward_batch_init_new(result, cls, schedule_batch, *args, **kwargs):
    """AFTER ForwardBatch.init_new: what the scheduler's batch knows and this one does not take along."""
    result.macs_ranks = getattr(schedule_batch, "macs_ranks", None)
    result.macs_agreed = getattr(schedule_batch, "macs_agreed", None)
    result.macs_decoding = len(schedule_batch.decoding_reqs or ())
    result.macs_exempt = exempt.spans_of(schedule_batch, result)
    if worker.current().config.cache == "exact":
        result.macs_reqs = list(schedule_batch.reqs or ())
        result.macs_lengths = exempt.lengths_of(schedule_batch, result)
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
    left_alone = getattr(forward_batch, "macs_exempt", ())
    return batch.of_forward(forward_batch, config, parallel.moe_ep_size, ranks, decoding, left_alone)


def _begin_pass(process: worker.Worker, forward_batch) -> None:
    """Puts in force what was asked of every rank until this pass. Ranks that run the same batches are asked at once."""
    from sglang.srt.runtime_context import get_parallel

    agreed = getattr(forward_batch, "macs_agreed", None)
    if get_parallel().attn_dp_size == 1:
        agreed = process.control.received
    if agreed is not None:  # else not from a scheduler
        process.control.begin_pass(agreed)


def _forward(original, self, forward_batch, *args, **kwargs):
    """AROUND ModelRunner.forward: what this pass is to MACS, before embedding clamps the padded ids away."""
    from sglang.srt.runtime_context import get_parallel

    if self.is_draft_worker:
        with batch.forward(batch.Batch(skip="draft")):
            return original(self, forward_batch, *args, **kwargs)
    process = worker.current()
    _begin_pass(process, forward_batch)
    acts_on = process.decide(_batch_of(forward_batch, process.config))
    if not acts_on.skip:
        check_batch_size(acts_on.group_tokens, process.top_k, process.config.load, process.has_replicas)
    if acts_on.skip != "outside" and process.agreement is not None:
        prefill = bool(getattr(forward_batch, "is_extend_in_batch", False))
        process.agreement.check(acts_on, forward_batch.input_ids.numel(), prefill)
    with batch.forward(acts_on), process.recorded(forward_batch, get_parallel().attn_tp_rank):
        result = original(self, forward_batch, *args, **kwargs)
    prefix_cache.end_pass(acts_on, forward_batch, result)
    process.tick()
    return result


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


HOOKS = (
    Hook("sglang.srt.eplb.expert_location_dispatch.ExpertLocationDispatchInfo.init_new", _expert_location, "around"),
    Hook("sglang.srt.managers.scheduler_components.dp_attn._update_gather_batch", _update_gather_batch, "after"),
    Hook("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", _forward_batch_init_new, "after"),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", _forward, "around"),
    Hook("sglang.srt.layers.layer_boundary.residual.batch.add_to_output", _add_deepstack, "around"),
)
