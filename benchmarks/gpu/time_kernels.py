"""Times of the kernels by CUDA graph replay, beside the bytes they must move and the copy bandwidth of the same run.

A graph holds several passes over different input sets, together several times the L2, so every pass reads cold inputs;
a pass is the graph's time over their number. `warm` rows repeat one set. Steps are timed as growing prefixes of the
plan: the difference of two rows is what the added step costs in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu import result_file
from reference import kernels_c as c
from reference.kernel_case import Config, Run, make_inputs

REPLAYS = 200
COLD_BYTES = 300_000_000  # several times the 60 MB of L2


def capture(passes: list[Callable[[], None]], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """All of them in one graph. They have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for one in passes:
            one()
    return graph


def graph_us(passes: list[Callable[[], None]]) -> tuple[float, float]:
    """(median, p99) microseconds of one pass over REPLAYS replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in passes:
            one()
    torch.cuda.synchronize()
    graph = capture(passes, stream)
    for _ in range(5):
        graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = np.array([start.elapsed_time(end) for start, end in pairs]) * 1e3 / len(passes)
    return float(np.median(times)), float(np.percentile(times, 99))


def copy_bandwidth() -> float:
    """Bytes per microsecond of a device-to-device copy, read plus written: the better of a copy and an addition."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda").view(torch.float32)
    target = torch.empty_like(source)
    best = float("inf")
    for one in (lambda: target.copy_(source), lambda: torch.add(source, 1.0, out=target)):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for timed in (False, True):
            start.record()
            for _ in range(20):
                one()
            end.record()
            torch.cuda.synchronize()
            if timed:
                best = min(best, start.elapsed_time(end) * 1e3 / 20)
    return 2 * source.numel() * 4 / best


def plan_bytes(config: Config, run: Run) -> int:
    """Each input once, each output once; logits only of tokens that lose an assignment."""
    lost = int(((run.out["ids"] != run.ids).any(1)).sum())
    slots = config.T * config.K * 2 * (run.ids.element_size() + 4)
    cells = run.out["histogram"].numel() * 4
    return config.T * (config.H * run.hidden.element_size() + 12) + slots + lost * config.E * 4 + 2 * cells


class Report:
    def __init__(self, kernels: c.Kernels) -> None:
        self.kernels, self.rows = kernels, []
        self.bandwidth = copy_bandwidth()

    def add(self, op: str, config: Config, passes: list[Callable[[], None]], size: int, against: str) -> None:
        median, p99 = graph_us(passes)
        floor = size / self.bandwidth
        ratio = 0.0 if size == 0 else (floor / median if op == "score" else median / floor)
        self.rows.append(
            {"op": op, "case": config.sizes(), "median_us": round(median, 3), "p99_us": round(p99, 3), "bytes": size,
             "against": against, "ratio": round(ratio, 3)}
        )  # fmt: skip

    def sets(self, config: Config) -> list[Run]:
        """Runs over different inputs, together larger than the L2; routing is shared, hidden states are not."""
        size = config.T * config.H * 2
        count = max(1, min(64, -(-COLD_BYTES // size)))
        return [Run(self.kernels, config, make_inputs(config, 7 + i, "cuda")) for i in range(count)]

    def score(self, config: Config) -> None:
        runs = self.sets(config)
        size = config.T * (config.H * runs[0].hidden.element_size() + 8)
        self.add("score", config, [run.score for run in runs] * max(1, 4 // len(runs)), size, "copy bandwidth")

    def plan(self, config: Config) -> None:
        runs = self.sets(config)
        for run in runs:
            run.fused()
        size = plan_bytes(config, runs[0])
        lost = 1 - float((runs[0].out["ids"] >= 0).float().mean())
        moved = int(runs[0].out["counts"][2].sum())
        print(f"T={config.T}: {moved} re-routed, {lost:.2%} dropped of {config.T * config.K}", flush=True)
        floor = "byte floor"
        self.add("plan", config, [run.fused for run in runs], size, floor)
        self.add("plan_warm", config, [runs[0].fused] * 20, size, floor)
        self.add("plan_one_by_one", config, [run.separate for run in runs], size, floor)
        self.add("plan_single_replay", config, [runs[0].fused], size, floor)
        hidden = config.T * config.H * runs[0].hidden.element_size()
        self.add("upto_score", config, [run.score for run in runs], hidden, floor)
        self.add("upto_histogram", config, [run.score_histogram for run in runs], hidden, floor)

        def with_threshold(run: Run) -> Callable[[], None]:
            return lambda: (run.score_histogram(), run.threshold())

        self.add("upto_threshold", config, [with_threshold(run) for run in runs], hidden, floor)
        for step in ("weigh", "histogram", "threshold", "apply", "threshold_apply"):
            self.add(f"alone_{step}", config, [getattr(run, step) for run in runs], 0, "nothing")

    def plan_without_scores(self, config: Config) -> None:
        """The preset `rank`: importance by gate, no hidden vector is read."""
        runs = self.sets(replace(config, importance="gate"))
        for run in runs:
            run.score_params.hidden_states = run.score_params.entropy = None
            run.fused()
        size = plan_bytes(config, runs[0]) - config.T * config.H * runs[0].hidden.element_size()
        self.add("plan_without_scores", config, [run.fused for run in runs], size, "byte floor")
        self.add("upto_histogram_without_scores", config, [run.score_histogram for run in runs], 0, "nothing")

    def rounds(self, config: Config) -> None:
        """clip_apply by number of rounds: what a round costs."""
        for rounds in (0, 1, 2, 4):
            run = Run(self.kernels, config, make_inputs(config, 7, "cuda"))
            run.fused()
            run.apply_params.assignments.policy.reroute_rounds = rounds
            self.add(f"apply_rounds_{rounds}", config, [run.apply] * 20, 0, "nothing")

    def write(self, out: Path, commit: str) -> None:
        result_file.write(out, self.rows, commit=commit, copy_bytes_per_us=round(self.bandwidth))
        print(f"copy: {self.bandwidth / 1e6:.3f} TB/s")
        print(f"{'op':22s} {'T':>6s} {'H':>5s} {'median':>9s} {'p99':>9s} {'floor':>8s} {'ratio':>7s}")
        for row in self.rows:
            size, case = row["bytes"] / self.bandwidth, row["case"]
            print(
                f"{row['op']:22s} {case['T']:6d} {case['H']:5d} {row['median_us']:9.2f} {row['p99_us']:9.2f} "
                f"{size:8.2f} {row['ratio']:7.3f}"
            )


HOT = 0.5  # rank 0 carries about 1.7 times the mean: at gamma 1.1, 7 % of the assignments have to move


def report(kernels: c.Kernels, out: Path, commit: str) -> None:
    every = Report(kernels)
    for config in (Config(T=65536), Config(T=65536, H=7168), Config(T=8192), Config(T=8192, H=7168), Config(T=128)):
        every.score(config)
    for tokens in (1, 32, 128, 256, 512, 1024, 8192, 65536):
        every.plan(Config(T=tokens, hot=HOT))
    for tokens in (128, 256, 512, 1024, 8192, 65536):
        every.plan_without_scores(Config(T=tokens, hot=HOT))
    every.plan(Config(T=128, H=7168, hot=HOT))
    every.plan(Config(T=128, hot=HOT, scope="expert", load="effective", reroute="local"))
    every.plan(Config(T=8192, hot=1.0))
    every.plan(Config(T=8192, hot=HOT, scope="expert", load="effective", importance="entropy", reroute="local"))
    every.rounds(Config(T=128, hot=HOT))
    every.rounds(Config(T=8192, hot=HOT))
    every.write(out, commit)
