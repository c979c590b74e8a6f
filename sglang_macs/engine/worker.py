"""What a scheduler process holds for its lifetime: configuration, counters and, per MoE layer, its planner."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from .. import __version__
from ..config import MacsConfig, configured
from ..console import say
from ..control import Settings
from ..dispatch.acting import Acting
from ..dispatch.bounded import BoundedDispatch
from ..dispatch.layer_graph import LayerGraphs
from ..dispatch.plan_cost import ExpertSizes
from ..dispatch.planner import LayerPlanner
from ..dispatch.transport import Transports
from ..errors import MacsError
from ..observe.beside import Observed
from ..observe.demand import GivenUp
from ..observe.metrics import Exporter
from ..observe.recorder import Place, Recorder, agreed_run
from ..observe.shared_state import SharedState
from ..observe.stats import Stats
from ..plan import profile
from ..plan.batch import Batch
from ..plan.clipped import Clipped
from .agreement import Agreement
from .control import Control
from .launch import Launch
from .limits import check_change

IDLE_LOOK_SECONDS = 1.0  # between two looks of an idle process: each of them is work for the GPU


class Worker:
    """One process's state. Nothing of --enable-metrics or --macs-trace is made before it is asked for."""

    def __init__(self, config: MacsConfig) -> None:
        self.config = config
        self.stats = Stats()
        self.profile = profile.load(config.profile) if config.profile else None
        self.planners: dict[int, LayerPlanner] = {}
        self.acting = Acting()
        self.observed = Observed(self.stats)
        self.row_seconds = 0.0  # of a row at its rank; 0: not measured
        self.given_up = GivenUp()  # for a recorder of SGLang's that counts behind the dispatch
        self.transports = Transports(config)
        self.bounded: BoundedDispatch | None = None  # made by the first layer that has one
        self.layer_graphs: LayerGraphs | None = None
        self.top_k = 1  # the largest of the model's MoE layers
        self.expert_sizes = ExpertSizes(0, 0)  # of the last of them
        self.agreement: Agreement | None = None
        self.launch: Launch | None = None  # what SGLang and the model said when the scheduler had started
        self.cannot_reroute = ""  # why re-routing cannot follow the model's router
        self.rows_that_pay = 0  # of a plan, measured or given at the launch; 0 = every layer is planned
        self.control = Control(Settings.at_launch(config), self._check_change, self.change)
        self._rank, self._num_ranks = 0, 1
        self._shared_state: SharedState | None = None
        self._passes = 0  # that were planned or, with MACS off, would have been
        self._looked = 0.0  # s of the monotonic clock
        self._exporter: Exporter | None = None
        self._recorder: Recorder | None = None
        self._place: Place | None = None  # of a recorder
        self._recorded = 0  # bytes of recorders that have ended

    @property
    def has_replicas(self) -> bool:
        """Whether plans choose among replicas."""
        return any(planner.plan.places is not None for planner in self.planners.values())

    @property
    def plans_in_front(self) -> bool:
        """Whether there are plans that no dispatch makes by itself."""
        return any(planner.plan.made_in_front for planner in self.planners.values())

    def options_of_the_group(self) -> str:
        """What must be the same on every node, where experts lie included; where files lie may differ."""
        options = self.config.to_json()
        del options["trace"], options["trace_limit_mb"], options["profile"]
        places = {i: p.plan.places.logical.tolist() for i, p in self.planners.items() if p.plan.places is not None}
        return f"{options} {self.profile.modality if self.profile else None} {places}"

    def _check_change(self, settings: Settings) -> None:
        check_change(
            settings,
            self.launch,
            cannot_reroute=self.cannot_reroute,
            has_replicas=self.has_replicas,
            is_bounded=self.bounded is not None,
        )

    def change(self, number: int, settings: Settings) -> None:
        """Puts other options in force, on all ranks before the same pass. number: of the request."""
        config = self.config = settings.now
        for planner in self.planners.values():
            planner.plan.configure(config)
        self.transports.configure(config)
        if self.bounded is not None:
            self.bounded.config = config
        if self.layer_graphs is not None:
            self.layer_graphs.forget()
        self.acting.forget(self.rows_to_act_on)
        self._record_anew(f"{number:04d}" if settings.traced else None)
        self.stats.changes += 1
        if self._exporter is not None:
            self._exporter.configure(config)
        if self.agreement is not None:
            self.agreement.again(self.options_of_the_group())

    @property
    def may_leave_layers(self) -> bool:
        """Whether layers may be left alone for want of gain; with replicas worth its cost at infinite gamma, too."""
        balances = self.has_replicas and self.config.act == "auto" and not self.config.is_off
        while_it_dispatches = self.transports.plans and not self.plans_in_front
        return (self.config.may_leave_layers or balances) and not while_it_dispatches

    @property
    def rows_to_act_on(self) -> int:
        """What a plan must be expected to take off the most loaded rank; 0: every layer is planned."""
        return self.rows_that_pay if self.may_leave_layers else 0

    def _record_anew(self, change: str | None) -> None:
        """A trace has one set of options: each change begins another run of it, within what is left of its limit."""
        if self._recorder is not None:
            self._recorder.end()
            self._recorded += self._recorder.bytes
        self._recorder = None
        left = self.config.trace_limit_mb - self._recorded / 1e6
        if change is not None and self._place is not None and left > 0:
            try:
                config = replace(self.config, trace_limit_mb=left)
                self._recorder = Recorder(config, self._place, f"{agreed_run()}-{change}")
            except MacsError as error:
                say(f"no trace: {error}. The server serves on.")
        for planner in self.planners.values():
            planner.recorder = self._recorder

    def join(self, rank: int, num_ranks: int, agreement: Agreement, shared_state: SharedState) -> None:
        """Takes its place among the expert-parallel ranks, once the process groups are there."""
        self._rank, self._num_ranks = rank, num_ranks
        self.agreement, self._shared_state = agreement, shared_state

    def decide(self, batch: Batch) -> Batch:
        """`batch` before its pass, with what follows from the passes before, of which all ranks keep count alike:
        whether its rows are recounted, and which layers are left alone.
        """
        if batch.skip not in ("", "off"):
            return batch
        every = self.config.verify_every
        chosen = self.config.verify or (every > 0 and self._passes % every == 0)
        self._passes += 1
        if chosen and self.config.observes:
            self.observed.begin_pass()
        if not batch.skip:
            needed = self.bounded is not None and self.bounded.needs_plan(batch.group_tokens)
            batch = self.acting.decide(batch, every_layer=needed)
            self.stats.exempt_tokens += batch.exempt_tokens
            if self.config.cache == "exact" and not self.config.changes_nothing:
                batch = replace(batch, clipped=Clipped())
        return replace(batch, measured=chosen)

    def recorder_at(self, place: Place) -> Recorder | None:
        """Of --macs-trace, None without; the first layer that asks makes it."""
        if self.config.trace and self._recorder is None:
            self._place = place
            self._recorder = Recorder(self.config, place, agreed_run())
        return self._recorder

    def recorded(self, forward_batch: Any, attn_tp_rank: int) -> AbstractContextManager:
        """Around a forward pass: its pictures and plans belong together in the trace."""
        return nullcontext() if self._recorder is None else self._recorder.pass_of(forward_batch, attn_tp_rank)

    def export_metrics(self, labels: Mapping[str, Any]) -> None:
        """Of --enable-metrics: from now on `tick` publishes the counters under SGLang's own labels."""
        self._exporter = Exporter(labels, self.config, self._rank)

    def tick(self, *, idle: bool = False) -> None:
        """After each forward pass, and when the scheduler is idle. Raises what a dispatch found wrong."""
        self.acting.end_pass()
        if idle:
            self.observed.collect()
        else:
            self.observed.end_pass()
        self.given_up.take()  # of a pass that was not recorded
        now = time.monotonic()
        if not idle or now - self._looked >= IDLE_LOOK_SECONDS:
            self._looked = now
            self._check()
        self._export(idle)
        if idle and self._shared_state is not None and self._shared_state.is_due(self.stats.dispatches):
            self._shared_state.publish(self.state())

    def _check(self) -> None:
        self.transports.check()
        if self.bounded is not None:
            self.bounded.check()

    def _export(self, idle: bool) -> None:
        if self._exporter is None:
            return
        try:
            self._exporter.tick(self.stats, idle=idle)
        except OSError as error:  # a full disk below PROMETHEUS_MULTIPROC_DIR must not end the server
            self._exporter = None
            say(f"metrics are published no more: {error.strerror or error}. The server serves on.")

    def state(self) -> dict[str, object]:
        """This rank's counters as plain JSON values; with --macs-trace that of the recorder, too."""
        place = {"rank": self._rank, "ep_size": self._num_ranks}
        acting = {"rows_that_pay": self.acting.rows_that_pay}
        place["top_k"] = self.top_k
        about = {"version": __version__, **place, "config": self.config.to_json(), "acting": acting}
        if self.config.observes:
            about["observe"] = {"row_us": self.row_seconds * 1e6, "plan_rows": self.rows_that_pay}
        about["control"] = self.control.state()
        about["fused_region"] = self.transports.state()
        if self._recorder is not None:
            about["trace"] = self._recorder.state()
        return about | self.stats.snapshot()

    def answer(self) -> dict[str, object]:
        """For `GET /server_info`: the counters of all ranks that this one speaks for."""
        return self._shared_state.answer(self.state())


_current: Worker | None = None


def current() -> Worker:
    """The worker of this process, made from the process tree's configuration by the first call."""
    global _current
    if _current is None:
        _current = Worker(configured())
    return _current


def most_prefill_tokens() -> int:
    """Of a rank's prefill batch, as SGLang schedules them."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size
    return chunk if chunk and chunk > 0 else schedule.max_prefill_tokens
