"""What benchmarks/gpu makes of servers' answers, on made-up ones. Needs no GPU."""

import contextlib
import copy
import json
import math
import zipfile

import pytest

from benchmarks import check_serving
from benchmarks.gpu import newcomer, serve_bench, serve_check
from benchmarks.gpu.gpu_launches import LAUNCHES, RUNS, bench_launch, start

LINE = "the fused dispatch carries every low-latency batch: 12 MB a rank for 64 tokens of every rank"


def state(rank: int, fused: int) -> dict:
    own = {"clipped_visual": 5, "clipped_text": 5, "rerouted_visual": 4, "rerouted_text": 4}
    counted = {
        "dispatches": 30,
        "skipped": {"outside": 6},
        "planned": 8,
        "fused": fused,
        "graphs": 0,
        "bounded": 0,
        "checks": {"bound": 8},
        "misaligned": 0,
        "violations": {"bound": 0},
    }
    return {"rank": rank, "own": own, "fused_region": {"bytes": 5, "rounds": 24}, **counted}


def runs(fused: int = 8, carrier: str = LINE) -> dict[str, dict]:
    found = {"tokens": [[1, 2]], "carrier": carrier, "states": [state(rank, fused) for rank in range(2)]}
    return {run: copy.deepcopy(found) for run in RUNS}


def test_a_fused_launch_has_to_say_and_count_that_it_is():
    fused, plain = LAUNCHES["2 ranks, fused"], LAUNCHES["2 ranks, normal"]
    assert serve_check.judge(fused, runs()) == []
    assert serve_check.judge(plain, runs(fused=0, carrier="")) == []
    assert "gamma inf: rank 1: 7 of 8 were fused" in serve_check.judge(fused, runs(fused=7))
    assert "gamma 1.0: rank 0: 1 of 8 were fused" in serve_check.judge(plain, runs(fused=1))
    silent = serve_check.judge(fused, runs(carrier="DeepEP carries every batch, behind the plan: MACS is off"))
    assert silent == [f"gamma {run}: the log does not say that the fused dispatch carries" for run in ("inf", "1.0")]


def test_what_a_launch_was_to_clip_has_to_be_clipped_and_re_routed():
    found = runs(fused=0, carrier="")
    for one in found["1.0"]["states"]:
        one["own"] |= {"rerouted_visual": 0, "clipped_text": 0}
    launch = LAUNCHES["2 ranks, auto, Kimi-VL"]
    assert serve_check.judge(launch, found) == ["gamma 1.0: no visual assignment was rerouted"]
    text = LAUNCHES["2 ranks, auto, DeepSeek-V3"]
    assert serve_check.judge(text, found) == ["gamma 1.0: no text assignment was clipped"]


def test_prefill_of_mode_auto_is_in_normal_mode_and_decode_is_fused():
    auto, found = LAUNCHES["2 ranks, auto, fused"], runs(fused=0)
    assert serve_check.judge(auto, found) == []
    found["inf"]["states"][1]["fused_region"]["rounds"] = 0
    assert serve_check.judge(auto, found) == ["gamma inf: rank 1: the fused kernels carried nothing"]
    assert "gamma 1.0: rank 0: 8 of 8 were fused" in serve_check.judge(auto, runs(fused=8))


def test_a_bounded_launch_counts_nothing_and_has_graphs():
    launch, found = LAUNCHES["2 ranks, bounded"], runs(fused=0, carrier="")
    for of_run in found.values():
        for one in of_run["states"]:
            one |= {"bounded": 24, "graphs": 9}
    assert serve_check.judge(launch, found) == []
    found["inf"]["states"][0]["bounded"] = found["1.0"]["states"][1]["graphs"] = 0
    assert serve_check.judge(launch, found) == [
        "gamma inf: rank 0: 0 of 24 were bounded",
        "gamma 1.0: rank 1: no layer was a CUDA graph",
    ]


def test_a_launch_with_peers_has_to_say_that_they_sum():
    launch, found = LAUNCHES["2 ranks, peer exchange"], runs(fused=0, carrier="")
    words = "the log does not say that peers' memory sums the exchange"
    assert serve_check.judge(launch, found) == [f"gamma {run}: {words}" for run in ("inf", "1.0")]
    assert serve_check.judge(launch, {run: of_run | {"by_peers": True} for run, of_run in found.items()}) == []


def runs_with_copies() -> dict[str, dict]:
    found = runs(fused=0, carrier="")
    found["plain"] = copy.deepcopy(found["off"])
    for run, of_run in found.items():
        of_run["tokens"] = [[i, i + 1] for i in range(1, 9)]
        for one in of_run["states"]:
            one["own"] = {"clipped_visual": 0, "clipped_text": 0, "moved_visual": 3}
        if run != "plain":
            of_run["rebalanced"] = 4
    return found


