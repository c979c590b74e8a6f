"""SGLang's scheduler: what it checks and says at its start, its counters, and its last words."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ..console import say
from ..dispatch import plan_cost
from ..dispatch.acting import LOOK_EVERY
from ..errors import MacsNotActive
from ..observe.shared_state import SharedState
from . import moe_config, prefix_cache, worker
from .agreement import Agreement
from .hooks import Hook
from .launch import parallel_flags


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
    from sglang.srt.runtime_context import get_context, get_observability, get_parallel

    process = worker.current()
    if not process.planners:
        raise MacsNotActive("no MoE layer of this model took the MACS dispatcher; serve it without --enable-macs")
    parallel = get_parallel()
    _check_exchange_of_schedulers(parallel)
    say(f"active on {len(process.planners)} MoE layers, {parallel.moe_ep_size} ranks, {process.config}")
    flags, options = parallel_flags(self.server_args), process.options_of_the_group()
    agreement = Agreement(parallel.tp_group.cpu_group, flags, options)
    process.join(parallel.moe_ep_rank, parallel.moe_ep_size, agreement, _shared_state(parallel))
    process.rows_that_pay = _rows_that_pay(process, parallel, self.model_config.quantization)
    process.acting.rows_that_pay = process.rows_to_act_on
    if process.config.observes:
        sizes, device = _expert_sizes(process, self.model_config.quantization), parallel.tp_group.device
        process.row_seconds = plan_cost.row_seconds(sizes, torch.device(device))
    resolved = SimpleNamespace(**get_context().resolved_server_args_dict())
    process.launch = moe_config.launch_of(resolved, process.config, self.model_config)
    if get_observability().enable_metrics:
        process.export_metrics(_metric_labels(self.metrics_collector, parallel))


def _rows_that_pay(process, parallel, quantization: str | None) -> int:
    """What a plan must be expected to take off the most loaded rank, where layers may be left alone; 0: nobody has
    measured it. Alike on all ranks.
    """
    if not (process.may_leave_layers or process.config.observes):
        return process.config.act_rows or 0
    rows = process.config.act_rows
    if rows is None:
        planner, group = next(iter(process.planners.values())), parallel.tp_group
        launched = "waiting" if process.bounded is None else "ahead" if process.layer_graphs is None else "graph"
        sizes, device = _expert_sizes(process, quantization), torch.device(group.device)
        rows = plan_cost.rows_that_pay(planner, sizes, device, group.cpu_group, launched)
    if parallel.moe_ep_rank == 0 and process.may_leave_layers:
        say(
            f"a layer is planned from {rows} rows on that this takes off the most loaded rank (--macs-act-rows), "
            f"others once in {LOOK_EVERY} passes"
        )
    return rows


def _expert_sizes(process, quantization: str | None) -> plan_cost.ExpertSizes:
    return process.expert_sizes._replace(fp8="fp8" in (quantization or ""))


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


class _Copied:
    """SGLang's event behind a pass's copies to the host. Who waited for it knows whether the pass went well."""

    def __init__(self, event: torch.cuda.Event, check: Callable[[], None]) -> None:
        self._event, self._check = event, check

    def synchronize(self) -> None:
        self._event.synchronize()
        self._check()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)


def _process_batch_result(original, self, batch, result):
    """AROUND Scheduler.process_batch_result: a pass for which a rank did not come has no tokens that may leave, and
    what was clipped must be known before anything is inserted into the prefix cache.
    """
    prefix_cache.settle(result)
    transports, copied = worker.current().transports, getattr(result, "copy_done", None)
    if transports.awaits_peers:
        if copied is None:  # without the overlapped schedule, which would wait for the tokens now
            torch.cuda.current_stream().synchronize()
            transports.check_arrived()
        else:
            result.copy_done = _Copied(copied, transports.check_arrived)
    return original(self, batch, result)


def _on_idle(result, self):
    """AFTER Scheduler.on_idle: what was counted since the last busy moment is published, too."""
    worker.current().tick(idle=True)


def _get_internal_state(result, self, *args, **kwargs):
    """AFTER Scheduler.get_internal_state: counters under `internal_states[*].macs` of GET /server_info."""
    result.internal_state["macs"] = worker.current().answer()


HOOKS = (
    Hook("sglang.srt.distributed.parallel_state.GroupCoordinator.__init__", _group_coordinator_init, "around"),
    Hook("sglang.srt.managers.scheduler.Scheduler.__init__", _scheduler_init, "after"),
    Hook("sglang.srt.managers.scheduler.Scheduler.run_event_loop", _run_event_loop, "around"),
    Hook("sglang.srt.managers.scheduler.Scheduler.process_batch_result", _process_batch_result, "around"),
    Hook("sglang.srt.managers.scheduler.Scheduler.on_idle", _on_idle, "after"),
    Hook("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _get_internal_state, "after"),
)
