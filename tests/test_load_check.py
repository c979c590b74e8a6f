"""benchmarks/gpu/load_check.py over servers that are made up: what it lets pass, and what it does not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.gpu import load_check
from benchmarks.gpu.gpu_launches import LAUNCHES
from benchmarks.load_test import Check, Sent

CLIENT = {"CUDA_VISIBLE_DEVICES": "0"}  # of MPS
LAYERS = LAUNCHES["2 ranks, auto, all"].layers


class FakeServer:
    """Answers as told; a mix runs 100 decode passes. `wrong` names what goes wrong."""

    def __init__(self, run: str, wrong: str) -> None:
        self.run, self.wrong, self.sends, self.stopped = run, wrong, 0, False

    def __enter__(self) -> FakeServer:
        return self

    def stop(self) -> None:
        self.stopped = True

    def send(self, plan: list) -> tuple[list, list[str]]:
        self.sends += 1
        fails = self.wrong == "requests" and self.run == "inf" and self.sends == 2
        other = self.wrong == "answers" and self.run == "inf"
        return [[i, int(other and i % 2)] for i in range(len(plan))], ["text: died"] if fails else []

    def states(self) -> list[dict]:
        on = self.run != "off"
        rank = {
            "checks": {"bound": 9} if on else {},
            "violations": {"bound": int(self.wrong == "bounds" and self.run == "1.0")},
            "own": {"clipped_visual": int(self.run == "1.0" and self.wrong != "clipping"), "clipped_text": 0},
            "fused_region": {"rounds": 100 * self.sends * LAYERS if on else 0},
        }
        return [rank, rank]


def checked(
    monkeypatch, wrong: str, memory: list[int] | None = None, launch: str = "2 ranks, auto, all"
) -> dict[str, bool]:
    """Whether each check holds, by `run: name`."""
    made: dict[str, FakeServer] = {}

    def start(_, flags, log: Path, environment: dict[str, str]) -> FakeServer:
        assert environment == (CLIENT if LAUNCHES[launch].one_gpu else {})
        run = log.stem.removeprefix("load-")
        return made.setdefault(run, FakeServer(run, wrong))

    def in_halves(server, plan):
        answers, errors = server.send(plan)
        return Sent(answers, errors, 1.0, 100.0, 0.0)

    def rank_killed(server, within_s):
        assert server.run == "1.0" and within_s == 10
        yield Check("rank killed: the server ends", wrong != "dead rank", "")

    used = iter(memory or [])
    monkeypatch.setattr(load_check.mps, "shared_gpu", lambda ranks: nullcontext(CLIENT))
    monkeypatch.setattr(load_check, "start", start)
    monkeypatch.setattr(load_check, "Server", FakeServer)
    monkeypatch.setattr(load_check, "in_halves", in_halves)
    monkeypatch.setattr(load_check, "rank_killed", rank_killed)
    monkeypatch.setattr(load_check, "send", lambda server, plan: server.send(plan))
    monkeypatch.setattr(load_check, "states", lambda server: server.states())
    monkeypatch.setattr(load_check, "gpu_memory_mb", lambda: next(used, 0))
    found = list(load_check.check_launch(LAUNCHES[launch], 40, 500, Path("build")))
    assert all(server.stopped for server in made.values())
    return {f"{run}: {check.name}": check.ok for run, check in found}


def test_a_good_server_passes_all_of_it(monkeypatch):
    found = checked(monkeypatch, "")
    assert all(found.values()), found
    assert {"inf: decode passes", "1.0: decode passes", "inf: answers", "1.0: rank killed: the server ends"} <= set(
        found
    )
    assert "off: decode passes" not in found


def test_ranks_that_share_a_gpu_are_clients_of_mps(monkeypatch):
    assert all(checked(monkeypatch, "", launch="2 ranks, auto, all, one GPU").values())


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        ("requests", {"inf: decode passes"}),
        ("answers", {"inf: answers"}),
        ("bounds", {"1.0: bounds"}),
        ("clipping", {"1.0: clipping"}),
        ("dead rank", {"1.0: rank killed: the server ends"}),
    ],
)
def test_what_is_wrong_is_told(monkeypatch, wrong, failing):
    assert {name for name, ok in checked(monkeypatch, wrong).items() if not ok} == failing


def test_memory_that_grows_is_told(monkeypatch):
    found = checked(monkeypatch, "", memory=[0, 100, 100, 0, 100, 400])
    assert [name for name, ok in found.items() if not ok] == ["inf: memory of GPUs"]
