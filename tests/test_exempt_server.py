"""An exempt request on a real server: what others send moves none of its probabilities, and nothing is left of others
in what it finds cached.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.questions import QUESTIONS, Question
from benchmarks.serving import CPU_ARGS, EP2_ARGS, Server, prompt
from sglang_macs import cli
from tests.support.servers import MACS, assert_bounds_held, generate, own, serve, states
from tests.support.tiers import nightly_but

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
ASKED = 12  # twice each
OFF = {"macs": "off"}


def ask(server: Server, question: Question, custom: dict | None, key: str = "") -> dict:
    """Four greedy tokens. key: whose prefixes may be used."""
    sampling = {"temperature": 0, "max_new_tokens": 4, "custom_params": custom}
    fields = {"sampling_params": sampling, "return_logprob": True, "extra_key": key, "routed_dp_rank": 0}
    return generate(server, question.prompt, question.image, **fields)["meta_info"]


def is_cached(answer: dict) -> bool:
    """Whether more than the chat format's first words was found in the prefix cache."""
    return answer["cached_tokens"] > answer["prompt_tokens"] // 2


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


def moved(server: Server, alone: dict[Question, list[float]], custom: dict | None, run: str) -> list[float]:
    """By how much the furthest probability of each of the answers has moved, beside others. Nothing comes from the
    prefix cache, which no other run of this name may have filled.
    """
    with Others(server):
        asked = enumerate(itertools.islice(itertools.cycle(alone), ASKED))
        return [furthest(alone[question], ask(server, question, custom, f"{run} {i}")) for i, question in asked]


def test_no_load_of_others_moves_an_exempt_request_nor_what_it_finds_cached(vl_model):
    flags = ["--macs-gamma", "1.0", "--macs-min-tokens", "0", "--macs-act", "always"]
    with serve(vl_model, *EP2_ARGS, *MACS, *flags, log="exempt") as server:
        alone = {question: log_probs(ask(server, question, OFF, "alone")) for question in QUESTIONS[2:]}
        exempt = moved(server, alone, OFF, "exempt")
        clipped = moved(server, alone, None, "clipped")
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
        rounding = max(0.005, *(2 * by for by in moved(server, alone, None, "MACS off")))
        assert max(exempt + cached) <= rounding
        assert sum(by > rounding for by in clipped) > ASKED // 2, "without it, answers are moved"


def is_found_again(server: Server, text: str, image: str | None = None) -> bool:
    """Asked twice of one rank: whether the second finds the first's. Both answers are the same."""
    fields = {"sampling_params": {"temperature": 0, "max_new_tokens": 4}, "routed_dp_rank": 0}
    first, second = (generate(server, text, image, **fields) for _ in range(2))
    assert first["output_ids"] == second["output_ids"]
    return is_cached(second["meta_info"])


LAYOUTS = {"data-parallel": EP2_ARGS, "tensor-parallel": ["--tp", "2", "--ep-size", "2", *CPU_ARGS]}


@pytest.mark.parametrize("layout", nightly_but(LAYOUTS, "tensor-parallel"))
def test_with_an_exact_cache_only_what_was_not_clipped_is_found_again(vl_model, layout):
    """Prompts of one chunk and of several; on ranks that share a batch, all must insert or none."""
    flags = ["--macs-gamma", "1.0", "--macs-min-tokens", "0", "--macs-act", "always", "--macs-cache", "exact"]
    long = prompt(" ".join(f"{i} What is this?" for i in range(60)))
    with serve(
        vl_model, *LAYOUTS[layout], *MACS, *flags, "--chunked-prefill-size", "128", log=f"exact-{layout}"
    ) as server:
        assert not is_found_again(server, prompt("What is this?", images=1), "china")
        assert not is_found_again(server, long)
        assert max(state["uncached"] for state in states(server)) >= 4
        assert_bounds_held(server)
        assert cli.main(["set", server.url, "--off", "--wait", "0"]) == 0
        assert is_found_again(server, prompt("And this?", images=1), "flower")
        assert is_found_again(server, "And " + long)
