"""An exempt request on a real server: what others send moves none of its probabilities, and nothing is left of others
in what it finds cached.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.questions import QUESTIONS, Question
from benchmarks.serving import EP2_ARGS, Server, prompt
from sglang_macs import cli
from tests.support.prefixes import assert_only_what_was_not_clipped_is_found_again, is_cached
from tests.support.servers import MACS, assert_bounds_held, generate, own, serve, states

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
OFF = {"macs": "off"}


def ask(server: Server, question: Question, custom: dict | None, key: str = "") -> dict:
    """Four greedy tokens. key: whose prefixes may be used."""
    sampling = {"temperature": 0, "max_new_tokens": 4, "custom_params": custom}
    fields = {"sampling_params": sampling, "return_logprob": True, "extra_key": key, "routed_dp_rank": 0}
    return generate(server, question.prompt, question.image, **fields)["meta_info"]


def log_probs(answer: dict) -> list[float]:
    return [value for value, *_ in answer["output_token_logprobs"]]


class Others:
    """Requests with pictures, four at a time."""

    def __init__(self, server: Server) -> None:
        self.server, self._over, self._pool = server, threading.Event(), ThreadPoolExecutor(4)

    def __enter__(self) -> None:
        self._workers = [self._pool.submit(self._ask, i) for i in range(4)]

    def __exit__(self, *_) -> None:
        self._over.set()
        for worker in self._workers:
            worker.result()

    def _ask(self, first: int) -> None:
        for i in itertools.count(first, 4):
            if self._over.is_set():
                return
            generate(self.server, prompt(f"{i} What is this?", images=1), ("china", "flower")[i % 2])


def furthest(alone: list[float], answer: dict) -> float:
    return max(abs(a - b) for a, b in zip(alone, log_probs(answer), strict=True))


def moved(server: Server, alone: dict[Question, list[float]], custom: dict | None, run: str, times: int) -> list[float]:
    """By how much the furthest probability of each of the answers has moved, beside others. Nothing comes from the
    prefix cache, which no other run of this name may have filled.
    """
    with Others(server):
        asked = enumerate(itertools.islice(itertools.cycle(alone), times))
        return [furthest(alone[question], ask(server, question, custom, f"{run} {i}")) for i, question in asked]


@pytest.mark.parametrize("times", [12, pytest.param(40, marks=pytest.mark.nightly)])
def test_no_load_of_others_moves_an_exempt_request_nor_what_it_finds_cached(vl_model, times):
    flags = ["--macs-gamma", "1.0", "--macs-min-tokens", "0", "--macs-act", "always"]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="exempt") as server:
        alone = {question: log_probs(ask(server, question, OFF, "alone")) for question in QUESTIONS[2:]}
        exempt = moved(server, alone, OFF, "exempt", times)
        clipped = moved(server, alone, None, "clipped", times)
        with Others(server):
            for question in alone:
                ask(server, question, None)  # what was moved is in the cache now
        answers = [(question, ask(server, question, OFF)) for question in (*alone, *alone)]
        assert not is_cached(answers[0][1]), "what others have left there is not for it"
        assert all(is_cached(answer) for _, answer in answers[len(alone) :])
        cached = [furthest(alone[question], answer) for question, answer in answers]
        assert_bounds_held(server)
        assert own(server, "clipped") > 0
        of_ranks = sorted(state["exempt_tokens"] for state in states(server))
        assert of_ranks[0] == 0 < of_ranks[1], "all are asked of one rank"
        for state in states(server):
            assert any(layer["exceeded"] for layer in state["layers"].values()), "alone on a rank, they are"
        assert cli.main(["set", server.url, "--off", "--wait", "0"]) == 0
        # Kernels may round otherwise in other batches.
        rounding = max(0.005, *(2 * by for by in moved(server, alone, None, "MACS off", times)))
        assert max(exempt + cached) <= rounding
        assert sum(by > rounding for by in clipped) > times // 2, "without it, answers are moved"


@pytest.mark.nightly  # of ranks that share a batch: test_server_scattered.py
def test_with_an_exact_cache_only_what_was_not_clipped_is_found_again(vl_model):
    flags = ["--macs-gamma", "1.0", "--macs-min-tokens", "0", "--macs-act", "always", "--macs-cache", "exact"]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, "--chunked-prefill-size", "128", log="exact") as server:
        assert_only_what_was_not_clipped_is_found_again(server, routed_dp_rank=0)
