"""The benchmark of --macs-preset observe: its turns and rows over a stand-in for a server, and a smoke run on CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.e2e import observe
from benchmarks.e2e.rounds import Run
from benchmarks.serving import ServerError
from sglang_macs import control
from sglang_macs.config import MacsConfig
from sglang_macs.control import Settings
from tools import server_tables


class FakeServer:
    """Takes 10 ms a pass, and 1 ms more for one that is observed."""

    def __init__(self, apart: float = 0.0) -> None:
        self.settings = Settings.at_launch(MacsConfig.from_preset("observe"))
        self.apart, self.passes, self.dispatches, self.sums = apart, 0, 0, [0.0, 0.0]

    def choose(self, routing: int, tokens: int) -> None:
        self.chosen = routing, tokens

    def change(self, options: dict) -> None:
        self.settings = self.settings.changed(control.decode(control.encode(options)))

    def run(self, body: dict, patience_s: float = 0.0) -> Run:
        config, seconds, passes = self.settings.now, 0.0, len(body["input_ids"]) // 4  # two prompts a rank and pass
        for _ in range(passes):
            chosen = config.verify or (config.verify_every and self.passes % config.verify_every == 0)
            self.passes += 1
            seconds += 0.011 if chosen and config.observes else 0.010
            if chosen:
                self.dispatches += 1
                apart = self.apart if config.observes else 0.0
                self.sums = [self.sums[0] + 1.25 + apart, self.sums[1] + 1.5 + apart]
        return Run(seconds, 0.0, [[(0.0, 64)] * passes] * 2, 0.0, seconds, "")

    def states(self) -> list[dict]:
        both = {"dispatches": self.dispatches, "rows_before": [5, 3], "excess": [1.0] * 5}
        layers = {str(i): both | {"max_over_mean_before": total} for i, total in enumerate(self.sums)}
        return [{"layers": layers, "rank": rank} for rank in (1, 0)]


def rows(tmp_path: Path, server: FakeServer, monkeypatch) -> list[dict]:
    monkeypatch.setattr(observe.time, "sleep", lambda seconds: None)
    flags = "--device cpu --layers 2 --tokens 64 --prompt-tokens 32 --rounds 6"
    options = observe.parse(["--out", str(tmp_path / "out.json"), *flags.split()])
    observe.Measured(options, server).size(64, float("inf"))
    return json.loads((tmp_path / "out.json").read_text())["rows"]


def test_one_pass_of_a_round_is_observed_and_a_pair_differs_in_nothing_else(tmp_path, monkeypatch):
    usual, every, loads = rows(tmp_path, FakeServer(), monkeypatch)
    assert usual["case"] | {"mode": "every"} == every["case"] and usual["case"]["tokens"] == 64
    assert usual["ratio"] == pytest.approx(1 + 0.1 / 16) and every["ratio"] == pytest.approx(1.1)
    assert usual["rounds"] == usual["full"] == 6 and usual["ci95"] == pytest.approx([1 + 0.1 / 16] * 2)
    assert usual["off_pass_ms"] == pytest.approx(10) and every["pass_ms"] == pytest.approx(11)
    assert loads["max_over_mean"] == {str(i): {"every": x, "proof": x} for i, x in enumerate((1.25, 1.5))}
    assert (
        loads["furthest"] == 0 and loads["passes"] == 16 and loads["verdict"].startswith("most loaded rank over mean")
    )


def test_the_page_shows_a_result(tmp_path, monkeypatch):
    found = {"gpu": "g", "date": "d", "commit": "c", "command": "x", "rows": rows(tmp_path, FakeServer(), monkeypatch)}
    monkeypatch.setattr(server_tables, "matching", lambda pattern: [found])
    page = server_tables.observe_table()
    assert "| 64 | every pass | 1.1000 [1.1000, 1.1000] | 11.00 | 6 |" in page
    assert "Max/mean of 2 layers at 64 tokens: 1.250 to 1.500 by the proof" in page


def test_loads_that_differ_from_the_proof_are_told(tmp_path, monkeypatch):
    assert rows(tmp_path, FakeServer(apart=0.01), monkeypatch)[2]["furthest"] == pytest.approx(0.01)


def test_passes_that_are_not_counted_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(observe, "ARRIVAL_SECONDS", 0)
    server = FakeServer()
    server.change({"preset": "off", "verify": "false", "verify_every": 0})
    measured = observe.Measured(observe.parse(["--out", "x", "--prompt-tokens", "32"]), server)
    with pytest.raises(ServerError, match="layer 0: 0 of 16 passes are counted under off"):
        measured.seen("off", measured.workload(64, observe.PASSES))


@pytest.mark.server
@pytest.mark.nightly
def test_smoke_run_on_cpu(tmp_path):
    out = tmp_path / "observe.json"
    flags = "--device cpu --layers 3 --tokens 64 --prompt-tokens 32 --rounds 1 --warm-ups 0 --minutes 4"
    command = [sys.executable, "-m", "benchmarks.e2e.observe", "--out", str(out), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    usual, every, loads = result["rows"]
    assert result["command"].startswith("python3 -m benchmarks.e2e.observe --device cpu")
    assert usual["case"]["mode"] == "observe" and usual["full"] == every["full"] == 1
    assert len(loads["max_over_mean"]) == 3 and loads["furthest"] < 1e-9
    assert all(one["proof"] > 1 for one in loads["max_over_mean"].values())
