"""Alert rules and dashboard, evaluated by Prometheus's own promtool: a server that is well, idle or ill."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.serving import reserve_port
from sglang_macs.cpu_compat import environment
from sglang_macs.observe import metrics

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]
PANELS = json.loads((ROOT / "docs" / "grafana" / "macs.json").read_text())["panels"]
SGLANG_SERIES = {"sglang:num_running_reqs"}
NOTHING_YET = {"Bound violations": -1, "Plans without a mask": -1, "Planning": 1, "Gamma": 1}

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")


def checked(*command: str | Path, folder: Path = PROMETHEUS) -> None:
    done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_rules_and_configuration_are_valid_and_every_case_comes_out():
    checked("check", "rules", "alerts.yaml")
    checked("check", "config", "prometheus.yaml")
    checked("test", "rules", "alerts_test.yaml")


def test_every_rule_has_a_case_and_names_series_that_exist():
    cases = (PROMETHEUS / "alerts_test.yaml").read_text()
    known = {metric.series for metric in metrics.METRICS} | SGLANG_SERIES
    for rule in RULES:
        assert rule["alert"] in cases
        named = set(re.findall(r"sglang:\w+", rule["expr"]))
        assert named and named <= known, rule["alert"]


def expressions() -> list[tuple[str, str]]:
    """(panel, query) as Grafana would send them."""
    said = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
    return [(title, expr.replace("$model", ".*").replace("$__rate_interval", "5m")) for title, expr in said]


def test_no_panel_divides_by_what_may_be_zero():
    for title, expr in expressions():
        divisors = re.findall(r" / (?:ignoring\(\w+\) group_left \(\) )?(.*)", expr)
        assert all(divisor.startswith("(") and divisor.endswith(" > 0)") for divisor in divisors), (title, expr)


@promtool
def test_a_server_that_has_done_nothing_shows_gaps_and_no_nan(tmp_path):
    """Ratios have no value; counts of what must stay 0 are -1, shown grey, as long as nothing was looked at."""
    series = []
    for metric in metrics.METRICS:
        labels = "".join(f', {name}="x"' for name in metric.labels)
        value = 1 if metric.kind == "gauge" else 0
        series.append({"series": f'{metric.series}{{model_name="m"{labels}}}', "values": f"{value}+0x20"})
    tests = []
    for title, expr in expressions():
        by = re.search(r"by \(([\w, ]+)\)", expr)
        labels = ", ".join(f'{name}="x"' for name in by[1].split(", ")) if by else ""
        rate = {"labels": f"{{{labels}}}", "value": int("macs_info" in expr)}
        expected = [] if " / " in expr else [rate | {"value": NOTHING_YET.get(title, rate["value"])}]
        if title.startswith("Most loaded") and " / " not in expr:
            expected[0]["value"] = 1  # gamma
        tests.append({"expr": expr, "eval_time": "10m", "exp_samples": expected})
    file = {
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}],
    }
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump(file))
    checked("test", "rules", "dashboard.yaml", folder=tmp_path)


@pytest.mark.parametrize("title", ["Bound violations", "Plans without a mask"])
def test_nothing_looked_at_is_grey_and_not_green(title):
    (panel,) = [panel for panel in PANELS if panel["title"] == title]
    defaults = panel["fieldConfig"]["defaults"]
    base, *steps = defaults["thresholds"]["steps"]
    assert base == {"color": "#808080", "value": None}
    assert [(step["color"], step["value"]) for step in steps] == [("green", 0), ("red", 1)]
    assert defaults["mappings"][0]["options"]["-1"]["text"].startswith("not")


SECOND_NODE = """
import sys, time, urllib.request
from sglang.srt.utils.common import launch_dummy_health_check_server
from sglang_macs.config import MacsConfig
from sglang_macs.observe.metrics import Exporter
Exporter({"model_name": "m", "moe_ep_rank": "8"}, MacsConfig.from_preset(), 8)  # as one of its schedulers does
launch_dummy_health_check_server("127.0.0.1", int(sys.argv[1]), True)
for attempt in range(200):
    try:
        print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics").read().decode())
        break
    except OSError:
        time.sleep(0.1)
"""


@pytest.mark.server
def test_a_second_node_serves_the_metrics_of_its_own_ranks(tmp_path):
    """By what SGLang starts there in place of its HTTP server (Engine._launch_subprocesses)."""
    env = {**os.environ, **environment(ranks=1), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    port, reservation = reserve_port()
    with reservation:
        command = [sys.executable, "-c", SECOND_NODE, str(port)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert 'sglang:macs_active{model_name="m",moe_ep_rank="8"' in done.stdout, done.stderr[-2000:]


def test_every_pod_and_node_is_scraped():
    worker = (ROOT / "deploy" / "kubernetes" / "leaderworkerset.yaml").read_text()
    workload = next(d for d in yaml.safe_load_all(worker) if d["kind"] == "LeaderWorkerSet")
    monitor = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "podmonitor.yaml").read_text())["spec"]
    assert monitor["selector"]["matchLabels"] == {
        "leaderworkerset.sigs.k8s.io/name": workload["metadata"]["name"]  # the controller labels every pod with it
    }
    group = workload["spec"]["leaderWorkerTemplate"]
    for template in ("leaderTemplate", "workerTemplate"):
        (container,) = group[template]["spec"]["containers"]
        assert monitor["podMetricsEndpoints"][0]["port"] in {port["name"] for port in container["ports"]}
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert len(scraped["static_configs"][0]["targets"]) == group["size"]
