"""Options of a real server that change under load: on all ranks before the same pass, and nobody waits for ever.

The first two tests share a server, which is launched to observe.
"""

import pytest

from benchmarks.questions import NEW_TOKENS, QUESTIONS, Question
from benchmarks.serving import EP2_ARGS
from sglang_macs import cli
from tests.support import changes
from tests.support.servers import ask, serve, states

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
OBSERVE = ["--moe-a2a-backend", "macs", "--macs-preset", "observe", "--macs-verify-every", "2"]


@pytest.fixture(scope="module")
def server(vl_model):
    # Without SGLang's own broadcast, the ranks get a request at different times.
    flags = [*OBSERVE, *changes.EVERY_PASS, "--enable-dp-attention-local-control-broadcast"]
    with serve(vl_model, *EP2_ARGS, *flags, log="observe") as server:
        yield server


def test_observe_answers_as_without_macs_and_says_what_a_bound_would_gain(server, vl_reference, capsys):
    for question in QUESTIONS[2:6]:
        assert ask(server, question) == vl_reference.answer(question).ids, question
    for state in states(server):
        assert state["planned"] == 0 and state["skipped"]["off"] > 0 and not state["checks"]
        assert state["observed_passes"] > 0 and state["observed_seconds"] > 0 and state["observe"]["row_us"] > 0
        assert 0 < state["observed_share"] <= state["observed_passes"]
        assert all(sum(layer["excess"]) > 0 for layer in state["layers"].values())
    assert cli.main(["doctor", server.url]) == 0
    assert "of a prefill pass" in capsys.readouterr().out
    assert cli.main(["set", server.url, "--preset", "rank", "--gamma", "1", "--wait", "0"]) == 0
    ask(server, QUESTIONS[5])
    assert all(state["planned"] > 0 for state in states(server))


def test_options_change_under_load(server, vl_reference):
    assert cli.main(["set", server.url, "--verify", "true", "--wait", "0"]) == 0
    change_under_load(server, vl_reference, 12)


@pytest.mark.nightly
def test_options_change_nine_times_as_often(vl_model, vl_reference):
    with serve(vl_model, *EP2_ARGS, *changes.FLAGS, log="change") as server:
        change_under_load(server, vl_reference, 108)


def change_under_load(server, vl_reference, count: int) -> None:
    def of_many(question: Question) -> list[int]:
        return server.generate(question.prompt, changes.picture_of(question), max_new_tokens=NEW_TOKENS).ids

    before = states(server)[0]["control"]["received"]
    while_off = changes.change_under_load(
        count, of_many, lambda options: cli.main(["set", server.url, *options]), lambda: states(server)
    )
    changes.assert_all_ranks_changed_alike(states(server), before + count)
    answers = [(question, ids) for _, _, question, ids in while_off]
    answers += [(question, ask(server, question)) for question in QUESTIONS[3:5]]  # it ended with off
    for question, ids in answers:
        assert ids == vl_reference.answer(question).ids, question
    assert cli.main(["set", server.url, "--preset", "rank", "--trace", "on"]) == 2  # launched without a folder
    assert all("--macs-trace FOLDER" in state["control"]["refused"] for state in states(server))
    assert f"options changed by request {before + 3} before pass" in server.log_text()
