"""MACS inside the real SGLang server, two expert-parallel ranks: the answers, the bounds, and that it really acted."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.questions import QUESTIONS, Question
from benchmarks.serving import EP2_ARGS, Server, ServerError, data_uri, photograph_files, prompt, states
from sglang_macs import cli
from sglang_macs.cpu_compat import environment
from sglang_macs.dispatch.acting import LAG, LOOK_EVERY
from sglang_macs.observe import metrics, trace
from tests.support.servers import LAYERS, MACS, WORDS, ask, assert_bounds_held, load, own, serve

pytestmark = pytest.mark.server
HERE = Path(__file__).resolve().parent


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


@pytest.mark.nightly
def test_off_answers_as_transformers_do_and_plans_nothing(vl_model, vl_reference):
    with serve(vl_model, *EP2_ARGS, *MACS, "--macs-preset", "off", log="off") as server:
        for question in QUESTIONS:
            assert ask(server, question) == vl_reference.answer(question).ids, question
        for state in states(server):
            assert state["planned"] == 0 and state["dispatches"] == sum(state["skipped"].values()) > 0
            for layer in state["layers"].values():
                assert layer["rows_before"] == layer["rows_after"]


@pytest.mark.smoke
def test_rank_bounds_hold_under_load_and_bad_images_leave_the_server_serving(vl_model, capsys):
    flags = ["--macs-gamma", "1.0", "--macs-act", "always", "--enable-metrics"]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="rank") as server:
        load(server)
        for bad in (b"not a picture", photograph_files()["china"][:200], b""):
            with pytest.raises(ServerError, match="HTTP 4"):
                server.generate(Question("What?", "china").prompt, data_uri(bad))
        assert ask(server, QUESTIONS[-1])  # still there
        assert_bounds_held(server)
        assert own(server, "clipped") > 0
        for state in states(server):
            assert state["checks"]["text_last"] == state["planned"]
            assert sum(layer["cut"] for layer in state["layers"].values()) > 0
            for layer in state["layers"].values():
                assert layer["max_over_mean_after"] <= 1.01 * layer["dispatches"] < layer["max_over_mean_before"]
        assert_metrics_are_the_counters(server)
        assert cli.main(["top", server.url, "--once"]) == 0
        assert "a bound cut in" in capsys.readouterr().out


def test_layers_are_left_alone_while_they_are_balanced(vl_model, capsys):
    """Text loads both ranks alike; pictures pull to one. Requests go to either rank in turn, the other one is idle."""
    flags = ["--macs-gamma", "1.1", "--macs-act-rows", "20", "--disable-radix-cache", "--enable-metrics"]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="act") as server:

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


OWN_IMPORTANCE = """
import os
from pathlib import Path

def by_slot(tokens):
    Path(__file__).with_name(f"called-{os.getpid()}").touch()
    return tokens.topk_weights.cumsum(1)
"""


@pytest.mark.nightly
def test_an_own_importance_serves_and_bounds_hold(vl_model, tmp_path):
    """Every scheduler process finds the module and asks it."""
    (tmp_path / "own_importance.py").write_text(OWN_IMPORTANCE)
    flags = ["--macs-gamma", "1.0", "--macs-act", "always", "--macs-importance", "own_importance:by_slot"]
    env = {"PYTHONPATH": os.pathsep.join([environment(ranks=2)["PYTHONPATH"], str(tmp_path)])}
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="own-importance", env=env) as server:
        load(server)
        assert_bounds_held(server)
        assert own(server, "clipped") > own(server, "rerouted") > 0
    assert len(list(tmp_path.glob("called-*"))) == 2


class SglangServe(Server):
    """The same server through SGLang's other entry point."""

    @property
    def command(self) -> list[str]:
        sglang = os.path.join(os.path.dirname(self.python), "sglang")
        return [sglang, "serve", *super().command[3:]]


def assert_trace_is_the_counters(server: Server, folder: Path) -> None:
    """The recorded rows are those of /server_info, and the recorded pictures those that were sent."""
    read = trace.load(str(folder))
    recorded, first = read.rank_rows(), states(server)[0]
    for i, layer in enumerate(read.layers):
        for rows, stage in zip(recorded, ("before", "after"), strict=True):
            assert rows[:, i].sum(axis=0).tolist() == first["layers"][str(layer)][f"rows_{stage}"]
    shares = sum(step.visual_share[read.layers.index(0)] for step in read.steps)
    assert len(read.steps) * len(read.layers) == first["planned"] and 0 < shares < len(read.steps)
    clipped = sum(int(picture.clipped.sum()) for picture in read.pictures)
    assert 0 < clipped < own(server, "clipped")  # pictures that came again are not recorded again
    sent = [np.asarray(Image.open(io.BytesIO(photo)).convert("L"), float) for photo in photograph_files().values()]
    for picture in read.pictures:
        got = Image.open(io.BytesIO(picture.jpeg)).convert("L")
        resized = [np.asarray(Image.fromarray(photo).resize(got.size)) for photo in sent]
        likeness = [np.corrcoef(np.asarray(got, float).ravel(), photo.ravel())[0, 1] for photo in resized]
        assert max(likeness) > 0.97 and not np.isnan(picture.importance).any()


def test_expert_bounds_hold_under_load_through_sglang_serve(vl_model, tmp_path):
    flags = ["--macs-preset", "paper", "--macs-load", "rows", "--macs-gamma", "1.0", "--macs-trace", str(tmp_path)]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="expert", kind=SglangServe) as server:
        load(server)
        assert_bounds_held(server)
        assert own(server, "clipped") > own(server, "rerouted") > 0
        assert_trace_is_the_counters(server, tmp_path)


# What an engine leaves behind in its process is in test_launch.py, too.
@pytest.mark.parametrize("another", [[], pytest.param(["another"], marks=pytest.mark.nightly)], ids=["one", "another"])
def test_engine_in_this_process_answers_as_transformers_do(text_model, text_reference, another):
    questions = [q for q in QUESTIONS if q.image is None]
    done = subprocess.run(
        [sys.executable, str(HERE / "support" / "engine_program.py"), str(text_model), *another],
        input=json.dumps([q.prompt for q in questions]),
        env={**os.environ, **environment(ranks=2), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ids"] == [text_reference.answer(q).ids for q in questions]
    assert result["macs"]["planned"] > 0 and result["macs"]["violations"] == {"bound": 0, "text_last": 0}
    if another:
        assert result["without"] and result["after"] == result["ids"][0], "one that did not ask stays without MACS"
