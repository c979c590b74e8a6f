"""The Prometheus series: their values, how seldom they are read, and that dashboard and documentation name them."""

import json
import re
from pathlib import Path

import prometheus_client
import pytest
import torch

from sglang_macs import __version__
from sglang_macs.config import MacsConfig
from sglang_macs.observe import metrics
from sglang_macs.observe.stats import Recount, Stats

ROOT = Path(__file__).resolve().parent.parent
CONFIG = MacsConfig.from_preset("rank", gamma=1.25)
SGLANG_LABELS = {"model_name": "tiny", "moe_ep_rank": "1"}
CONSTANT = {"rank": 1, "config": CONFIG.to_json(), "version": __version__}


@pytest.fixture(scope="module")
def exporter() -> metrics.Exporter:
    """One for the module: prometheus_client has one registry a process."""
    return metrics.Exporter(SGLANG_LABELS, CONFIG, rank=1)


@pytest.fixture
def clock(monkeypatch, exporter):
    """Seconds that only a test moves; the exporter has never published by it."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(exporter, "_last", float("-inf"))
    return now


def sample(series: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(series, {**SGLANG_LABELS, **labels})


def counted(factor: int = 1) -> Stats:
    stats = Stats(dispatches=5 * factor, planned=2 * factor, plan_seconds=0.5 * factor, visual_share_sum=1.5 * factor)
    stats.skipped["decode"] = 3 * factor
    stats.outcome = torch.tensor([[50, 20], [10, 4], [6, 1]]) * factor
    rows, cut = torch.tensor([[30, 10], [25, 15]]), torch.tensor([[1, 0, 0, 25], [-1, 0, 0, 25]])
    for _ in range(factor):
        stats.add_recount(Recount(CONFIG, 0, 2, rows, rows, cut))
    return stats


def test_every_series_is_there_before_anything_is_counted(exporter):
    assert sample("sglang:macs_active") == 1 and sample("sglang:macs_gamma") == 1.25
    assert sample("sglang:macs_violations_total", claim="bound") == 0
    assert sample("sglang:macs_skipped_total", reason="small") == 0


def test_published_values_are_the_counters_also_the_second_time(exporter, clock):
    for factor in (1, 3):
        exporter.tick(counted(factor))
        clock[0] += metrics.BUSY_SECONDS
        state = {**counted(factor).snapshot(), **CONSTANT}
        for metric in metrics.METRICS:
            for labels, value in metric.read(state).items():
                assert sample(metric.series, **dict(zip(metric.labels, labels, strict=True))) == value, metric
    assert sample("sglang:macs_clipped_total", modality="text") == 12
    assert sample("sglang:macs_dropped_total", modality="visual") == 12
    assert sample("sglang:macs_rows_total", stage="after") == 45  # of rank 1
    assert sample("sglang:macs_max_over_mean_total", stage="before") == 4.5
    assert sample("sglang:macs_cut_total") == sample("sglang:macs_checks_total", claim="bound") == 3


def test_counters_are_read_seldom_and_an_idle_server_catches_up(exporter, clock, monkeypatch):
    reads = []
    monkeypatch.setattr(exporter, "_publish", lambda stats: reads.append(stats.dispatches))
    stats = counted(10)
    for _ in range(100):
        stats.dispatches += 1
        exporter.tick(stats)
    assert reads == [51]
    clock[0] += metrics.IDLE_SECONDS
    exporter.tick(stats)
    assert reads == [51]
    for _ in range(100):  # the idle loop spins
        exporter.tick(stats, idle=True)
    assert reads == [51, 150]


def test_a_copy_that_has_not_arrived_is_published_later(exporter, clock, monkeypatch):
    reads = []
    monkeypatch.setattr(exporter, "_publish", lambda stats: reads.append(stats.dispatches))

    class Event:
        arrived = False

        def query(self):
            return self.arrived

    event = Event()
    monkeypatch.setattr(exporter, "_arrived", event)
    stats = counted(20)
    exporter.tick(stats)
    stats.dispatches += 1
    exporter.tick(stats)
    assert reads == []
    event.arrived = True
    exporter.tick(stats)
    assert reads == [100]


def dashboard() -> dict:
    return json.loads((ROOT / "docs" / "grafana" / "macs.json").read_text())


def test_every_dashboard_query_names_series_and_labels_that_exist():
    known = {metric.series: metric for metric in metrics.METRICS}
    queries = [(panel["title"], t["expr"]) for panel in dashboard()["panels"] for t in panel["targets"]]
    assert len(queries) > 10
    for title, query in queries:
        named = re.findall(r"sglang:macs_\w+", query)
        assert set(named) <= known.keys(), (title, query)
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")} - {"le"}
        assert grouped <= {"moe_ep_rank", *(label for name in named for label in known[name].labels)}, (title, query)
        assert query.count("(") == query.count(")")
        if not named:  # of SGLang's own: tests/test_alerts.py
            continue
        counters = [name for name in named if known[name].kind == "counter"]
        assert title in ("Bound violations", "Plans without a mask") or query.count("rate(") == len(counters), query
    shown = {name for _, query in queries for name in re.findall(r"sglang:macs_\w+", query)}
    assert shown == known.keys(), "a series that no panel shows"


def test_dashboard_panels_lie_side_by_side():
    taken = set()
    for panel in dashboard()["panels"]:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken and box["x"] + box["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_documented_table_is_that_of_the_code():
    assert metrics.table() in (ROOT / "docs" / "guide" / "operations.md").read_text(), "run: make format"


def test_options_that_change_show_at_once_and_the_old_ones_no_more(exporter, clock):
    old, new = CONFIG, MacsConfig.from_preset("off")
    served = {"scope": "rank", "load": "rows", "importance": "gate", "reroute": "global", "version": __version__}
    exporter.tick(stats := counted(4))
    assert sample("sglang:macs_info", preset="rank", **served) == 1
    exporter.configure(new)
    clock[0] += metrics.BUSY_SECONDS
    exporter.tick(stats)
    assert sample("sglang:macs_info", preset="off", **served) == 1 and sample("sglang:macs_active") == 0
    assert sample("sglang:macs_info", preset="rank", **served) == 0
    exporter.configure(old)
    clock[0] += metrics.BUSY_SECONDS
    exporter.tick(stats)
    assert sample("sglang:macs_info", preset="rank", **served) == 1 and sample("sglang:macs_gamma") == 1.25
