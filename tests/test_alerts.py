"""Alert rules and dashboard, evaluated by Prometheus's own promtool: a server that is well, idle or ill."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.serving import reserve_port
from sglang_macs.cpu_compat import environment
from sglang_macs.observe import metrics

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "macs.json").read_text())
PANELS = DASHBOARD["panels"]
# SGLang's own, by the name that a query gives them.
SGLANG_SERIES = {
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:prompt_tokens_total",
    "sglang:generation_tokens_total",
    "sglang:time_to_first_token_seconds_bucket",
    "sglang:inter_token_latency_seconds_bucket",
}
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
    every = re.compile(r"\$(?:model|job|instance)\b")
    return [(title, every.sub(".*", expr).replace("$__rate_interval", "5m")) for title, expr in said]


def test_every_query_is_of_the_model_job_and_instance_chosen():
    chosen = {variable["name"] for variable in DASHBOARD["templating"]["list"]} - {"datasource"}
    assert chosen == {"model", "job", "instance"}
    for panel in PANELS:
        for target in panel["targets"]:
            series = len(re.findall(r"sglang:\w+", target["expr"]))
            for name in chosen:
                assert target["expr"].count(f'=~"${name}"') == series, (panel["title"], name)


def test_series_of_sglangs_own_exist():
    """In the installed release: a histogram's name is that of its buckets without their ending."""
    source = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "observability" / "metrics_collector.py"
    text = source.read_text(encoding="utf-8")
    named = {name for _, expr in expressions() for name in re.findall(r"sglang:\w+", expr)} | SGLANG_SERIES
    of_sglang = {name for name in named if not name.startswith("sglang:macs_")}
    assert of_sglang == SGLANG_SERIES
    for name in of_sglang:
        assert f'name="{name.removesuffix("_bucket")}"' in text, name


def test_the_dashboard_has_nothing_that_grafana_does_not_know():
    """By Grafana's own models, which leave out what they do not know."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog import encoder, plugins

    plugins.register_default_plugins()

    def unknown(raw: dict) -> list[str]:
        known = json.loads(encoder.JSONEncoder(sort_keys=True).encode(models.Dashboard.from_json(raw)))
        return list(left_out(raw, known))

    assert not unknown(DASHBOARD)
    wrong = json.loads(json.dumps(DASHBOARD))
    wrong["panels"][0]["targets"][0]["expression"] = ""
    assert unknown(wrong) == ["/panels/0/targets/0/expression"]


def left_out(raw: object, known: object, path: str = "") -> Iterator[str]:
    """Where `raw` says something that `known` does not."""
    if not isinstance(raw, dict | list):
        yield from () if raw == known else (path,)
        return
    for name, part in raw.items() if isinstance(raw, dict) else enumerate(raw):
        there = name in known if isinstance(known, dict) else isinstance(known, list) and name < len(known)
        if there:
            yield from left_out(part, known[name], f"{path}/{name}")
        elif part not in ({}, []):
            yield f"{path}/{name}"


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
    for name in SGLANG_SERIES:
        labels = ', le="1"' if name.endswith("_bucket") else ""
        series.append({"series": f'{name}{{model_name="m"{labels}}}', "values": "0+0x20"})
        if labels:
            series.append({"series": f'{name}{{model_name="m", le="+Inf"}}', "values": "0+0x20"})
    tests = []
    for title, expr in expressions():
        by = re.search(r"by \(([\w, ]+)\)", expr)
        labels = ", ".join(f'{name}="x"' for name in by[1].split(", ")) if by else ""
        rate = {"labels": f"{{{labels}}}", "value": int("macs_info" in expr)}
        expected = (
            []
            if " / " in expr or "histogram_quantile" in expr
            else [rate | {"value": NOTHING_YET.get(title, rate["value"])}]
        )
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
while True:  # until it listens, or the test ends this
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
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
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
