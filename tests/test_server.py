"""MACS inside the real SGLang server, two expert-parallel ranks: the answers, the bounds, and that it really acted."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.questions import QUESTIONS
from benchmarks.serving import EP2_ARGS, Server, photograph_files, states
from sglang_macs.cpu_compat import environment
from sglang_macs.observe import trace
from tests.support.servers import MACS, ask, assert_bounds_held, load, own, serve

pytestmark = pytest.mark.server
HERE = Path(__file__).resolve().parent


@pytest.mark.nightly
def test_off_answers_as_transformers_do_and_plans_nothing(vl_model, vl_reference):
    with serve(vl_model, *EP2_ARGS, *MACS, "--macs-preset", "off", log="off") as server:
        for question in QUESTIONS:
            assert ask(server, question) == vl_reference.answer(question).ids, question
        for state in states(server):
            assert state["planned"] == 0 and state["dispatches"] == sum(state["skipped"].values()) > 0
            for layer in state["layers"].values():
                assert layer["rows_before"] == layer["rows_after"]


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
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ids"] == [text_reference.answer(q).ids for q in questions]
    assert result["macs"]["planned"] > 0 and result["macs"]["violations"] == {"bound": 0, "text_last": 0}
    if another:
        assert result["without"] and result["after"] == result["ids"][0], "one that did not ask stays without MACS"
