"""Has the plan or the CPU dispatch become slower? Ratios to a torch reference in the same process, never times.

    python -m benchmarks.check_latency                 compare with benchmarks/baselines/
    python -m benchmarks.check_latency --write FILE    measure this machine's baseline in several processes

Exit 0: no row is slower by more than max(5 %, 3 x MAD). Exit 1: one is, measured twice. Exit 2: nothing can be said;
no baseline for this hardware, a row missing on either side, or too much noise. docs/guide/regression.md explains.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import bench_plan, paired
from sglang_macs.config import MacsConfig
from sglang_macs.dispatch.cpu import MacsDispatcher
from sglang_macs.dispatch.planner import LayerPlanner
from sglang_macs.observe import stats
from sglang_macs.plan import batch
from sglang_macs.plan.plan import Plan
from sglang_macs.plan.tokens import RoutedTokens

BASELINES = Path(__file__).resolve().parent / "baselines"
TOKENS = 256  # small: inputs stay in caches, and a sample is short enough to find the machine quiet
LEAST = 0.05
PROCESSES = 5
# Memory that was freed stays with the process: page faults of the reference's temporaries were half its time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
Pair = tuple[Callable[[], object], Callable[[], object]]


# ---- What is measured ----------------------------------------------------------------------------------------------


@cache
def _inputs() -> dict[str, torch.Tensor]:
    return bench_plan.inputs(0, TOKENS)


@cache
def _planned() -> tuple[Plan, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(plan, weight, histogram, threshold) of the inputs."""
    x, case = _inputs(), bench_plan.CASE
    plan = Plan(MacsConfig.from_preset("rank", gamma=1.05), case["E"], case["R"])
    weight = plan.weight(x["hidden"], x["segment"], 1)
    histogram = plan.histogram(x["ids"], x["weights"], weight, x["segment"])
    return plan, weight, histogram, plan.threshold(histogram, histogram)


def _score() -> Pair:
    x = _inputs()
    return (
        lambda: bench_plan.ops.entropy_score(x["hidden"], x["segment"]),
        lambda: bench_plan.torch_score(x["hidden"], x["segment"]),
    )


def _histogram() -> Pair:
    x, (plan, weight, *_) = _inputs(), _planned()
    buckets, experts = plan.config.buckets, bench_plan.CASE["E"]

    def reference() -> torch.Tensor:
        level = bench_plan.torch_levels(plan.config, x, weight)
        return torch.bincount((x["ids"] * 2 * buckets + level).flatten(), minlength=experts * 2 * buckets)

    return lambda: plan.histogram(x["ids"], x["weights"], weight, x["segment"]), reference


def _threshold() -> Pair:
    plan, _, histogram, _ = _planned()

    def reference() -> torch.Tensor:
        """The cumulative load of every rank from the top level down, and where it crosses the bound."""
        levels = histogram[:-4].view(bench_plan.CASE["R"], -1, 2 * plan.config.buckets).sum(1)
        above = levels.flip(1).cumsum(1)
        bound = (histogram[-4] / bench_plan.CASE["R"]).repeat(len(above), 1)
        return torch.searchsorted(above, bound)

    return lambda: plan.threshold(histogram, histogram), reference


def _apply() -> Pair:
    x, (plan, weight, _, cut) = _inputs(), _planned()
    return (
        lambda: plan.apply(x["ids"], x["weights"], weight, x["segment"], None, *cut),
        lambda: bench_plan.torch_clip(plan.config, x, weight),
    )


def _apply_reroute() -> Pair:
    x, (plan, weight, _, cut) = _inputs(), _planned()

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        return bench_plan.torch_clip(plan.config, x, weight), x["logits"].topk(12).indices

    return lambda: plan.apply(x["ids"], x["weights"], weight, x["segment"], x["logits"], *cut), reference


def _plan() -> Pair:
    x, (plan, *_) = _inputs(), _planned()

    def reference() -> torch.Tensor:
        entropy = bench_plan.torch_score(x["hidden"], x["segment"])
        weight = bench_plan.torch_weight(entropy, x["segment"], plan.config.delta)
        return bench_plan.torch_clip(plan.config, x, weight)

    tokens = RoutedTokens(x["hidden"], x["ids"], x["weights"], x["logits"], x["segment"], 1)
    return lambda: plan(tokens), reference


