"""`sglang-macs compare` on a real server with the trained model: a planted loss is found, and none in off and off."""

import pytest

from benchmarks import check_compare
from benchmarks.serving import Server
from lab import lab_chats, lab_checkpoint
from tests.support.servers import states

TRAINED = (lab_checkpoint.CHECKPOINT / "model.safetensors").exists()

pytestmark = [
    pytest.mark.server,
    pytest.mark.nightly,  # ten minutes; ten times: benchmarks/check_compare.py
    pytest.mark.skipif(not TRAINED, reason="no trained checkpoint here"),
    pytest.mark.timeout(3600),
]


def test_a_planted_loss_is_found_and_none_in_off_against_off(tmp_path):
    """The first comparison is killed half-way: it goes on where it was, and the server gets its options back."""
    lab_chats.write(tmp_path / "questions.jsonl", check_compare.QUESTIONS, seed=0)
    with Server(lab_checkpoint.CHECKPOINT, check_compare.ARGUMENTS, log="build/test-compare.log") as server:
        found, figures = check_compare.planted(server, tmp_path, kill_at=check_compare.PASSES // 2)
        server.generate("hello", max_new_tokens=1)  # what is put back takes effect before a pass
        assert {state["config"]["gamma"] for state in states(server)} == {1.05}
        nothing, quiet = check_compare.nothing(server, tmp_path)
    assert found == 1, figures["verdict"]
    assert figures["requests"] == check_compare.QUESTIONS and figures["refused"] == 0
    assert figures["clipped"]["clipped"] > 0.3 * figures["clipped"]["assignments"]
    assert figures["accuracy"]["off"] > 0.9  # it is asked what it can do
    assert nothing == 0, quiet["verdict"]
    assert abs(quiet["groups"][0]["beyond"]["divergence"]["mean"]) < 1e-5