def test_experts_with_copies_have_to_move_rows_and_keep_most_answers():
    """Sums over ranks are in another order: a token now and then may differ, at SGLang's own choice too."""
    launch, found = LAUNCHES["2 ranks, replicas, EPLB"], runs_with_copies()
    found["inf"]["tokens"][3] = [9, 9]
    assert serve_check.judge(launch, found) == []
    assert found["inf"]["equal_to_plain"] == "7 of 8 answers"
    found["off"]["tokens"] = [[9, 9]] * 8
    found["1.0"]["rebalanced"] = 0
    for one in found["1.0"]["states"]:
        one["own"]["moved_visual"] = 0
    found["inf"]["states"][1]["own"]["clipped_text"] = 2
    assert serve_check.judge(launch, found) == [
        "off: 0 of 8 answers are those without copies",
        "gamma 1.0: nothing moved to another replica",
        "infinite gamma clipped 2 assignments",
        "1.0: EPLB moved nothing",
    ]


def test_other_tokens_violations_and_failures_are_told():
    found = runs()
    found["inf"]["tokens"] = [[1, 3]]
    found["1.0"]["states"][1]["violations"]["bound"] = 2
    wrong = serve_check.judge(LAUNCHES["2 ranks, fused"], found)
    assert [words.split(" violated")[0] for words in wrong] == [
        "greedy tokens differ between off and infinite gamma",
        "gamma 1.0: rank 1",
    ]
    found["off"] = {"error": "it died"}
    assert serve_check.judge(LAUNCHES["2 ranks, fused"], found) == ["gamma off: it died"]


def test_equal_answers_of_nan_are_no_success():
    found = runs()
    for of_run in found.values():
        of_run["tokens"] = [[1, 2], [7, 0, 0, 0]]
    wrong = serve_check.judge(LAUNCHES["2 ranks, fused"], found)
    assert [words.split(":")[0] for words in wrong] == ["gamma off", "gamma inf", "gamma 1.0"]
    assert "NaN" in wrong[0]


def test_servers_on_one_gpu_answer_in_turn_with_the_share_of_one(monkeypatch):
    shared, environments = [], []

    @contextlib.contextmanager
    def shared_gpu(processes):
        shared.append(processes)
        yield {"SHARE": str(96 // processes)}

    monkeypatch.setattr(serve_check.mps, "shared_gpu", shared_gpu)
    monkeypatch.setattr(serve_check, "serve", lambda name, launch, run, environment: environments.append(environment))
    assert len(dict(serve_check.run_all(["2 ranks, one GPU", "2 ranks, normal"], at_once=4))) == 2
    assert shared == [2], "ranks of one server, not of the three that live at once"
    assert environments.count({"SHARE": "48"}) == environments.count({}) == 3


def test_the_log_says_what_carries():
    assert serve_check.said_to_carry(f"loading\nsglang-macs: {LINE}\nready") == LINE
    assert serve_check.said_to_carry("sglang-macs: active on 3 MoE layers\n") == ""


def test_a_server_without_macs_is_not_asked_for_the_fused_dispatch():
    def flags(name: str, run: str) -> str:
        launch = LAUNCHES[name]
        launch_model = type(launch).model
        type(launch).model = type(launch).model_path
        try:
            return " ".join(start(launch, RUNS[run], "log").args)
        finally:
            type(launch).model = launch_model

    assert "--macs-dispatch fused" in flags("2 ranks, fused", "inf")
    assert "--macs-dispatch bounded" in flags("2 ranks, bounded", "1.0")
    assert "--macs-dispatch auto --macs-all-reduce peer" in flags("2 ranks, auto, all", "1.0")
    assert "--macs-dispatch deepep --macs-all-reduce group" in flags("2 ranks, normal", "inf")
    assert "--macs-all-reduce peer" in flags("2 ranks, peer exchange", "1.0")
    assert "--macs-dispatch" not in flags("2 ranks, fused", "off")
    assert "--macs-all-reduce" not in flags("2 ranks, peer exchange", "off")


def test_few_rounds_of_the_benchmark_give_ratios_without_an_interval():
    pairs = {metric: [(10.0, 8.0), (10.0, 9.0)] for metric in check_serving.METRICS}
    launch = bench_launch(4)
    rows = serve_bench.rows_of(launch, pairs)
    assert rows[0]["case"]["launch"].startswith("4 ranks")
    assert [row["case"]["metric"] for row in rows] == list(check_serving.METRICS)
    assert rows[0]["ratio"] == pytest.approx(0.85) and rows[0]["ci95"] is None
    assert math.inf not in json.loads(json.dumps(rows))
    pairs = {metric: [(10.0, 8.0 + i / 10) for i in range(6)] for metric in check_serving.METRICS}
    six = serve_bench.rows_of(launch, pairs)
    assert six[0]["ci95"] == pytest.approx([0.8, 0.85])


def test_every_round_of_the_benchmark_is_kept(monkeypatch):
    kept = []

    def bench(url, model, workload, seed):
        return dict.fromkeys(check_serving.METRICS, 1.0 + seed + (url == "b"))

    check_serving.measure_bench(bench, ["a", "b"], "", 3, check_serving.Workload(), lambda p: kept.append(str(p)))
    assert len(kept) == 3 and kept[0] == str({metric: [(1.0, 2.0)] for metric in check_serving.METRICS})


def test_a_wheel_under_another_name_gets_its_own_back(tmp_path):
    wheel = tmp_path / "kernel-trimmed.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_kernel-0.4.dist-info/METADATA", "")
    assert newcomer.named(wheel, tmp_path).name == "some_kernel-0.4-py3-none-any.whl"
    proper = tmp_path / "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl"
    assert newcomer.named(proper, tmp_path) == proper
