"""`sglang-macs compare` on a real server with the trained model: a planted loss is found, and none in off and off."""

import json

import pytest

from benchmarks.serving import EP2_ARGS, Server
from lab import lab_chats, lab_checkpoint
from sglang_macs import cli
from tests.support.servers import states

TRAINED = (lab_checkpoint.CHECKPOINT / "model.safetensors").exists()
ARGUMENTS = [*EP2_ARGS, "--sleep-on-idle", "--moe-a2a-backend", "macs"]
ARGUMENTS += ["--macs-gamma", "1.05", "--macs-min-tokens", "0"]

pytestmark = [
    pytest.mark.server,
    pytest.mark.nightly,  # five minutes
    pytest.mark.skipif(not TRAINED, reason="no trained checkpoint here"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def server():
    with Server(lab_checkpoint.CHECKPOINT, ARGUMENTS, log="build/test-compare.log") as server:
        yield server


def compare(folder, count: int, seed: int, *arguments: str) -> tuple[int, dict]:
    """Exit status and figures of `count` questions."""
    lab_chats.write(folder / "questions.jsonl", count, seed)
    given = ["--requests", str(folder / "questions.jsonl"), "--concurrency", "16"]
    given += ["-o", str(folder / "page.html"), "--json", str(folder / "figures.json")]
    status = cli.main(["compare", *arguments, *given])
    return status, json.loads((folder / "figures.json").read_text())


def both(server: Server, folder, seed: int) -> list[tuple[int, dict]]:
    """With a planted loss, and off against off."""
    planted = compare(folder, 192, seed, server.url, "--gamma", "0.5")
    server.generate("hello", max_new_tokens=1)  # what is put back takes effect before a pass
    assert {state["config"]["gamma"] for state in states(server)} == {1.05}
    assert cli.main(["set", server.url, "--off", "--wait", "0"]) == 0
    nothing = compare(folder, 192, seed, server.url, server.url)
    assert cli.main(["set", server.url, "--on", "--wait", "0"]) == 0
    return [planted, nothing]


def test_a_planted_loss_is_found_and_none_in_off_against_off(server, tmp_path):
    (found, figures), (nothing, quiet) = both(server, tmp_path, seed=0)
    assert found == 1, figures["verdict"]
    assert figures["clipped"]["clipped"] > 0.3 * figures["clipped"]["assignments"]
    assert figures["accuracy"]["off"] > 0.9  # it is asked what it can do
    assert nothing == 0, quiet["verdict"]
    assert abs(quiet["groups"][0]["beyond"]["divergence"]["mean"]) < 1e-5


@pytest.mark.timeout(7200)
def test_ten_times_out_of_ten(server, tmp_path):
    for seed in range(1, 11):
        assert [status for status, _ in both(server, tmp_path, seed)] == [1, 0], seed
