"""Options of a real server that change under load: on all ranks before the same pass, and nobody waits for ever."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.questions import NEW_TOKENS, QUESTIONS
from benchmarks.serving import EP2_ARGS, Server, data_uri, photograph_files
from sglang_macs import cli
from tests.support.servers import MACS, ask, serve, states

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
# No prefix cache: it would hand keys and values that were computed under one set of options to requests under another.
FLAGS = [*EP2_ARGS, *MACS, "--macs-gamma", "1.0", "--macs-min-tokens", "0", "--macs-act", "always"]
FLAGS += ["--disable-radix-cache"]
# It ends with MACS off, with which the next round begins; between, it plans in another way every time.
ROUND = (["--on", "--gamma", "1.05"], ["--preset", "paper"], ["--off"],
         ["--on", "--gamma", "1"], ["--importance", "entropy"], ["--preset", "off"],
         ["--preset", "cai", "--verify", "false"], ["--verify-every", "4", "--preset", "rank"], ["--off"],
         ["--min-tokens", "4"], ["--on"], ["--off"])  # fmt: skip


class Load:
    """16 requests at a time until it is left; each answer with the time that it was asked and got."""

    def __init__(self, server: Server) -> None:
        self.server, self.answers, self._over = server, [], threading.Event()
        self._pool = ThreadPoolExecutor(16)

    def __enter__(self) -> "Load":
        self._workers = [self._pool.submit(self._ask, i) for i in range(16)]
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        for worker in self._workers:
            worker.result()  # raises what went wrong with a request

    def wait_for_one_since(self, begin: float) -> None:
        """Until a request that was asked from `begin` on has its answer."""
        until = time.monotonic() + 120
        while not any(asked >= begin for asked, *_ in self.answers):
            assert time.monotonic() < until, "no answer for two minutes"
            time.sleep(0.05)

    def _ask(self, first: int) -> None:
        for question in itertools.islice(itertools.cycle(QUESTIONS), first % len(QUESTIONS), None):
            if self._over.is_set():
                return
            image = data_uri(photograph_files()[question.image]) if question.image else None
            asked = time.monotonic()
            ids = self.server.generate(question.prompt, image, max_new_tokens=NEW_TOKENS).ids
            self.answers.append((asked, time.monotonic(), question, ids))


def change(server: Server, number: int) -> None:
    assert cli.main(["set", server.url, *ROUND[number % len(ROUND)], "--wait", "60"]) == 0


def assert_all_ranks_changed_alike(server: Server, count: int) -> None:
    first, *others = (state["control"] for state in states(server))
    assert first["received"] == first["applied"] == count and not first["refused"]
    assert others and all(other == first for other in others)
    passes = [at for _, at in first["changes"]]
    assert passes == sorted(passes) and len(set(passes)) > 1


# Without SGLang's own broadcast, the ranks get a request at different times.
@pytest.mark.parametrize(
    ("changes", "flags"),
    [(12, ["--enable-dp-attention-local-control-broadcast"]), pytest.param(96, [], marks=pytest.mark.nightly)],
    ids=["12", "96"],
)
def test_options_change_under_load(vl_model, vl_reference, changes, flags):
    off, since = [], None  # spans in which MACS was off
    with serve(vl_model, *FLAGS, *flags, log=f"change-{changes}") as server:
        with Load(server) as load:
            for number in range(changes):
                if since is not None:
                    load.wait_for_one_since(since)
                    off.append((since, time.monotonic()))
                change(server, number)
                is_off = {state["config"]["preset"] == "off" for state in states(server)}
                assert len(is_off) == 1
                since = time.monotonic() if is_off == {True} else None
        assert_all_ranks_changed_alike(server, changes)
        for state in states(server):
            assert state["changes"] == changes and state["planned"] > 0
            assert state["misaligned"] == 0 and not any(state["violations"].values())
        within = [one for one in load.answers if any(a <= one[0] and one[1] <= b for a, b in off)]
        assert len(within) >= len(off) >= changes // 4
        within += [(0, 0, question, ask(server, question)) for question in QUESTIONS[3:5]]  # it ended with off
        for _, _, question, ids in within:
            assert ids == vl_reference.answer(question).ids, question
        assert cli.main(["set", server.url, "--preset", "rank", "--trace", "on"]) == 2  # launched without a folder
        assert all("--macs-trace FOLDER" in state["control"]["refused"] for state in states(server))
        assert "options changed by request 3 before pass" in server.log_text()


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
