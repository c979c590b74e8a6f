"""One server over two hosts (network namespaces, a cable between them), as in a cluster. `make test-multinode`.

Not part of `make test`: two servers start, and a cut cable takes half a minute to be noticed.
"""

import contextlib
import threading

import pytest

from benchmarks import multinode
from benchmarks.multinode import Cluster, Network
from benchmarks.questions import NEW_TOKENS, Question
from benchmarks.serving import EP2_ARGS, Server
from sglang_macs import cli
from tests.support import changes

pytestmark = [pytest.mark.server, pytest.mark.multinode]
ARGS = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-verify", "true", "--macs-gamma", "1.0"]
REQUESTS = 6
RATE = "100mbit"


@pytest.fixture(scope="module")
def network():
    if missing := multinode.why_not():
        pytest.skip(f"no network namespaces here: {missing}")
    with Network(RATE) as network:
        yield network


@pytest.fixture(scope="module")
def tokens_of_one_host(network, vl_model) -> list[list[int]]:
    """Before the cluster, whose idle schedulers keep both of two cores busy."""
    with Server(vl_model, ARGS, log=multinode.OUT / "test" / "one-host.log", timeout=500) as server:
        return [server.generate(*question).ids for question in multinode.questions(REQUESTS)]


@pytest.fixture(scope="module")
def cluster(network, tokens_of_one_host, vl_model):
    with Cluster(network, vl_model, ARGS, multinode.OUT / "test", timeout=500) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def answers(network, cluster) -> tuple[list[list[int]], int]:
    """(tokens of each request, bytes on the cable meanwhile)."""
    before = network.sent_bytes()
    tokens = [cluster.generate(*question) for question in multinode.questions(REQUESTS)]
    return tokens, network.sent_bytes() - before


def test_tokens_are_those_of_one_host(answers, tokens_of_one_host):
    assert answers[0] == tokens_of_one_host


def test_bounds_held_on_both_hosts(answers, cluster):
    states = sorted(cluster.states(), key=lambda state: state["rank"])
    assert [state["rank"] for state in states] == [0, 1]
    for state in states:
        assert state["planned"] > 0 and sum(state["checks"].values()) > 0
        assert sum(state["violations"].values()) == 0
    assert sum(state["own"]["clipped_visual"] for state in states) > 0
    # Every layer's rows of both ranks are at most gamma = 1.0 times the mean, in every dispatch.
    for layer in states[0]["layers"].values():
        assert layer["max_over_mean_after"] / layer["dispatches"] <= 1.0 + 1e-2 < layer["max_over_mean_before"]


def test_rows_really_crossed_the_cable(answers, cluster):
    """One request at a time: all its tokens are on one host, and the other host's experts still got rows."""
    states = cluster.states()
    assert all(state["received_rows"] > 0 for state in states)
    sent = sum(sum(layer["rows_after"]) for layer in states[0]["layers"].values())
    hidden_bytes = 2 * 128
    assert answers[1] > sent * hidden_bytes * 0.5  # a lower bound: the schedulers' own exchange is in there, too


def test_a_cut_cable_ends_the_server_within_a_minute_and_says_why(answers, network, cluster):
    """Last: the server is gone afterwards."""
    network.cut()
    request = threading.Thread(target=lambda: _ignore_errors(cluster), daemon=True)
    request.start()
    ended = cluster.wait_until_ended(60)
    assert None not in ended, f"still running: {ended}"
    for host in range(2):
        text = cluster.log_text(host)
        assert "Connection timed out" in text or "Timed out waiting" in text, text[-3000:]


def _ignore_errors(cluster: Cluster) -> None:
    with contextlib.suppress(Exception):  # the server it asks is about to end
        cluster.generate(*multinode.questions(1)[0])


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_options_change_under_load_on_both_hosts(vl_model, vl_reference):
    """A request for other options reaches the other host later: no rank may apply it before all have it."""
    if missing := multinode.why_not():
        pytest.skip(f"no network namespaces here: {missing}")
    flags, logs = [*EP2_ARGS, *changes.FLAGS], multinode.OUT / "change"
    with Network() as network, Cluster(network, vl_model, flags, logs, timeout=500) as cluster:

        def ask(question: Question) -> list[int]:
            return cluster.generate(question.prompt, changes.picture_of(question), max_new_tokens=NEW_TOKENS)

        def change(options: list[str]) -> int:
            with network.inside(0):
                return cli.main(["set", cluster.url, *options])

        while_off = changes.change_under_load(108, ask, change, cluster.states)
        changes.assert_all_ranks_changed_alike(cluster.states(), 108)
        for _, _, question, ids in while_off:
            assert ids == vl_reference.answer(question).ids, question
