"""MACS in SGLang's Prometheus endpoint (`--enable-metrics`), as `sglang:macs_*`.

`METRICS` is the whole list: a name, what it means, and where a snapshot of `Stats` holds it. The endpoint runs in
prometheus_client's multiprocess mode, so every scheduler process exports its own counts under SGLang's own labels.

Nothing here makes a GPU's host wait: while the server is busy, the counters are copied to the host without blocking
every `BUSY_SECONDS`, and published by a later call, when the copy has arrived; when it is idle there is nothing to wait
for.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import __version__
from ..choices import CLAIMS, MODALITIES
from ..config import OFF, MacsConfig
from ..plan.batch import NO_GAIN, SKIP_REASONS
from .stats import Stats

PREFIX = "sglang:macs_"
BUSY_SECONDS = 5.0
IDLE_SECONDS = 1.0

Values = dict[tuple[str, ...], float]  # label values of one metric -> value


@dataclass(frozen=True)
class Metric:
    """One family. read(state): its values by label, of `Stats.snapshot()` with the keys `rank`, `config` and
    `version` beside."""

    name: str
    help: str
    read: Callable[[Mapping[str, Any]], Values]
    labels: tuple[str, ...] = ()
    kind: str = "counter"

    @property
    def series(self) -> str:
        """What Prometheus calls it."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


def _one(read: Callable[[Mapping[str, Any]], float]) -> Callable[[Mapping[str, Any]], Values]:
    return lambda state: {(): read(state)}


def _is_on(state: Mapping[str, Any]) -> float:
    return float(state["config"]["preset"] not in OFF)


def _own(outcome: str) -> Callable[[Mapping[str, Any]], Values]:
    return lambda state: {(m,): state["own"][f"{outcome}_{m}"] for m in MODALITIES}


def _each(key: str, names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Values]:
    return lambda state: {(name,): state[key].get(name, 0) for name in names}


def _layers(state: Mapping[str, Any], key: str) -> float:
    return sum(layer[key] for layer in state["layers"].values())


def _rows(state: Mapping[str, Any]) -> Values:
    rank = state["rank"]
    return {
        (stage,): sum(layer[f"rows_{stage}"][rank] for layer in state["layers"].values())
        for stage in ("before", "after")
    }


def _max_over_mean(state: Mapping[str, Any]) -> Values:
    return {(stage,): _layers(state, f"max_over_mean_{stage}") for stage in ("before", "after")}


SERVED = ("preset", "scope", "load", "importance", "reroute")


def _info(state: Mapping[str, Any]) -> Values:
    return {(state["version"], *(str(state["config"][name]) for name in SERVED)): 1}


METRICS = (
    Metric("info", "1; its labels say what serves, and the options in force", _info, ("version", *SERVED), "gauge"),
    Metric("active", "1 where MACS plans, 0 with preset off or observe", _one(_is_on), (), "gauge"),
    Metric("gamma", "the bound over the mean load", _one(lambda s: float(s["config"]["gamma"])), (), "gauge"),
    Metric("changes", "times that options have changed at run time", _one(lambda s: s["changes"])),
    Metric("dispatches", "MoE dispatches of this rank", _one(lambda s: s["dispatches"])),
    Metric("planned", "dispatches that were planned", _one(lambda s: s["planned"])),
    Metric("bounded", "dispatches without a count on the host", _one(lambda s: s["bounded"])),
    Metric("graphs", "of these, MoE layers that were one launch", _one(lambda s: s["graphs"])),
    Metric("fused", "planned dispatches that the fused kernels carried", _one(lambda s: s["fused"])),
    Metric("skipped", "dispatches left alone", _each("skipped", (*SKIP_REASONS, NO_GAIN)), ("reason",)),
    Metric(
        "expected_gain_rows",
        "sum over dispatches: rows off the most loaded rank that a plan was expected to gain",
        _each("expected_gain", ("planned", NO_GAIN)),
        ("decision",),
    ),
    Metric("misaligned", "plans that took all rows for text; must stay 0", _one(lambda s: s["misaligned"])),
    Metric("assignments", "assignments of this rank's tokens that were planned", _own("assignments"), ("modality",)),
    Metric("moved", "assignments sent to another replica of their expert", _own("moved"), ("modality",)),
    Metric("clipped", "assignments over a bound: re-routed or dropped", _own("clipped"), ("modality",)),
    Metric("rerouted", "clipped assignments that found another expert", _own("rerouted"), ("modality",)),
    Metric("dropped", "clipped assignments that found none", _own("dropped"), ("modality",)),
    Metric("exempt_tokens", "tokens of exempt requests in planned passes", _one(lambda s: s["exempt_tokens"])),
    Metric("uncached", "requests kept out of the prefix cache (--macs-cache exact)", _one(lambda s: s["uncached"])),
    Metric("measured", "dispatches whose rows were counted over the group", _one(lambda s: _layers(s, "dispatches"))),
    Metric("cut", "measured dispatches in which a bound cut", _one(lambda s: _layers(s, "cut"))),
    Metric(
        "exceeded",
        "measured dispatches in which exempt rows alone were over a bound",
        _one(lambda s: _layers(s, "exceeded")),
    ),
    Metric("rows", "rows of this rank in measured dispatches", _rows, ("stage",)),
    Metric("max_over_mean", "sum over measured dispatches: most loaded rank over mean", _max_over_mean, ("stage",)),
    Metric("visual_share", "sum over planned dispatches: the visual share R_v", _one(lambda s: s["visual_share_sum"])),
    Metric("checks", "tests of a claim on the rows really sent", _each("checks", CLAIMS), ("claim",)),
    Metric("violations", "tests that failed; must stay 0", _each("violations", CLAIMS), ("claim",)),
    Metric("plan_seconds", "host time in the plan (on a GPU: launching it)", _one(lambda s: s["plan_seconds"])),
)


