"""Ranks with unequal work, under every way SGLang lays them out: the server answers, and every rank decides alike.

On a rank layout that MACS gets wrong one rank enters the plan's exchange alone, and the server stands still.
"""

import threading

import pytest
import requests

from benchmarks.questions import NEW_TOKENS, QUESTIONS
from benchmarks.serving import CPU_ARGS, EP2_ARGS, Server, prompt, states
from sglang_macs.cpu_compat import threads_bind
from tests.support.servers import INFINITE, MACS, ask, assert_bounds_held, forked, generate, own, serve
from tests.support.tiers import nightly_but

pytestmark = pytest.mark.server
PICTURE, TEXT = QUESTIONS[4], QUESTIONS[2]
ATTENTION_TP = ["--tp", "4", "--dp", "2", "--enable-dp-attention", "--ep-size", "4", *CPU_ARGS]
LOCAL_COUNTS = ["--enable-dp-lm-head", "--moe-dense-tp-size", "1"]
# name -> (arguments, processes of all replicas and stages)
LAYOUTS = {
    "local token counts": ([*EP2_ARGS, *LOCAL_COUNTS], 2),
    "dense tp 1": ([*EP2_ARGS, "--moe-dense-tp-size", "1"], 2),
    "data-parallel lm head": ([*EP2_ARGS, "--enable-dp-lm-head"], 2),
    "tp 4": (["--tp", "4", "--ep-size", "4", *CPU_ARGS], 4),
    "attention-tp 2 x dp 2": (ATTENTION_TP, 4),
    "attention-tp 2 x dp 2, local token counts": ([*ATTENTION_TP, *LOCAL_COUNTS], 4),
    "two stages": ([*EP2_ARGS, "--pp-size", "2"], 4),
}
USUAL = "attention-tp 2 x dp 2, local token counts"


@pytest.mark.parametrize("name", nightly_but(LAYOUTS, USUAL))
def test_unequal_ranks_answer_as_transformers_do(vl_model, vl_reference, name):
    arguments, processes = LAYOUTS[name]
    env = forked({"SGLANG_CPU_OMP_THREADS_BIND": threads_bind(processes)})
    flags = [*arguments, *INFINITE]
    with Server(
        vl_model, flags, env=env, log=f"build/test-parallel-{name.replace(' ', '-')}.log", timeout=480
    ) as server:
        for question in (PICTURE, TEXT):  # one request at a time: all other attention ranks are idle
            assert ask(server, question) == vl_reference.answer(question).ids[:NEW_TOKENS], question
        assert_bounds_held(server)
        assert own(server, "clipped") == 0
        for state in states(server):
            assert sorted(state["layers"]) == ["0", "1", "2"], "the answer speaks for all stages"
        answering = sorted(rank for state in states(server) for rank in state["ranks"]["answering"])
        assert answering == list(range(states(server)[0]["ranks"]["ep_size"])), "and for all ranks"


def decode_on_rank_1(server: Server, begun: threading.Semaphore, number: int) -> None:
    """A long answer; `begun` is released once it decodes."""
    body = {
        "text": prompt(f"{number}"),
        "routed_dp_rank": 1,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True},
    }
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as answer:
        for i, _ in enumerate(line for line in answer.iter_lines() if line.startswith(b"data: {")):
            if i == 2:
                begun.release()


def of_rank(server: Server, rank: int) -> dict:
    return next(dict(state["own"]) for state in states(server) if state["rank"] == rank)


@pytest.mark.nightly
def test_decoding_beside_a_prefill_is_left_alone(vl_model):
    """Rank 1 decodes while rank 0 prefills pictures under a bound that cuts text, too."""
    flags = [*MACS, "--macs-preset", "cai", "--macs-gamma", "1.0", "--disable-radix-cache"]
    with serve(vl_model, *EP2_ARGS, *flags, log="decode-beside") as server:
        begun = threading.Semaphore(0)
        threads = [threading.Thread(target=decode_on_rank_1, args=(server, begun, i)) for i in range(3)]
        for thread in threads:
            thread.start()
        for _ in threads:
            begun.acquire()
        before = of_rank(server, 1)
        for i in range(6):
            generate(server, prompt(f"{i} What is this?", images=1), "china", routed_dp_rank=0)
        assert of_rank(server, 1) == before, "nothing of rank 1 was planned"
        assert any(thread.is_alive() for thread in threads), "rank 1 decoded all the time"
        for thread in threads:
            thread.join()
        assert own(server, "clipped_text") > 0
        assert_bounds_held(server)
