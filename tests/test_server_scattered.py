"""One server whose rows are scattered over the ranks of attention tensor parallelism, at infinite gamma; the last test
bounds them.

The tests share it. Prompts are cut into chunks, which run together with what decodes.
"""

import threading

import pytest

from benchmarks.questions import QUESTIONS
from benchmarks.serving import CPU_ARGS, prompt
from sglang_macs import cli
from tests.support.prefixes import assert_only_what_was_not_clipped_is_found_again
from tests.support.servers import INFINITE, LAYERS, TOP_K, ask, assert_bounds_held, generate, own, serve

pytestmark = pytest.mark.server
PICTURE = QUESTIONS[4]


@pytest.fixture(scope="module")
def server(vl_model):
    flags = ["--enable-mixed-chunk", "--chunked-prefill-size", "96", "--enable-metrics"]
    flags += [*INFINITE, "--macs-act", "always", "--macs-cache", "exact"]
    with serve(vl_model, "--tp", "2", "--ep-size", "2", *CPU_ARGS, *flags, log="scattered") as server:
        yield server


def test_deepstack_rows_are_scattered_without_dp_attention(server, vl_reference):
    """Stock SGLang dies here: its deepstack rows keep all tokens while the hidden states are scattered."""
    for question in QUESTIONS:
        assert ask(server, question) == vl_reference.answer(question).ids, question
    assert_bounds_held(server)


def test_counters_are_of_all_assignments_where_one_rank_answers(server):
    """SGLang asks the first rank alone."""
    before = own(server, "assignments")
    answers = [generate(server, PICTURE.prompt, PICTURE.image, extra_key=f"counted {i}") for i in range(3)]
    tokens = sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
    assert own(server, "assignments") - before == tokens * LAYERS * TOP_K
    metrics = [line for line in server.get("/metrics").splitlines() if line.startswith("sglang:macs_planned_total")]
    assert all(any(f'moe_ep_rank="{rank}"' in line for line in metrics) for rank in (0, 1))


def test_decoded_tokens_of_mixed_chunks_are_left_alone(server):
    """Prefill and decode in one batch, prompts cut in chunks: what is planned belongs to prompts."""
    before, tokens, lock = own(server, "assignments"), [], threading.Lock()

    def one(i: int) -> None:
        sampling = {"temperature": 0, "max_new_tokens": 24}
        text = prompt(f"{i} What?", images=1)
        answer = generate(server, text, "flower", sampling_params=sampling, extra_key=f"mixed {i}")
        with lock:
            tokens.append(answer["meta_info"]["prompt_tokens"])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert own(server, "assignments") - before == sum(tokens) * LAYERS * TOP_K
    assert_bounds_held(server)


def test_with_an_exact_cache_only_what_was_not_clipped_is_found_again(server):
    server.flush_cache()
    assert cli.main(["set", server.url, "--gamma", "1", "--wait", "0"]) == 0
    assert_only_what_was_not_clipped_is_found_again(server)
