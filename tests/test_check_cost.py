"""What MACS costs a request: the measurement on made-up servers, and the accounting of bytes on the cable."""

import json

import pytest

from benchmarks import check_cost, multinode
from benchmarks.serving import ServerError


class MadeUp:
    """Two sides whose requests take 1 s and `slower` s, on a machine that becomes slower all the time."""

    def __init__(self, slower: float) -> None:
        self.slower, self.asked, self.used = slower, [], [0.0, 0.0]

    def ask(self, side: int, uri: str, number: int) -> float:
        self.asked.append((side, uri))
        seconds = (self.slower if side else 1.0) * (1 + 0.01 * len(self.asked))
        self.used[side] += seconds / 2
        return seconds

    def cpu_seconds(self) -> list[float]:
        return list(self.used)


@pytest.fixture
def made_up(monkeypatch) -> list[str]:
    pictures = [f"picture {i}" for i in range(4 * 6)]
    monkeypatch.setattr(check_cost, "MOST_BLOCKS", 5)
    monkeypatch.setattr(check_cost, "crops", lambda count: pictures[:count])
    return pictures


def test_a_slower_side_is_found_and_drift_cancels(made_up):
    compared = MadeUp(1.02)
    spent = check_cost.measure(compared, seconds=60)
    for sides in spent.values():
        assert len(sides[0]) == len(sides[1]) == 5
        assert [b / a for a, b in zip(*sides, strict=True)] == pytest.approx([1.02] * 5)
    assert [uri for _, uri in compared.asked] == made_up, "every request has a picture that no cache knows"
    assert [side for side, _ in compared.asked] == [0, 1, 1, 0] * 6


def test_it_stops_when_the_time_is_up(made_up):
    spent = check_cost.measure(MadeUp(1.0), seconds=-1)
    assert spent == {"latency": [[], []], "cpu": [[], []]}


class Rank:
    """A server of one rank that answers /server_info alone."""

    def __init__(self, planned: int, left: int, clipped: int = 0) -> None:
        own = {"clipped_visual": clipped, "clipped_text": 0}
        self.macs = {"planned": planned, "skipped": {"off": left}, "own": own}

    def get(self, path: str) -> dict:
        return {"internal_states": [{"macs": self.macs}]}


@pytest.mark.parametrize("counts", [(0, 30), (30, 0), (30, 30, 1)], ids=["never on", "never off", "clips"])
def test_comparing_nothing_is_an_error(tmp_path, counts):
    compared = object.__new__(check_cost.PlannedOrNot)
    compared.server, compared.probe = Rank(*counts), check_cost.Probe(tmp_path / "probe")
    with pytest.raises(ServerError, match="compared nothing"):
        compared.figures()


def test_figures_are_over_both_ranks(tmp_path):
    compared = object.__new__(check_cost.PlannedOrNot)
    compared.server, compared.probe = Rank(30, 30), check_cost.Probe(tmp_path / "probe")
    for rank, times in enumerate(([[0.1], [1.0, 9.0]], [[0.3], [2.0]])):
        spent = {"layer_ms": times, "layer_cpu_seconds": [0.1, 0.3], "cpu_seconds": [10.0 * (rank + 1), 99.0]}
        (tmp_path / "probe" / f"spent-{rank}.json").write_text(json.dumps(spent))
    found = compared.figures()
    assert found["layer_ms"] == {"left alone": pytest.approx(0.2), "planned": 2.0}
    assert found["plan_share"] == pytest.approx(0.4 / 30)


def test_a_row_replaces_the_one_of_its_case(tmp_path):
    out = tmp_path / "cost.json"
    for model, ratio in (("wide", 1.5), ("tiny", 1.2), ("wide", 1.1)):
        check_cost.save(out, {"case": {"comparison": "plan", "model": model}, "ratio": ratio})
    assert [row["ratio"] for row in json.loads(out.read_text())["rows"]] == [1.2, 1.1]


def test_a_row_of_another_commit_stays(tmp_path, monkeypatch):
    out = tmp_path / "cost.json"
    for commit in ("a", "b"):
        monkeypatch.setattr(check_cost, "commit", lambda commit=commit: commit)
        check_cost.save(out, {"case": {"comparison": "plan", "model": "wide"}, "ratio": 1.0})
    assert [row["commit"] for row in json.loads(out.read_text())["rows"]] == ["a", "b"]


def test_bytes_on_the_cable_follow_from_the_counters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 64, "num_local_experts": 8}}))

    def states(rows: int, plans: int) -> list[dict]:
        return [{"remote_rows": rows, "planned": plans, "config": {"buckets": 32}}] * 2

    found = multinode.payload(tmp_path, states(10, 1), states(15, 4))
    # 5 rows of each rank, there and back; 3 plans of each rank, 8 experts x (visual, text) x 32 buckets and 4 sums.
    assert found == {"row_bytes": 2 * 5 * 64 * 2 * 2, "exchange_bytes": 2 * 3 * 4 * (8 * 2 * 32 + 4)}
