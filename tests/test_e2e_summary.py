"""What rounds of the end-to-end benchmark come to: ratios, shares, outliers; and how long kernels ran."""

import gzip
import json

import pytest

from benchmarks.e2e import kernel_trace, summary
from benchmarks.e2e.rounds import Run, Workload
from benchmarks.e2e.summary import Samples

CASE = {"tokens": 8192, "variant": "rank-1.05"}


def drifting(factor: float, rounds: int = 9) -> list[float]:
    """Seconds of a variant on a machine that grows slower from round to round."""
    return [factor * (1 + 0.05 * i) for i in range(rounds)]


def test_ratio_is_that_of_paired_rounds():
    ours, stock = (Samples(drifting(f), drifting(f / 2)) for f in (0.8, 1.0))
    row = summary.row(CASE, ours, stock, None, None, {})
    assert row["op"] == "e2e_prefill" and row["case"] == CASE and row["against"] == "stock"
    assert row["ratio"] == pytest.approx(0.8) and row["ci95"] == pytest.approx([0.8, 0.8])
    assert row["ttft_ratio"] == pytest.approx(0.8)
    assert row["share_of_ideal"] is None and row["busy"] is None and row["host_us_per_layer"] is None


def test_interval_contains_the_median_and_needs_six_rounds():
    ours, stock = [0.9, 0.8, 0.85, 0.7, 0.95, 0.88], [1.0] * 6
    row = summary.row(CASE, Samples(ours, ours), Samples(stock, stock), None, None, {})
    assert row["ci95"] == [0.7, 0.95] and row["ratio"] == pytest.approx(0.865)
    few = summary.row(CASE, Samples(ours[:5], ours[:5]), Samples(stock[:5], stock[:5]), None, None, {})
    assert few["ci95"] is None and few["rounds"] == 5


def test_shares_have_the_dispatch_in_them_or_not():
    """Stock 1, the preset off under the other dispatch 0.8, rank 0.71, balanced 0.7."""
    ours, stock, ideal, off = (Samples(drifting(f), drifting(f)) for f in (0.71, 1.0, 0.70, 0.80))
    row = summary.row(CASE, ours, stock, ideal, off, {})
    assert row["share_of_ideal"] == pytest.approx(0.29 / 0.30)
    assert row["share_of_ideal_ci95"] == pytest.approx([0.29 / 0.30] * 2)
    assert row["share_of_balance"] == pytest.approx(0.9)


def test_share_interval_covers_the_rounds_noise():
    noise = [0.01, -0.01, 0.0, 0.005, -0.005, 0.002, -0.002, 0.008]
    share, bounds = summary.share_of_ideal([1.0] * 8, [0.96 + n for n in noise], [0.94] * 8)
    assert share == pytest.approx(0.6667, abs=0.03)
    assert bounds[0] < share < bounds[1] and bounds[0] > 0.4 and bounds[1] < 0.9


def test_no_share_of_a_gain_that_is_not_there():
    assert summary.share_of_ideal([1.0] * 8, [0.99] * 8, [1.01] * 8) == (None, None)
    by_chance = [0.99, 1.02, 0.98, 1.01, 0.985, 1.015, 0.99, 0.99]
    share, bounds = summary.share_of_ideal([1.0] * 8, [0.995] * 8, by_chance)
    assert share is not None and bounds is None


def test_outliers_are_left_out_on_both_sides_and_named():
    ours, outliers = Samples([1.0, 1.1, 4.0, 0.9, 1.0, 1.0, 1.0, 1.1], [1.0] * 8).without_outliers()
    assert outliers == [2] and ours.seconds[2] is None and ours.ttft[2] is None
    stock, _ = Samples([1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0] * 8).without_outliers()
    row = summary.row(CASE, ours, stock, None, None, {})
    assert row["rounds"] == 6 and row["ci95"] == [0.9, 1.1]


def test_few_runs_have_no_outliers():
    assert Samples([1.0, 9.0], [1.0, 9.0]).without_outliers() == (Samples([1.0, 9.0], [1.0, 9.0]), [])


def run_of(passes, log="", answered=4.0) -> Run:
    return Run(seconds=3.0, ttft=2.0, passes=passes, sent=0.0, answered=answered, log=log)


def test_reasons_of_an_outlier(tmp_path):
    workload = Workload(tokens=64, passes=4, prompt=32, ranks=2)
    even = [[(i * 0.1, 64) for i in range(4)] + [(0.4, 0)] for _ in range(2)]
    run = run_of(even, log="Compiling kernel foo\nPrefill batch, #new-seq: 2\nCompiling kernel foo\n", answered=0.5)
    assert run.full(workload)
    assert summary.reasons(run, True, [tmp_path], 0.0, 1e12) == ["the log: Compiling kernel foo"]
    (tmp_path / "kernel.cubin").touch()
    uneven = [[(0.0, 64), (0.1, 32), (0.2, 64), (3.9, 64)], [(0.0, 64)] * 4]
    run = run_of(uneven)
    found = summary.reasons(run, run.full(workload), [tmp_path], 0.0, 1e12)
    assert found[0] == "passes were not full: 64, 32, 64, 64; 64, 64, 64, 64"
    assert found[1] == "compiled 1 files, such as kernel.cubin"
    assert found[2] == "pass 3 of 4 took 3.70 s"
    assert summary.reasons(run_of(even, answered=0.5), True, [], 0.0, 0.0) == ["nothing found"]


# ---- Traces --------------------------------------------------------------------------------------------------------


def event(start: float, length: float, name: str = "gemm", cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}


def test_busy_is_the_union_of_kernels(tmp_path):
    events = [
        event(0, 1000, cat="cpu_op"),
        event(100, 20),
        event(110, 20),  # half of it beside the first, on another stream
        event(112, 3),  # within
        event(150, 10, "void deep_ep::intranode::notify_dispatch<2>"),
        event(190, 10, "Memcpy DtoD", "gpu_memcpy"),
        {"ph": "i", "cat": "kernel", "name": "no length", "ts": 500},
    ]
    assert kernel_trace.busy(events) == {"busy": pytest.approx(0.5), "working": pytest.approx(0.4)}
    assert kernel_trace.busy(events[:1]) is None
    other = [event(0, 90), event(95, 5)]
    for name, rank in (("TP-0", events), ("TP-1", other)):
        with gzip.open(tmp_path / f"{name}.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": rank}, file)
    found = kernel_trace.of_ranks(list(tmp_path.glob("*.gz")))
    assert found["busy_of_ranks"] == pytest.approx([0.5, 0.95])
    assert found["busy"] == pytest.approx(0.725) and found["working"] == pytest.approx(0.675)
    assert kernel_trace.of_ranks([]) is None
