"""Options of a real server that change under load: on all ranks before the same pass, and nobody waits for ever."""

import re
from collections import Counter

import pytest

from benchmarks.questions import NEW_TOKENS, QUESTIONS, Question
from benchmarks.serving import EP2_ARGS
from sglang_macs import cli
from sglang_macs.cpu_compat import threads_bind
from tests.support import changes
from tests.support.servers import ask, serve, states

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


# Without SGLang's own broadcast, the ranks get a request at different times.
@pytest.mark.parametrize(
    ("count", "flags"),
    [(12, ["--enable-dp-attention-local-control-broadcast"]), pytest.param(108, [], marks=pytest.mark.nightly)],
    ids=["12", "108"],
)
def test_options_change_under_load(vl_model, vl_reference, count, flags):
    with serve(vl_model, *EP2_ARGS, *changes.FLAGS, *flags, log=f"change-{count}") as server:

        def of_many(question: Question) -> list[int]:
            return server.generate(question.prompt, changes.picture_of(question), max_new_tokens=NEW_TOKENS).ids

        while_off = changes.change_under_load(
            count, of_many, lambda options: cli.main(["set", server.url, *options]), lambda: states(server)
        )
        changes.assert_all_ranks_changed_alike(states(server), count)
        answers = [(question, ids) for _, _, question, ids in while_off]
        answers += [(question, ask(server, question)) for question in QUESTIONS[3:5]]  # it ended with off
        for question, ids in answers:
            assert ids == vl_reference.answer(question).ids, question
        assert cli.main(["set", server.url, "--preset", "rank", "--trace", "on"]) == 2  # launched without a folder
        assert all("--macs-trace FOLDER" in state["control"]["refused"] for state in states(server))
        assert "options changed by request 3 before pass" in server.log_text()


@pytest.mark.nightly
def test_options_change_in_every_stage(vl_model, vl_reference):
    """Of a pipeline: on both ranks of a stage before the same pass, which the stages need not count alike."""
    env = {"SGLANG_CPU_OMP_THREADS_BIND": threads_bind(4)}
    flags = [*EP2_ARGS, "--pp-size", "2", *changes.FLAGS]
    with serve(vl_model, *flags, log="change-stages", env=env, timeout=480) as server:

        def of_many(question: Question) -> list[int]:
            return server.generate(question.prompt, changes.picture_of(question), max_new_tokens=NEW_TOKENS).ids

        while_off = changes.change_under_load(
            12, of_many, lambda options: cli.main(["set", server.url, *options]), lambda: states(server)
        )
        for _, _, question, ids in while_off:
            assert ids == vl_reference.answer(question).ids, question
        said = re.findall(r"options changed by request (\d+) before pass (\d+)", server.log_text())
        for number in range(1, 13):
            passes = Counter(at for request, at in said if request == str(number))
            assert passes.total() == 4 and all(ranks in (2, 4) for ranks in passes.values()), (number, passes)


def test_observe_answers_as_without_macs_and_says_what_a_bound_would_gain(vl_model, vl_reference, capsys):
    flags = ["--macs-preset", "observe", "--macs-verify-every", "2", "--macs-min-tokens", "0"]
    with serve(vl_model, *EP2_ARGS, "--moe-a2a-backend", "macs", *flags, log="observe") as server:
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