def _dispatch() -> Pair:
    """The CPU dispatcher, planning and proof included, on a group of one; no network, so the code's own time."""
    x, (plan, *_) = _inputs(), _planned()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = Plan(plan.config, bench_plan.CASE["E"], 1)
    inner = MacsDispatcher(LayerPlanner(0, alone, dist.group.WORLD, stats.Stats()))
    now = batch.Batch(x["segment"], 1, "")

    def ours() -> torch.Tensor:
        with batch.forward(now):
            rows, _ = inner.dispatch(x["hidden"], x["ids"], x["weights"], x["logits"])
        return inner.combine(rows)

    def reference() -> torch.Tensor:
        order = x["ids"].flatten().argsort(stable=True)
        rows = x["hidden"][order // x["ids"].shape[1]]
        back = torch.zeros(order.numel(), rows.shape[1])
        back[order] = rows.float() * x["weights"].flatten()[order, None]
        return back.view(*x["ids"].shape, -1).sum(1).to(x["hidden"].dtype)

    return ours, reference


ROWS: dict[str, Callable[[], Pair]] = {
    "score": _score,
    "histogram": _histogram,
    "threshold": _threshold,
    "apply": _apply,
    "apply_reroute": _apply_reroute,
    "plan": _plan,
    "dispatch": _dispatch,
}


# ---- Baselines -----------------------------------------------------------------------------------------------------


def fingerprint() -> dict[str, object]:
    """What a ratio depends on: processor, its width, and the torch that runs the reference."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith(("model name", "CPU part"))]
    return {
        "machine": platform.machine(),
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.split("+")[0],
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def find_baseline(folder: Path) -> dict | None:
    """The baseline of this hardware among the folder's JSON files, or None."""
    here = fingerprint()
    for path in sorted(folder.glob("*.json")):
        baseline = json.loads(path.read_text(encoding="utf-8"))
        if baseline["fingerprint"] == here:
            return baseline
    return None


def allowed(base: dict, now: paired.Ratio) -> float:
    """How much slower a row may be, as a share: max(5 %, 3 x MAD), of rounds now or of the baseline's processes."""
    return max(LEAST, 3 * max(base["mad"], now.mad))


def verdict(base: dict, now: paired.Ratio) -> str:
    """ "ok", "slower" or "faster" (the baseline should be written anew)."""
    change, most = now.value / base["ratio"] - 1, allowed(base, now)
    return "slower" if change > most else "faster" if change < -most else "ok"


# ---- Commands ------------------------------------------------------------------------------------------------------


def _measured(name: str, seconds: float) -> paired.Ratio:
    try:
        return paired.measure(*ROWS[name](), seconds=seconds)
    except paired.TooNoisyError as error:
        raise paired.TooNoisyError(f"{name}: {error}") from error


def measured_apart(names: list[str], seconds: float) -> dict[str, paired.Ratio]:
    """Rows measured in a process of their own: memory that lies otherwise is part of the noise."""
    command = [sys.executable, "-m", "benchmarks.check_latency", "--raw"]
    command += ["--seconds", str(seconds), "--rows", ",".join(names)]
    done = subprocess.run(command, env={**os.environ, **KEEP_MEMORY}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise paired.TooNoisyError(said[-1].removeprefix("check_latency: "))
    return {name: paired.Ratio(**row) for name, row in json.loads(done.stdout).items()}


def write(path: Path, seconds: float, processes: int) -> int:
    """A baseline over several processes: its MAD is what differs between them."""
    runs = []
    for i in range(processes):
        runs.append(measured_apart(list(ROWS), seconds))
        print(f"process {i + 1} of {processes}: " + ", ".join(f"{k} {v.value:.4f}" for k, v in runs[-1].items()))
    rows = {}
    for name in ROWS:
        ratios = [run[name].value for run in runs]
        ratio = statistics.median(ratios)
        mad = statistics.median(abs(r - ratio) for r in ratios) / ratio
        rows[name] = {"ratio": round(ratio, 6), "mad": round(mad, 4), "processes": [round(r, 6) for r in ratios]}
        if 3 * mad > LEAST:
            print(f"warning: {name} differs by {mad:.1%} between processes, so {3 * mad:.1%} slower would pass")
    head = {"fingerprint": fingerprint(), "commit": bench_plan.commit(), "date": datetime.now(UTC).date().isoformat()}
    path.write_text(json.dumps({**head, "tokens": TOKENS, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


def check(names: list[str], seconds: float, folder: Path) -> int:
    """Compares; a row that is slower is measured again in a new process before it counts."""
    baseline = find_baseline(folder)
    if baseline is None:
        print(f"check_latency: no baseline for {fingerprint()} in {folder}; write one: --write FILE", file=sys.stderr)
        return 2
    missing = sorted(set(names) ^ set(baseline["rows"])) if names == list(ROWS) else set(names) - set(baseline["rows"])
    if missing:
        print(f"check_latency: rows on one side only: {', '.join(missing)}; write the baseline anew", file=sys.stderr)
        return 2
    found = measured_apart(names, seconds)
    suspects = [name for name in names if verdict(baseline["rows"][name], found[name]) == "slower"]
    if suspects:
        print(f"measuring again: {', '.join(suspects)}")
        again = measured_apart(suspects, seconds)
        found |= {name: min(found[name], again[name], key=lambda ratio: ratio.value) for name in suspects}
    return report(baseline["rows"], found)


def report(base: dict[str, dict], found: dict[str, paired.Ratio]) -> int:
    """Prints one line a row; 1 if any is slower."""
    verdicts = {name: verdict(base[name], now) for name, now in found.items()}
    for name, now in found.items():
        change, most = now.value / base[name]["ratio"] - 1, allowed(base[name], now)
        figures = f"{now.ours_us:9.0f} us  reference {now.reference_us:9.0f} us  ratio {now.value:.4f}"
        print(f"{name:<14} {figures}  {change:+6.1%} (allowed {most:.1%})  {verdicts[name]}")
    return 1 if "slower" in verdicts.values() else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="only these, comma-separated")
    parser.add_argument("--seconds", type=float, default=30.0, help="most time for one row")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    parser.add_argument("--write", type=Path, metavar="FILE", help="measure a baseline instead of comparing")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="for --write")
    parser.add_argument("--raw", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args(argv)
    names = options.rows.split(",")
    if unknown := set(names) - set(ROWS):
        print(f"check_latency: no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # a second thread would share its core with whatever else runs
    try:
        if options.raw:
            print(json.dumps({name: asdict(_measured(name, options.seconds)) for name in names}))
            return 0
        if options.write:
            return write(options.write, options.seconds, options.processes)
        return check(names, options.seconds, options.baselines)
    except paired.TooNoisyError as error:
        print(f"check_latency: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
