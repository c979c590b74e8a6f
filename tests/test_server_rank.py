"""One server that bounds ranks, two of them: layers left alone while they are balanced; bounds under load.

The tests share it, and change its options at run time.
"""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.questions import QUESTIONS, Question
from benchmarks.serving import EP2_ARGS, Server, ServerError, data_uri, photograph_files, prompt, states
from sglang_macs import cli
from sglang_macs.dispatch.acting import LAG, LOOK_EVERY
from sglang_macs.observe import metrics
from tests.support.servers import LAYERS, MACS, WORDS, ask, assert_bounds_held, load, own, serve

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(vl_model):
    flags = ["--macs-gamma", "1.1", "--macs-act-rows", "20", "--disable-radix-cache", "--enable-metrics"]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="rank") as server:
        yield server


def assert_metrics_are_the_counters(server: Server) -> None:
    """What Prometheus scrapes equals /server_info, series by series, for every rank."""
    labels_of = {metric.series: metric.labels for metric in metrics.METRICS}
    until = time.monotonic() + 60
    while True:  # an idle server publishes within a second, on a quiet machine
        expected = {
            (metric.series, str(state["rank"]), labels): value
            for state in states(server)
            for metric in metrics.METRICS
            for labels, value in metric.read(state).items()
        }
        published = {
            (s.name, s.labels["moe_ep_rank"], tuple(s.labels[label] for label in labels_of[s.name])): s.value
            for family in text_string_to_metric_families(server.get("/metrics"))
            for s in family.samples
            if s.name in labels_of
        }
        if published == pytest.approx(expected) or time.monotonic() > until:
            break
        time.sleep(0.25)
    assert published == pytest.approx(expected)
    assert expected["sglang:macs_clipped_total", "0", ("visual",)] > 0


def test_layers_are_left_alone_while_they_are_balanced(server, capsys):
    """Text loads both ranks alike; pictures pull to one. Requests go to either rank in turn, the other one is idle."""

    def of_all(name: str) -> int:
        first, other = (state[name] for state in states(server))
        assert first == other, "all ranks decide alike"
        return first["no_gain"] if name == "skipped" else first

    for i in range(LAG + 4):
        server.generate(prompt(f"{i} " + WORDS * 8), max_new_tokens=1)
    assert (of_all("planned"), of_all("skipped")) == (LAYERS * LAG, LAYERS * 4)
    for i in range(LOOK_EVERY + 4):
        server.generate(prompt(f"{i} What?", images=1), data_uri(photograph_files()["china"]), max_new_tokens=1)
    planned = of_all("planned")
    assert planned > LAYERS * (LAG + 4), "each look has found that pictures pay"
    for i in range(4):
        server.generate(prompt(f"{i} Where?", images=1), data_uri(photograph_files()["china"]), max_new_tokens=1)
    assert of_all("planned") == planned + 4 * LAYERS
    for state in states(server):
        assert state["acting"] == {"rows_that_pay": 20} and state["expected_gain"]["planned"] > 20 * 4
        assert state["checks"]["bound"] == state["planned"] and not sum(state["violations"].values())
    assert own(server, "clipped") > 0
    assert_metrics_are_the_counters(server)
    assert cli.main(["top", server.url, "--once"]) == 0
    assert "where left alone; a plan pays from 20 on" in capsys.readouterr().out


def layer_counts(server: Server, name: str) -> list[float]:
    """One counter of every layer of every rank."""
    found = [state["layers"] for state in states(server)]
    return [layers.get(str(i), {}).get(name, 0) for layers in found for i in range(LAYERS)]


@pytest.mark.smoke
def test_rank_bounds_hold_under_load_and_bad_images_leave_the_server_serving(server, capsys):
    assert cli.main(["set", server.url, "--gamma", "1", "--wait", "0"]) == 0
    names = ("cut", "dispatches", "max_over_mean_before", "max_over_mean_after")
    counted, clipped = [layer_counts(server, name) for name in names], own(server, "clipped")
    load(server)
    for bad in (b"not a picture", photograph_files()["china"][:200], b""):
        with pytest.raises(ServerError, match="HTTP 4"):
            server.generate(Question("What?", "china").prompt, data_uri(bad))
    assert ask(server, QUESTIONS[-1])  # still there
    assert_bounds_held(server)
    assert own(server, "clipped") > clipped
    assert all(state["checks"]["text_last"] == state["planned"] for state in states(server))
    now = [layer_counts(server, name) for name in names]
    cuts, *grown = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(counted, now, strict=True)]
    assert sum(cuts) > 0
    for dispatches, before, after in zip(*grown, strict=True):
        assert after <= 1.01 * dispatches < before
    assert_metrics_are_the_counters(server)
    assert cli.main(["top", server.url, "--once"]) == 0
    assert "a bound cut in" in capsys.readouterr().out
