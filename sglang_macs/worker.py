"""What a scheduler process holds for its lifetime: configuration, counters and, per MoE layer, its planner."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from . import __version__, profile
from .bounded import BoundedDispatch
from .config import MacsConfig, configured
from .dispatcher import LayerPlanner
from .metrics import Exporter
from .stats import Stats
from .trace import Recorder, shown_in
from .transport import Transports


class Worker:
    """One process's state. Nothing of --enable-metrics or --macs-trace is made before it is asked for."""

    def __init__(self, config: MacsConfig) -> None:
        self.config = config
        self.stats = Stats()
        self.profile = profile.load(config.profile) if config.profile else None
        self.planners: dict[int, LayerPlanner] = {}
        self.transports = Transports(config)
        self.bounded: BoundedDispatch | None = None  # made by the first layer that has one
        self.top_k = 1  # the largest of the model's MoE layers
        self._exporter: Exporter | None = None
        self._recorder: Recorder | None = None

    def recorder_of(self, rank: int) -> Recorder | None:
        """Of --macs-trace, None without; the first layer that asks makes it."""
        if self.config.trace and self._recorder is None:
            self._recorder = Recorder(self.config, rank)
        return self._recorder

    def recorded(self, forward_batch: Any, attn_tp_rank: int) -> AbstractContextManager:
        """Around a forward pass: its pictures and plans belong together in the trace."""
        if self._recorder is None:
            return nullcontext()
        return self._recorder.forward_pass(shown_in(forward_batch), attn_tp_rank)

    def export_metrics(self, labels: Mapping[str, Any], rank: int) -> None:
        """Of --enable-metrics: from now on `tick` publishes the counters under SGLang's own labels."""
        self._exporter = Exporter(labels, self.config, rank)

    def tick(self, *, idle: bool = False) -> None:
        """After each forward pass, and when the scheduler is idle. Raises what a fused dispatch found wrong."""
        self.transports.check()
        if self.bounded is not None:
            self.bounded.check()
        if self._exporter is not None:
            self._exporter.tick(self.stats, idle=idle)

    def state(self, rank: int) -> dict[str, object]:
        """The counters as plain JSON values, for `GET /server_info`."""
        return {"version": __version__, "rank": rank, "config": self.config.to_json(), **self.stats.snapshot()}


_current: Worker | None = None


def current() -> Worker:
    """The worker of this process, made from the process tree's configuration by the first call."""
    global _current
    if _current is None:
        _current = Worker(configured())
    return _current
