"""One server at infinite gamma, two expert-parallel ranks: everything is planned, and no answer changes.

The tests share it, and the last one ends it.
"""

import json
from pathlib import Path

import pytest
import requests

from benchmarks.load_test import MACS, rank_killed, under_load
from benchmarks.questions import QUESTIONS
from benchmarks.serving import EP2_ARGS, states
from tests.support.servers import WORDS, ask, assert_bounds_held, own, serve

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(vl_model):
    flags = [*MACS, "--macs-gamma", "inf", "--macs-min-tokens", "0", "--moe-runner-backend", "macs"]
    with serve(vl_model, *EP2_ARGS, *flags, log="unbounded") as server:
        yield server


def test_answers_are_those_of_transformers(server, vl_model, vl_reference):
    """The whole plan runs, exchange included, on every dispatch, and changes no token."""
    before = sum(state["own"].get("assignments_visual", 0) for state in states(server))
    for question in QUESTIONS:
        assert ask(server, question) == vl_reference.answer(question).ids, question
    assert_bounds_held(server)
    assert own(server, "clipped") == 0
    assert all(state["runner_calls"] > 0 for state in states(server))
    # The mask is right: exactly the prompts' image positions were taken for visual, in every layer and slot.
    config = json.loads((Path(vl_model) / "config.json").read_text())
    text = config["text_config"]
    visual = sum(
        int((vl_reference._inputs(q)["input_ids"] == config["image_token_id"]).sum()) for q in QUESTIONS if q.image
    )
    seen = sum(state["own"]["assignments_visual"] for state in states(server)) - before
    assert seen == visual * text["num_experts_per_tok"] * text["num_hidden_layers"]


def test_the_cache_is_flushed_behind_what_still_runs(server):
    body = {"text": WORDS, "sampling_params": {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}}
    with requests.post(f"{server.url}/generate", json=body | {"stream": True}, stream=True, timeout=60) as answer:
        next(answer.iter_lines())
        server.flush_cache()


def test_mixed_load_changes_no_answer_and_a_killed_rank_ends_the_server(server):
    checks = [*under_load(server, 40, float("inf")), *rank_killed(server)]
    assert [check for check in checks if not check.ok] == []
    assert {"requests", "answers as alone", "bounds", "rank killed: the server ends"} <= {c.name for c in checks}
