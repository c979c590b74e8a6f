"""benchmarks/check_compare.py against a server without a model: what it kills goes on, and what it says of each."""

import pytest

from benchmarks import check_compare
from tests.support.chat_server import ChatServer, questions, serving


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(check_compare, "CONCURRENCY", 4)
    (tmp_path / "questions.jsonl").write_text(questions(96))
    return tmp_path


def test_a_comparison_that_is_killed_half_way_finds_the_planted_loss(folder):
    with serving(ChatServer()) as server:
        status, figures = check_compare.planted(server, folder, kill_at=18)
        asked = len(server.bodies)
        assert server.in_force == ("rank", 1.1)
    assert status == 1 and figures["requests"] == 96
    assert 3 * 96 + 2 * 8 <= asked < 3.5 * 96  # the passes that were kept were not asked again
    row = check_compare.row_of(3, "gamma 0.5", status, figures, 12.4, killed=True)
    assert (row["seed"], row["exit"], row["clipped"], row["killed"], row["seconds"]) == (3, 1, 0.4, True, 12)
    mean, low, high = row["divergence"]
    assert low < mean < high and mean > 0.01 > row["floor"][0]


def test_off_against_off_is_asked_of_a_server_that_is_off_and_on_again_afterwards(folder):
    with serving(ChatServer()) as server:
        status, _ = check_compare.nothing(server, folder)
        assert server.tags[0] == "off" and server.tags[-1] == "rank" and "rank" not in server.tags[1:-1]
    assert status == 0