def table() -> str:
    """The metrics as a Markdown table, for docs/guide/operations.md."""
    rows = ["| series | labels | meaning |", "| --- | --- | --- |"]
    return "\n".join(rows + [f"| `{m.series}` | {', '.join(m.labels)} | {m.help} |" for m in METRICS])


class Exporter:
    """Publishes one process's `Stats`. Create it where PROMETHEUS_MULTIPROC_DIR is set, which SGLang sees to.

    Args:
        labels: SGLang's own labels of this process (model_name, tp_rank, ...), put on every series.
        config, rank: of this process, for the metrics that depend on them.
    """

    def __init__(self, labels: Mapping[str, Any], config: MacsConfig, rank: int) -> None:
        from prometheus_client import Counter, Gauge  # reads PROMETHEUS_MULTIPROC_DIR when it is imported

        self._labels = dict(labels)
        self._constant = {"config": config.to_json(), "rank": rank, "version": __version__}
        self._published: dict[tuple[str, tuple[str, ...]], float] = {}
        self._families = {}
        for m in METRICS:
            names = [*self._labels, *m.labels]
            if m.kind == "counter":
                self._families[m.name] = Counter(PREFIX + m.name, m.help, names)
            else:
                self._families[m.name] = Gauge(PREFIX + m.name, m.help, names, multiprocess_mode="mostrecent")
        self._copy: Stats | None = None
        self._arrived: torch.cuda.Event | None = None
        self._seen, self._last = -1, float("-inf")
        self._publish(Stats())  # every series is there from the start, violations at 0 among them

    def configure(self, config: MacsConfig) -> None:
        """Options have changed: the next `tick` that publishes says so."""
        self._constant["config"] = config.to_json()
        self._seen = -1

    def tick(self, stats: Stats, *, idle: bool = False) -> None:
        """Publishes if it is time to. Call it after each forward pass, and when idle, on whatever stream."""
        since = time.monotonic() - self._last
        if stats.dispatches != self._seen and since >= (IDLE_SECONDS if idle else BUSY_SECONDS):
            self._seen, self._last = stats.dispatches, time.monotonic()
            self._start_copy(stats)
        if self._copy is not None and (self._arrived is None or self._arrived.query()):
            self._publish(self._copy)
            self._copy = None

    def _start_copy(self, stats: Stats) -> None:
        self._copy = stats.to_host()
        if torch.cuda.is_initialized():
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def _publish(self, stats: Stats) -> None:
        state = {**stats.snapshot(), **self._constant}
        for m in METRICS:
            values = m.read(state)
            if m.kind == "gauge":  # labels that hold no more, of `info`
                gone = {labels: 0.0 for name, labels in self._published if name == m.name and labels not in values}
                values = {**gone, **values}
            for labels, value in values.items():
                series = self._families[m.name].labels(*self._labels.values(), *labels)
                if m.kind == "counter":
                    series.inc(value - self._published.get((m.name, labels), 0))
                else:
                    series.set(value)
                self._published[m.name, labels] = value
