"""Redundant experts inside the real SGLang server, two expert-parallel ranks: EPLB moves experts while requests run."""

import json

import pytest
import requests
import torch

from benchmarks.questions import QUESTIONS
from benchmarks.serving import EP2_ARGS, states
from tests.support.servers import INFINITE, LAYERS, MACS, ask, assert_bounds_held, load, own, serve

pytestmark = pytest.mark.server
REDUNDANT = ["--ep-num-redundant-experts", "4"]


def balance(server) -> list[tuple[float, float]]:
    """Of each layer, the fullest rank over the mean before and after the plan, averaged over dispatches."""
    layers = states(server)[0]["layers"].values()
    return [tuple(one[f"max_over_mean_{s}"] / one["dispatches"] for s in ("before", "after")) for one in layers]


@pytest.mark.parametrize(("ranks", "times"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.nightly)])
def test_answers_stay_while_experts_move_and_every_batch_is_balanced(vl_model, vl_reference, ranks, times):
    """Layer by layer, every few passes; at infinite gamma answers are those without replicas and without MACS."""
    moving = [
        "--macs-act",
        "always",
        "--enable-eplb",
        "--eplb-rebalance-num-iterations",
        "8",
        "--eplb-rebalance-layers-per-chunk",
        "1",
    ]
    groups = [str(ranks) if value == "2" else value for value in EP2_ARGS]
    with serve(vl_model, *groups, *INFINITE, *REDUNDANT, *moving, log=f"replicas-eplb-{ranks}", timeout=600) as server:
        for _ in range(times):
            for question in QUESTIONS:
                assert ask(server, question) == vl_reference.answer(question).ids, question
            load(server)
        log = server.log.read_text()
        assert log.count("rebalance end") > 4, "a server that moves nothing proves nothing"
        assert_bounds_held(server)
        assert own(server, "clipped") == 0 < own(server, "moved")
        assert all(after < before for before, after in balance(server))


@pytest.mark.nightly  # without a server: test_replicas.py, test_replicas_dispatch.py
def test_replicas_come_before_clipping_and_the_recorder_counts_what_was_asked_for(vl_model, tmp_path):
    """A placement from given loads; half of the rows are dropped, and all are in the recorder's counts."""
    placement = tmp_path / "loads.json"
    placement.write_text(json.dumps({"logical_count": [[16 - expert for expert in range(16)]] * LAYERS}))
    located = ["--init-expert-location", str(placement), "--expert-distribution-recorder-mode", "stat"]
    flags = ["--macs-gamma", "0.5", "--macs-reroute", "none", "--macs-act", "always", "--macs-min-tokens", "0"]
    arguments = [*EP2_ARGS, *MACS, *REDUNDANT, *located, *flags, "--disable-radix-cache"]
    arguments += ["--disable-overlap-schedule"]  # else each answer of one token decodes another one
    env = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(tmp_path)}
    with serve(vl_model, *arguments, log="replicas-recorded", env=env) as server:
        requests.post(f"{server.url}/start_expert_distribution_record", timeout=60).raise_for_status()
        before = own(server, "assignments")
        for question in QUESTIONS:
            server.generate(question.prompt, max_new_tokens=1)
        requests.post(f"{server.url}/dump_expert_distribution_record", timeout=60).raise_for_status()
        assignments = own(server, "assignments") - before
        assert_bounds_held(server)
        assert own(server, "dropped") > 0.4 * own(server, "assignments") and own(server, "moved") > 0
    (dump,) = tmp_path.glob("*.pt")
    counted = torch.load(dump, weights_only=True)["logical_count"].sum(dim=(0, 2))
    assert counted.tolist() == [assignments // LAYERS] * LAYERS
