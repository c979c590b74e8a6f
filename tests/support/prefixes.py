"""What servers find in their prefix cache, and what must not be found there under `--macs-cache exact`."""

from benchmarks.serving import Server, prompt
from sglang_macs import cli
from tests.support.servers import assert_bounds_held, generate, states


def is_cached(answer: dict) -> bool:
    """Whether more than the chat format's first words was found in the prefix cache."""
    return answer["cached_tokens"] > answer["prompt_tokens"] // 2


def is_found_again(server: Server, text: str, image: str | None = None, **fields) -> bool:
    """Asked twice of one rank: whether the second finds the first's. Both answers are the same."""
    fields |= {"sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    first, second = (generate(server, text, image, **fields) for _ in range(2))
    assert first["output_ids"] == second["output_ids"]
    return is_cached(second["meta_info"])


def assert_only_what_was_not_clipped_is_found_again(server: Server, **fields) -> None:
    """Of a server at gamma 1, which is turned off then. Prompts of one chunk and of several; on ranks that share a
    batch, all must insert or none.
    """
    long = prompt(" ".join(f"{i} What is this?" for i in range(60)))
    assert not is_found_again(server, prompt("What is this?", images=1), "china", **fields)
    assert not is_found_again(server, long, **fields)
    assert max(state["uncached"] for state in states(server)) >= 4
    assert_bounds_held(server)
    assert cli.main(["set", server.url, "--off", "--wait", "0"]) == 0
    assert is_found_again(server, prompt("And this?", images=1), "flower", **fields)
    assert is_found_again(server, "And " + long, **fields)
