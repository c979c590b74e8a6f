"""The end-to-end decode benchmark without servers: what a round is, what is read of it, and the rows made of rounds."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.e2e import decode, servers
from benchmarks.e2e.decode import Cell, Decoded, Workload, chosen_variants, decoded
from benchmarks.e2e.rounds import Run
from benchmarks.e2e.servers import Variant
from benchmarks.serving import ServerError
from tools import server_tables

OUTPUT = 12
WORK = Workload(requests=4, ranks=2, prompt=8, output=OUTPUT)


def passes(itl: float, tokens: int = 32, start: float = 10.0, idle: int = 0) -> list[tuple[float, int]]:
    """Of one rank: a prefill that takes 0.5 s, decode whose first passes are slow, then idle passes."""
    slow = [start + 0.5 + 3 * itl * i for i in range(decode.SETTLE)]
    decodes = [*slow, *(slow[-1] + 3 * itl + itl * i for i in range(OUTPUT - 1 - decode.SETTLE))]
    return [(start, tokens), *((at, 0) for at in decodes), *((decodes[-1] + 9.0, 0) for _ in range(idle))]


def run_of(*ranks: list[tuple[float, int]]) -> Run:
    return Run(seconds=1.0, ttft=0.1, passes=list(ranks), sent=0.0, answered=99.0, log="")


def test_itl_is_that_of_the_slowest_rank_without_the_first_passes():
    found = decoded(run_of(passes(0.010), passes(0.012, start=10.1, idle=3)), WORK)
    assert found.itl == pytest.approx(0.012) and found.ttft == pytest.approx(0.5)
    before = [(1.0, 0), (2.0, 0)]  # idle passes before the prefill are nobody's tokens
    assert decoded(run_of(before + passes(0.010)), WORK) == Decoded(pytest.approx(0.010), pytest.approx(0.5))


@pytest.mark.parametrize("spoilt", ["prefill between", "too few", "no prefill"])
def test_a_round_that_did_not_decode_in_one_go_does_not_count(spoilt):
    rank = passes(0.010)
    if spoilt == "prefill between":
        rank.insert(5, (rank[5][0] - 0.001, 8))
    elif spoilt == "too few":
        rank = rank[:-1]
    else:
        rank = [(start, 0) for start, _ in rank]
    assert decoded(run_of(passes(0.010), rank), WORK) is None


def test_a_round_asks_for_as_many_tokens_whatever_they_are():
    body = WORK.body()
    assert len(body["input_ids"]) == 8 and {len(ids) for ids in body["input_ids"]} == {8}
    assert body["sampling_params"] == {"max_new_tokens": OUTPUT, "ignore_eos": True, "temperature": 0}
    assert body == WORK.body(), "every server gets the same"


def test_servers_decode_in_graphs_with_room_for_all(tmp_path):
    options = decode.parse(["--out", str(tmp_path / "x.json"), "--attention", "triton"])
    launch = decode.launch_of(options, {})
    given = dict(zip(launch.arguments(), launch.arguments()[1:], strict=False))
    assert given["--deepep-mode"] == "auto" and given["--cuda-graph-max-bs-decode"] == "128"
    assert "--disable-cuda-graph" not in launch.arguments()
    assert given["--max-running-requests"] == "256"
    assert int(given["--max-total-tokens"]) >= 128 * (options.prompt_tokens + options.output_tokens)
    stock, auto, fused, plain = chosen_variants(None, "cuda")
    environment = launch.environment(stock, tmp_path)
    assert environment["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "128"
    assert environment["SGLANG_PLUGINS"] == "e2e_routing" and stock.stock
    assert launch.environment(fused, tmp_path)["SGLANG_PLUGINS"] == "macs,e2e_routing"
    assert "fused" in fused.flags and "inf" in fused.flags and "deepep" in plain.flags
    assert "--macs-dispatch" not in auto.flags, "as by default"
    assert [v.name for v in chosen_variants(["fused"], "cuda")] == ["stock", "fused"]
    assert {v.dispatch for v in chosen_variants(None, "cpu")} == {"gloo"}
    assert servers.side_by_side(decode.groups_of(options)) == options.at_once == 2
    assert launch.routings == [[1.0] * options.layers]


def test_ranks_that_share_a_gpu_are_clients_of_mps(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    options = decode.parse(["--out", str(tmp_path / "x.json"), "--share-gpu", "--attention", "triton"])
    launch = decode.launch_of(options, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "48"})
    environment = launch.environment(decode.VARIANTS[1], tmp_path)
    assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "48"
    assert environment["SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS"] == "1"
    assert str(servers.gpu_launches.ONE_GPU_SITE) in environment["PYTHONPATH"]


# ---- Measuring, without servers ------------------------------------------------------------------------------------


class FakeClient:
    """In the place of a server: every pass takes `itl`, that of the `slow`-th round ten times as long; the `spoilt`-th
    round has a prefill in between; None fails.
    """

    def __init__(self, itl: float | None, slow: int = 0, spoilt: int = 0) -> None:
        self.itl, self.slow, self.spoilt, self.rounds, self.stopped = itl, slow, spoilt, 0, False
        self.paused = False
        self.server = SimpleNamespace(stop=self.stop, pause=self.pause, resume=self.resume, process=None)

    def stop(self) -> None:
        self.stopped = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def choose(self, routing: int, tokens: int) -> None:
        assert routing == 0

    def counters(self) -> tuple[float, int]:
        return 0.0, 0

    def run(self, body: dict, patience_s: float) -> Run:
        assert not self.paused
        if self.itl is None:
            raise ServerError("died")
        self.rounds += 1
        rank = passes(self.itl * (10 if self.rounds == self.slow else 1))
        if self.rounds == self.spoilt:
            rank.insert(5, (rank[5][0] - 1e-6, 8))
        return run_of(rank, passes(self.itl))


FAKES = [Variant("stock", "deepep", ("s",)), Variant("fused", "fused", ("f",))]


def measured(tmp_path: Path, clients: dict) -> dict:
    flags = f"--device cpu --layers 3 --requests 4 1 --output-tokens {OUTPUT} --prompt-tokens 8 --rounds 9"
    report = decode.Report(decode.parse(["--out", str(tmp_path / "out.json"), *flags.split()]))
    group = decode.Group(FAKES, clients, decode.launch_of(report.options, {}), report)
    for requests in report.options.requests:
        group.measure(Cell(requests), 0.0, float("inf"))
    return json.loads(report.options.out.read_text())


def test_rounds_become_rows_against_stock(tmp_path):
    found = measured(tmp_path, {("s",): FakeClient(0.010), ("f",): FakeClient(0.009, slow=3, spoilt=5)})
    rows = {(row["case"]["requests"], row["case"]["variant"]): row for row in found["rows"]}
    assert set(rows) == {(n, v) for n in (4, 1) for v in ("stock", "fused")}
    fused = rows[4, "fused"]
    assert fused["op"] == "e2e_decode" and fused["against"] == "stock" and fused["rounds"] == 5
    assert fused["ratio"] == pytest.approx(0.9) and fused["ttft_ratio"] == pytest.approx(1.0)
    assert fused["itl_ms"] == pytest.approx(9.0) and fused["output_tokens_per_s"] == pytest.approx(8 / 0.009)
    assert fused["ttft_ms"] == pytest.approx(500) and rows[1, "fused"]["rounds"] == 7
    assert rows[1, "fused"]["ci95"] == pytest.approx([0.9, 0.9]) and rows[1, "stock"]["ratio"] == 1.0
    spoilt, slow = found["outliers"]
    assert spoilt["found"][0].startswith("not decoded in one go") and slow["found"] == ["took long"]
    assert spoilt["case"] == slow["case"] == fused["case"]


def test_the_page_shows_a_result(tmp_path):
    found = measured(tmp_path, {("s",): FakeClient(0.010), ("f",): FakeClient(0.009)})
    cells = [[cell(row) for cell in server_tables.E2E_DECODE.values()] for row in found["rows"]]
    assert cells[1] == ["4", "fused", "9.00", "0.900 [0.900, 0.900]", "889", "500", "1.000 [1.000, 1.000]", "7"]


def test_a_server_that_fails_is_left_out_and_stock_is_not(tmp_path):
    found = measured(tmp_path, {("s",): FakeClient(0.010), ("f",): FakeClient(None)})
    assert {row["case"]["variant"] for row in found["rows"]} == {"stock"} and found["lost"][0]["variant"] == "fused"
    with pytest.raises(ServerError):
        measured(tmp_path, {("s",): FakeClient(None), ("f",): FakeClient(0.010)})


def test_too_few_tokens_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        decode.parse(["--out", str(tmp_path / "x.json"), "--output-tokens", "4"])
    assert "--output-tokens 4: at least 7" in capsys.readouterr().err


# ---- The whole program ---------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.nightly
def test_smoke_run_on_cpu(tmp_path):
    """Two servers of the tiny model decode in one go."""
    out = tmp_path / "e2e.json"
    flags = "--device cpu --layers 3 --requests 2 --prompt-tokens 16 --output-tokens 12 --rounds 2 --stagger 0"
    command = [sys.executable, "-m", "benchmarks.e2e.decode", "--out", str(out), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["case"]["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"stock", "inf"} and rows["stock"]["ratio"] == 1.0
    assert all(row["itl_ms"] > 0 and row["rounds"] > 0 for row in rows.values())
